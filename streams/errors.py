"""What goes wrong in streams, and what the operator does about it.

StreamError
    KafkaUnavailableError   no broker answered, or it refused: bootstrap address, credentials
    TopicError              a topic is configured so that the contract does not hold
        MissingTopicError   or it is not there
    ProduceError            a record was not stored by the broker: nothing was lost silently, produce it again
    StateError              the stored state cannot be carried on: wrong log, wrong definition, gap in the log
    SnapshotError           the snapshots cannot be reached, read or written
    ViewError               the local view cannot be written
    FencedError             another worker has taken over what this one writes

Readers raise the errors of features/ports.py: SequenceUnavailableError (retry) and SequenceCorruptError (DATA_LOSS).
"""


class StreamError(RuntimeError):
    """Base of the errors of this package."""


class KafkaUnavailableError(StreamError):
    """No broker answered within the time given, or it refused the client."""


class TopicError(StreamError):
    """A topic is missing, or its configuration breaks the contract."""


class MissingTopicError(TopicError):
    """There is no such topic."""


class ProduceError(StreamError):
    """A record was not acknowledged by the broker."""


class StateError(StreamError):
    """Stored state that cannot be carried on with this log or this domain file."""


class SnapshotError(StreamError):
    """The snapshot store cannot be reached, or refused."""


class ViewError(StreamError):
    """The local view cannot be written."""


class FencedError(StreamError):
    """Another worker has taken over: this one closes the partition."""

"""Training examples of a served log: what a ranker's own requests showed to users, with the inputs that were served.

Left out are requests of other rankers; candidates that nobody saw, which are no examples of what was not liked; requests that no state
answered (their sequence was not read); and those that name a user erased since.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.erasures import NOBODY, Erased, erased_before_ms
from features.logs import LogError, LoggedRequests, Served, read_requests, read_summary
from inference.history import Sequences, with_rows
from protos.v1.ranking_pb2 import SEQUENCE_SOURCE_NONE

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def served_requests(domain: Domain, ranker_name: str, log: str | Path, erased: Erased = NOBODY) -> Iterator[LoggedRequests]:
    """The requests of a served log that train the ranker, with `served`, and of their candidates those that were seen.

    Raises:
        LogError: no list of the log has an impression, so that nobody knows what was seen; or it cannot be read.
    """
    if not read_summary(log)["label"]["has_seen"]:
        raise LogError(f"{log}: no list has an impression: what was seen is not known; log impressions, or label with --all-seen")
    for batch in read_requests(log, domain):
        if batch.served is None or batch.seen is None:
            raise LogError(f"{log}: not a served log")
        chosen = batch.served.column("ranker") == ranker_name
        chosen &= batch.served.column("sequence_source") != SEQUENCE_SOURCE_NONE
        chosen &= ~_names_erased(batch, batch.served, erased)
        found = with_rows(batch, np.flatnonzero(batch.seen & np.repeat(chosen, np.diff(batch.starts))))
        if len(found):
            yield found


class ServedSequences:
    """The sequences that a served log's requests were served with."""

    def sequences(self, batch: LoggedRequests) -> Iterator[Sequences]:
        """Of the batch's requests in their order, all at once: they are there already. Raises LogError: it is no served log's."""
        if batch.served is None:
            raise LogError("requests without what they were served with")
        yield Sequences(*batch.served.sequences())


def _names_erased(batch: LoggedRequests, served: Served, erased: Erased) -> Bools:
    """Which requests name a user who was erased after they were asked or served."""
    who, of = served.lists("who")
    first_ms = np.minimum(batch.request_time_ms, served.column("served_time_ms"))
    names = np.zeros(len(batch), bool)
    names[of[first_ms[of] <= erased_before_ms(erased, who)]] = True
    return names

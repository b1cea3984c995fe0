"""Quix Streams, defaults: a stateful function over the topic, with its changelog; it commits every 5 s and when it stops."""

from peer import Job, Meter, decode, fold
from quixstreams import Application, State
from rocksdict import AccessType, Options, Rdict

_STATE_KEY = b"latest"


def main() -> None:
    job = Job.from_argv()
    app = Application(
        broker_address=job.bootstrap, consumer_group=job.group, auto_offset_reset="earliest", state_dir=job.state, loglevel="WARNING"
    )
    meter = Meter(job)
    frame = app.dataframe(app.topic(job.topic, key_deserializer="bytes", value_deserializer="bytes"))

    def step(value: bytes, key: bytes, timestamp_ms: int, _headers: object, state: State) -> None:
        before = state.get_bytes(_STATE_KEY, b"")
        after = fold(before, decode(key, value, timestamp_ms, job.tolerance_ms), job.length)
        if after is not before:
            state.set_bytes(_STATE_KEY, after)
        meter.add(1)

    frame.update(step, stateful=True, metadata=True)
    app.run(count=job.records, collect=False)
    meter.finish()
    # One database a partition; key of a row: the message's key, "|", the key in the state.
    databases = []
    for path in sorted(job.state.rglob("CURRENT")):
        families = {name: Options(raw_mode=True) for name in Rdict.list_cf(str(path.parent))}
        databases.append(Rdict(str(path.parent), Options(raw_mode=True), families, AccessType.read_only()))
    job.write_rows(lambda key: next(filter(None, (database.get(key + b"|" + _STATE_KEY) for database in databases)), None))


if __name__ == "__main__":
    main()

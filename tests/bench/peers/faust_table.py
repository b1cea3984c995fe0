"""A Faust Table on rocksdict, defaults: one row of bytes a user, with its changelog."""

import asyncio
import logging

import faust
from peer import Job, Meter, decode, fold
from rocksdict import AccessType, Options, Rdict


async def main() -> None:
    job = Job.from_argv()
    logging.basicConfig(level="WARNING")
    app = faust.App(
        job.group,
        broker=f"kafka://{job.bootstrap}",
        store="rocksdb://?driver=rocksdict",
        datadir=str(job.state),
        web_enabled=False,
        autodiscover=False,
    )
    topic = app.topic(job.topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    table = app.Table("latest", default=bytes, partitions=job.partitions, key_type=bytes, value_type=bytes)
    meter, complete = Meter(job), asyncio.Event()

    @app.agent(topic)
    async def keep(stream: faust.StreamT) -> None:
        try:
            async for event in stream.events():
                key, message = event.key, event.message
                before = table[key]
                after = fold(before, decode(key, event.value, round(message.timestamp * 1000), job.tolerance_ms), job.length)
                if after is not before:
                    table[key] = after
                meter.add(1)
                if meter.is_complete:
                    complete.set()
        except Exception:
            complete.set()  # and the meter says that records are missing
            raise

    await app.start()
    await complete.wait()
    await app.stop()  # commits
    meter.finish()
    paths = sorted(path.parent for path in job.state.rglob("CURRENT"))
    databases = [Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only()) for path in paths]
    job.write_rows(lambda key: next(filter(None, (database.get(key) for database in databases)), None))


if __name__ == "__main__":
    asyncio.run(main())

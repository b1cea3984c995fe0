"""The bare direct loop: decode, append, cut, write, in Python over rocksdict, 20,000 records a batch. A ceiling, not a product.

It checks nothing, keeps records in the order in which they come (late ones at the end, doubled ones twice), and can neither rebalance nor
restore. Its state is compared with the last records of each user in the log's order.
"""

import gc

import numpy as np
import rocksdict
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition
from peer import EVENT_BYTES, Job, Meter

from features.actions import EVENT_DTYPE

BATCH = 20_000
_OFFSETS_KEY = b"\x00"
_WIDE, _NARROW = ("user_id", "entity_id", "event_time_ms", "event_id", "request_id"), ("entity_kind", "action", "surface")
_WIRE = np.dtype(
    [(name, kind) for field in _WIDE for name, kind in ((f"tag of {field}", "u1"), (field, "<u8"))]
    + [(name, kind) for field in _NARROW for name, kind in ((f"tag of {field}", "u1"), (field, "<u4"))]
    + [("tag of value", "u1"), ("value", "<f4")]
)


def main() -> None:
    job = Job.from_argv()
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    database = rocksdict.Rdict(str(job.state), options)
    consumer = Consumer(
        {
            "bootstrap.servers": job.bootstrap,
            "group.id": job.group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "fetch.queue.backoff.ms": 5,
            "queued.min.messages": 200_000,
        }
    )
    consumer.assign([TopicPartition(job.topic, partition, OFFSET_BEGINNING) for partition in range(job.partitions)])
    meter, next_offsets = Meter(job), np.zeros(job.partitions, np.int64)
    gc.disable()
    while not meter.is_complete:
        messages = consumer.consume(BATCH, 0.1)
        if messages:
            _apply(database, messages, next_offsets, job.length * EVENT_BYTES)
            meter.add(len(messages))
    meter.finish()
    consumer.close()
    job.write_rows(database.get)
    database.close()


def _apply(database: rocksdict.Rdict, messages: list[Message], next_offsets: np.ndarray, row_bytes_max: int) -> None:
    n = len(messages)
    joined_keys = b"".join(map(Message.key, messages))
    wire = np.frombuffer(b"".join(map(Message.value, messages)), _WIRE)
    partitions = np.fromiter(map(Message.partition, messages), np.int64, n)
    next_offsets[partitions] = np.fromiter(map(Message.offset, messages), np.int64, n) + 1  # a partition's last record comes last
    users = wire["user_id"]
    order = np.argsort(users, kind="stable")
    events = np.empty(n, EVENT_DTYPE)
    for name in EVENT_DTYPE.names:
        events[name] = wire[name][order]
    data, sorted_users = events.tobytes(), users[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_users[1:] != sorted_users[:-1])))
    keys = [joined_keys[i : i + 16] for i in (order[starts] * 16).tolist()]
    edges = [*(starts * EVENT_BYTES).tolist(), len(data)]
    batch = rocksdict.WriteBatch(raw_mode=True)
    for i, (key, row) in enumerate(zip(keys, database.get(keys), strict=True)):
        new = data[edges[i] : edges[i + 1]]
        batch.put(key, (row + new if row else new)[-row_bytes_max:])
    batch.put(_OFFSETS_KEY, next_offsets.tobytes())
    database.write(batch)


if __name__ == "__main__":
    main()

"""Drives a running stack along a canonical log: actions in their order, rankings at logged moments."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.domain import Domain
from features.ids import partition_of, user_key
from features.logs import LoggedRequests, read_actions, read_requests
from features.ports import Position
from features.tensors import feature_names
from inference.client import Ranking, RankingClient, typed
from protos.v1.ranking_pb2 import FeatureColumn, RankRequest
from streams.kafka import KafkaConfig, end_offsets
from streams.producer import ActionProducer


@dataclass(frozen=True)
class Moment:
    """A logged request: what to ask, and which candidates were answered with which actions."""

    request: RankRequest
    candidate_ids: np.ndarray
    labels: dict[str, np.ndarray]


def logged_moments(domain: Domain, ranker: str, log: Path, *, from_ms: int, count: int, seed: int = 0) -> list[Moment]:
    """`count` requests drawn from those at or after `from_ms` (all, where there are fewer), in the order of time."""
    found = [(batch, i) for batch in read_requests(log, domain) for i in range(len(batch)) if int(batch.request_time_ms[i]) >= from_ms]
    if not found:
        raise ValueError(f"{log}: no request at or after {from_ms} ms")
    chosen = np.sort(np.random.default_rng(seed).choice(len(found), min(count, len(found)), replace=False))
    return [_moment(domain, ranker, *found[place]) for place in chosen.tolist()]


def drive(
    domain: Domain,
    log: Path,
    moments: list[Moment],
    producer: ActionProducer,
    client: RankingClient,
    kafka: KafkaConfig,
    topic: str,
    *,
    from_ms: int,
    timeout_s: float = 10.0,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Moment, Ranking]]:
    """Produces the log's actions appended from `from_ms` on, and asks for each moment's ranking when everything before it is visible.

    Raises:
        ProduceError, RankError: see there.
        RuntimeError: a sequence did not become fresh within `timeout_s`.
    """
    waiting = list(moments)
    partitions = producer.log_identity.partition_count
    for batch in read_actions(log, domain):
        keep = (batch.append_time_ms >= from_ms) & ~batch.erase
        users, events, times = batch.users[keep], batch.events[keep], batch.append_time_ms[keep]
        start = 0
        while waiting and len(times) and waiting[0].request.request_time_ms <= times[-1]:
            moment = waiting.pop(0)
            end = int(np.searchsorted(times, moment.request.request_time_ms, "left"))
            producer.produce_many(users[start:end], events[start:end], times[start:end])
            progress(end - start)
            start = max(start, end)
            producer.flush()
            yield moment, rank_fresh(client, moment.request, end_of(kafka, topic, moment.request.user_id, partitions), timeout_s)
        producer.produce_many(users[start:], events[start:], times[start:])
        progress(len(users) - start)
    producer.flush()
    for moment in waiting:
        yield moment, rank_fresh(client, moment.request, end_of(kafka, topic, moment.request.user_id, partitions), timeout_s)


def rank_fresh(client: RankingClient, request: RankRequest, after: Position, timeout_s: float) -> Ranking:
    """A ranking that includes `after`; the server waits for it a while itself, and is asked again until `timeout_s`."""
    del request.after[:]
    if after.offset >= 0:
        request.after.add(log_epoch=after.log_epoch, partition=after.partition, offset=after.offset)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        answer = typed(client.call(request, timeout_s=timeout_s))
        if answer.after_reached:
            return answer
    raise RuntimeError(f"user {request.user_id}: position {after} was not visible within {timeout_s} s; is the worker running?")


def end_of(kafka: KafkaConfig, topic: str, user_id: int, partitions: int) -> Position:
    """The newest position of the user's partition."""
    partition = partition_of(user_key(user_id), partitions)
    return Position(0, partition, end_offsets(kafka, topic, [partition])[partition] - 1)


def _moment(domain: Domain, ranker: str, batch: LoggedRequests, i: int) -> Moment:
    rows = slice(int(batch.starts[i]), int(batch.starts[i + 1]))
    ids = batch.entity_id[rows]
    request = RankRequest(
        ranker=ranker,
        user_id=int(batch.user_id[i]),
        candidate_ids=ids.astype("<u8").tobytes(),
        candidate_kinds=batch.entity_kind[rows].tobytes(),
        request_time_ms=int(batch.request_time_ms[i]),
    )
    for side, target, span in (
        ("candidate", request.candidate_features, rows),
        ("request", request.request_features, slice(rows.start, rows.start + 1)),
    ):
        for kind in ("number", "category", "list", "vector", "weighted_list"):
            for name in feature_names(domain, ranker, side, kind):
                column = batch.features[name]
                if kind in ("number", "vector"):
                    target[name].CopyFrom(FeatureColumn(number=column.values[span].astype("<f4").tobytes()))
                elif column.lengths is None:
                    target[name].CopyFrom(FeatureColumn(category=column.values[span].astype("<u8").tobytes()))
                else:
                    ends = np.cumsum(column.lengths)
                    low, high = int(ends[span.start] - column.lengths[span.start]), int(ends[span.stop - 1])
                    lengths = column.lengths[span].astype("<u4").tobytes()
                    weights = b"" if column.weights is None else column.weights[low:high].astype("<f4").tobytes()
                    hashes = column.values[low:high].astype("<u8").tobytes()
                    target[name].CopyFrom(FeatureColumn(category=hashes, list_length=lengths, number=weights))
    labels = {name: batch.label(action.id)[rows] for name, action in domain.actions.items()}
    return Moment(request, ids, labels)

"""`freshrank demo`: train, serve, act live, and show what matters, on the simulator or on a real log.

Shown: a ranking before and after one action of the user; the time from produce() to a changed ranking; HIT@3 with and without the
realtime sequence; the parity report of a replay in a process of its own.
"""

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.drive import Moment, drive, logged_moments
from deploy.learn import Workspace, import_data, now_ms, release, train_ranker, train_without_sequence
from deploy.processes import kafka_config, topics
from deploy.settings import Settings
from deploy.simulator import Simulator
from deploy.stack import KEPT_DOMAIN, Stack, keep_domain, ranking_client
from features.actions import EVENT_DTYPE
from features.domain import Domain, load_domain
from features.pack import Packer
from features.request import inputs_from_request
from features.tables import TableSet
from inference.client import Ranking, RankingClient, feature_column, typed
from inference.rescore import probabilities
from inference.train import TrainOptions, TrainResult
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.ranking_pb2 import RankRequest
from streams.producer import ActionProducer

SEED = 7
REQUESTS = 20_000
LIVE_USERS, LIVE_REQUESTS = 60, 6
FRESH_TRIALS = 200
MOMENTS = 200
TOP = 3


@dataclass
class Live:
    """What the live part needs."""

    domain: Domain
    ranker: str
    producer: ActionProducer
    client: RankingClient
    settings: Settings


def run_demo(settings: Settings, domain_path: Path | None, data: Path | None, seconds: float, console: Console) -> int:
    """Runs the demo; returns 0 if the replay found no difference.

    Raises:
        ValueError: the home folder is another product's.
        TrainError: another process trains or releases the ranker in it.
    """
    started = time.monotonic()
    simulator = Simulator(SEED) if domain_path is None else None
    if domain_path is None:
        domain_path, data = Settings.model_fields["domain"].default, settings.home / "demo" / "published"
    elif data is None:
        raise ValueError("--data: the folder with the published files is needed with --domain")
    domain = load_domain(domain_path)
    ranker = domain.ranker_name(None)
    refuse_other_product(domain, settings.home)
    with Workspace(domain_path, settings.home).alone_with(ranker, "freshrank demo"):
        settings = settings.model_copy(update={"domain": keep_domain(domain_path, settings.home), "inline_share": 0.1})
        work = Workspace(settings.domain, settings.home)
        if simulator is not None:
            simulator.write(data, requests=REQUESTS)
            console.print(f"[bold]1[/bold]  simulated a published log: {data}")
        summary = import_data(work, data, console)
        console.print(f"[bold]2[/bold]  imported {summary['actions']:,} actions, {summary['requests']:,} requests")

        options = TrainOptions(seconds_max=seconds, learning_rate=2e-3, batch_rows=256, seed=SEED, threads=2)
        trained = train_ranker(work, ranker, options)
        without = train_without_sequence(work, ranker, replace(options, seconds_max=seconds / 2))
        written = release(work, ranker)
        console.print(f"[bold]3[/bold]  trained twice, with and without the realtime sequence; released {written.release_id}")

    with Stack(settings) as stack:
        console.print(f"[bold]4[/bold]  started Kafka, Triton, worker, reader, server in {settings.home}")
        live = connect(stack, work.domain, ranker)
        try:
            if simulator is not None:
                hit = _live_sessions(live, simulator, without)
            else:
                _live_moments(live, work, trained.metrics["parts"]["test"]["from_ms"])
                hit = _test_hits(trained.metrics, without.metrics, ranker, work.domain)
            moments = logged_moments(live.domain, ranker, work.log, from_ms=0, count=FRESH_TRIALS, seed=SEED)
            before_after = _before_and_after(live, max(moments, key=lambda moment: len(moment.candidate_ids)))
            visible_ms = _produce_to_changed(live, moments)
        finally:
            live.producer.close()
            live.client.close()
        parity = replay_report(stack.settings)
    _show(console, before_after, visible_ms, hit, parity)
    console.print(f"demo done in {time.monotonic() - started:.0f} s; `freshrank up --home {settings.home}` serves the same release again")
    return 0 if parity["ok"] else 1


def refuse_other_product(domain: Domain, home: Path) -> None:
    """Raises ValueError where the home folder's domain file is of another product: it would be written over."""
    kept = home / KEPT_DOMAIN
    if kept.exists() and (found := load_domain(kept).name) != domain.name:
        raise ValueError(f"{home} is the home folder of {found!r}: name another one with --home")


def connect(stack: Stack, domain: Domain, ranker: str) -> Live:
    """Clients of a running stack."""
    settings = stack.settings
    producer = ActionProducer(kafka_config(settings), domain, settings.topic_actions, base=settings.log_base)
    client = ranking_client(settings, timeout_s=5.0)
    return Live(domain, ranker, producer, client, settings)


def _live_sessions(live: Live, simulator: Simulator, without: TrainResult) -> dict[str, Any]:
    """Sessions of users whom training never saw, acting now: HIT@3 of the served rankings, and of the model without the sequence."""
    tables = TableSet.open(live.settings.home / "tables", live.domain, live.ranker, without.generations)
    packer = Packer(live.domain, live.ranker, tables)
    hits: dict[str, list[float]] = {"with": [], "without": []}
    for user_id in simulator.held_back_users[:LIVE_USERS]:
        user = simulator.user(user_id)
        per_user: dict[str, list[int]] = {"with": [], "without": []}
        after: list[WirePosition] = []
        for _ in range(LIVE_REQUESTS):
            shown = simulator.request(user, now_ms())
            request = RankRequest(
                ranker=live.ranker,
                user_id=user_id,
                candidate_ids=shown.candidate_ids.astype("<u8").tobytes(),
                request_time_ms=shown.time_ms,
                candidate_features={"retrieval_score": feature_column(shown.retrieval_score.tolist())},
                request_features={"device": feature_column([user.device])},
                after=after,
            )
            answer = typed(live.client.call(request))
            actions = simulator.respond(shown)
            clicked = {action.entity_id for action in actions if action.action == "click"}
            if clicked:
                per_user["with"].append(_hits(answer.ids[np.argsort(-answer.head_scores["click"], kind="stable")], clicked))
                inputs = inputs_from_request(live.domain, request, np.zeros(0, EVENT_DTYPE))
                scores = probabilities(without.model, packer.pack(inputs).tensors)[:, without.model.head_names.index("click")]
                per_user["without"].append(_hits(shown.candidate_ids[np.argsort(-scores, kind="stable")], clicked))
            position = None
            for action in actions:
                position = live.producer.produce(
                    user_id=user_id,
                    entity_kind="item",
                    entity_id=action.entity_id,
                    action=action.action,
                    surface=shown.surface,
                    value=action.value,
                    request_id=answer.request_id,
                    event_time_ms=min(action.time_ms, now_ms()),
                )
            if position is not None:
                at = position.result()
                after = [WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset)]
        for name, found in per_user.items():
            if found:
                hits[name].append(float(np.mean(found)))
    return {
        "head": "click",
        "with": float(np.mean(hits["with"])),
        "without": float(np.mean(hits["without"])),
        "of": f"{len(hits['with'])} held-back users, live",
    }


def _hits(ids: np.ndarray, clicked: set[int]) -> int:
    return sum(int(item) in clicked for item in ids[:TOP])


def _live_moments(live: Live, work: Workspace, test_from_ms: int) -> list[tuple[Moment, Ranking]]:
    moments = logged_moments(live.domain, live.ranker, work.log, from_ms=test_from_ms, count=MOMENTS, seed=SEED)
    found: Iterator[tuple[Moment, Ranking]] = drive(
        live.domain,
        work.log,
        moments,
        live.producer,
        live.client,
        kafka_config(live.settings),
        topics(live.settings).actions,
        from_ms=test_from_ms,
    )
    return list(found)


def _test_hits(trained: dict[str, Any], without: dict[str, Any], ranker: str, domain: Domain) -> dict[str, Any]:
    head = next(iter(domain.ranker[ranker].heads))
    ours, theirs = trained["test"]["heads"][head], without["test"]["heads"][head]
    auc = f", AUC {ours['auc']:.3f} against {theirs['auc']:.3f}"
    return {"head": head, "with": ours["hit"], "without": theirs["hit"], "of": "users of the temporal test part", "more": auc}


def new_user() -> int:
    """A user whom nobody has seen, not in an earlier demo either."""
    return secrets.randbits(64)


def _anonymous(moment: Moment, user_id: int) -> RankRequest:
    """A logged request, asked now for another user."""
    request = RankRequest()
    request.CopyFrom(moment.request)
    request.user_id, request.request_time_ms = user_id, 0
    return request


def _positive(domain: Domain, ranker: str) -> str:
    return next(name for name, action in domain.seen_actions(ranker).items() if action.kind == "positive")


def _before_and_after(live: Live, moment: Moment) -> list[tuple[int, int, float, float, bool]]:
    """(item, place before, score before, score after, clicked) in the new order: one user, before and after acting on the last item."""
    user_id = new_user()  # a cold start, then one action
    request = _anonymous(moment, user_id)
    before = typed(live.client.call(request))
    chosen = int(before.ids[-1])
    kind = int(before.kinds[-1])
    at = live.producer.produce(user_id=user_id, entity_kind=kind, entity_id=chosen, action=_positive(live.domain, live.ranker)).result()
    request.after.append(WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset))
    after = typed(live.client.call(request))
    places = {int(item): place for place, item in enumerate(before.ids)}
    return [
        (int(item), places[int(item)], float(before.scores[places[int(item)]]), float(score), int(item) == chosen)
        for item, score in zip(after.ids, after.scores, strict=True)
    ]


def _produce_to_changed(live: Live, moments: list[Moment]) -> np.ndarray:
    """Milliseconds from produce() to the answer of a ranking that the action changed, for a new user and action each."""
    action = _positive(live.domain, live.ranker)
    found_ms = []
    for trial, moment in enumerate(moments):
        user_id = new_user()
        request = _anonymous(moment, user_id)
        before = typed(live.client.call(request))
        chosen = np.random.default_rng([SEED, trial]).integers(len(before.ids))
        started = time.perf_counter()
        at = live.producer.produce(
            user_id=user_id, entity_kind=int(before.kinds[chosen]), entity_id=int(before.ids[chosen]), action=action
        ).result()
        request.after.append(WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset))
        after = typed(live.client.call(request))
        elapsed_ms = (time.perf_counter() - started) * 1e3
        if not after.after_reached or np.array_equal(np.sort(before.scores), np.sort(after.scores)):
            raise RuntimeError(f"trial {trial}: the action did not change the ranking (reached: {after.after_reached}, tier {after.tier})")
        found_ms.append(elapsed_ms)
    return np.array(found_ms)


def replay_report(settings: Settings) -> dict[str, Any]:
    """`freshrank replay` in a process of its own: it shares no state with the server."""
    out = settings.home / "demo" / "parity.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(
            [sys.executable, "-m", "deploy.cli", "replay", "--home", str(settings.home), "--json", str(out)],
            check=False,
            stdout=subprocess.DEVNULL,
        )
    report: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return report


def _show(
    console: Console,
    before_after: list[tuple[int, int, float, float, bool]],
    visible_ms: np.ndarray,
    hit: dict[str, Any],
    parity: dict[str, Any],
) -> None:
    table = Table("place", "item", "was at", "score before", "score after", title="One action later: the same candidates for the same user")
    for place, (item, was, score_before, score_after, chosen) in enumerate(before_after[:8]):
        name = f"[bold]{item}[/bold] (acted on)" if chosen else str(item)
        table.add_row(str(place + 1), name, str(was + 1), f"{score_before:.4f}", f"{score_after:.4f}")
    console.print(table)
    median, p99 = np.percentile(visible_ms, (50, 99))
    console.print(f"produce() to a changed ranking: median {median:.0f} ms, p99 {p99:.0f} ms ({len(visible_ms)} trials, each one changed)")
    lift = hit["with"] / hit["without"] - 1 if hit["without"] else float("nan")
    console.print(
        f"HIT@3 ({hit['head']}, {hit['of']}): {hit['with']:.3f} with the realtime sequence, {hit['without']:.3f} without ({lift:+.0%})"
        f"{hit.get('more', '')}"
    )
    console.print(
        f"parity: {parity['rankings_replayed']} rankings replayed, {parity['bytes_different']} bytes different ({parity['verdict']})"
    )

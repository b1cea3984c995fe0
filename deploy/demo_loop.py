"""`freshrank demo --loop`: a model serves, a second one is trained only from what the first one served, and both rank later traffic.

The users are the simulator's, on its own clock: requests and actions carry its times, and the log takes them as append times, so that an
hour's window needs no hour. Users see the first SEEN of the 20 that are ranked; what is below is served, and never seen. One action in ten
has lost its request id.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from rich.console import Console

from deploy.announcing import announce_release
from deploy.demo import SEED, Live, connect, refuse_other_product, replay_report
from deploy.drive import end_of, rank_fresh
from deploy.experiments import announce_experiment, make_experiment
from deploy.label_report import LabelReport
from deploy.labelling import LabelOptions, label
from deploy.learn import Workspace, import_data, judge_trained, now_ms, release, train_ranker
from deploy.processes import kafka_config
from deploy.replay import replay_options
from deploy.settings import Settings
from deploy.simulator import DAY_MS, DAYS, START_MS, SimulatedAction, SimulatedRequest, Simulator
from deploy.stack import Stack, keep_domain
from features.actions import EVENT_DTYPE
from features.domain import Domain, load_domain
from features.erasures import LEDGER
from features.labels import Rules
from features.logs import Served
from inference.client import Ranking, feature_column
from inference.gate import gate_table
from inference.outcomes import Outcome, outcomes_of_log, outcomes_table
from inference.release import Release
from inference.train import TrainOptions
from protos.v1.ranking_pb2 import RankRequest

IMPORTED, SERVED, LATER = 2_000, 5_000, 3_000
"""Requests that the first model learns from, that it serves, and that both serve."""
SEEN = 10
THREADS = 4
WINDOW_MS, GRACE_MS, LATE_MS = 3_600_000, 600_000, DAY_MS
_TRAFFIC_DAYS = 3
SERVED_FROM_MS = START_MS + DAYS * DAY_MS
LATER_FROM_MS = SERVED_FROM_MS + (_TRAFFIC_DAYS + 1) * DAY_MS
"""By the simulator's clock; the traffic of each takes _TRAFFIC_DAYS, and is labelled at the end of the day after."""
_SWITCH_S_MAX = 60.0
_WHO = "freshrank demo --loop"
_TIMEOUT_S = 10.0


def run_loop(settings: Settings, seconds: float, console: Console) -> int:
    """Runs the loop; returns 0 if every list's inputs were proved and a replay found no difference.

    Raises:
        ValueError: a loop ran in this home folder, whose traffic would be served a second time; or it is another product's.
        TrainError: another process trains or releases the ranker in it.
    """
    started_s = time.monotonic()
    if (settings.home / "logs").exists():
        raise ValueError(f"{settings.home}: a loop or a demo ran here; remove the folder, or name another one with --home")
    simulator, data = Simulator(SEED), settings.home / "demo" / "published"
    published = Settings.model_fields["domain"].default
    domain, options = load_domain(published), TrainOptions(seconds_max=seconds, learning_rate=2e-3, batch_rows=256, seed=SEED)
    ranker = domain.ranker_name(None)
    refuse_other_product(domain, settings.home)
    with Workspace(published, settings.home).alone_with(ranker, _WHO):
        settings = settings.model_copy(update={"domain": keep_domain(published, settings.home), "inline_share": 0.01})
        work = Workspace(settings.domain, settings.home)
        simulator.write(data, requests=IMPORTED)
        summary = import_data(work, data, console)
        train_ranker(work, ranker, options)
        incumbent = release(work, ranker)
    first = incumbent.release_id
    console.print(f"[bold]1[/bold]  the first model, from {summary['requests']:,} imported requests: {first}")
    with Stack(settings) as stack:
        live = connect(stack, domain, ranker)
        try:
            traffic = _Traffic(live, simulator)
            count = traffic.run(SERVED, from_ms=SERVED_FROM_MS)
            console.print(f"[bold]2[/bold]  it served {count:,} requests, of each {SEEN} of 20 seen")
            report = _label(stack.settings, domain, until_ms=LATER_FROM_MS)
            console.print("[bold]3[/bold]  labelled:")
            console.print(report.to_text(), markup=False, soft_wrap=True)
            served = replace(work, served=True)
            second = _second(served, ranker, options, incumbent, console)
            console.print(f"[bold]4[/bold]  the second model, from what the first one served alone: {second}")
            _switch(stack.settings, live, ranker, first, second)
            count = traffic.run(LATER, from_ms=LATER_FROM_MS)
            report = _label(stack.settings, domain, until_ms=LATER_FROM_MS + (_TRAFFIC_DAYS + 1) * DAY_MS)
            console.print(f"[bold]5[/bold]  both served {count:,} later requests, half of the users each")
            names = {first: "first", second: "second"}
            compared = compare_arms(domain, ranker, served.log, names, from_ms=LATER_FROM_MS, control="first")
        finally:
            live.producer.close()
            live.client.close()
        parity = replay_report(stack.settings)
    console.print(outcomes_table(compared, "lists of the later requests, by the model that ranked them"))
    console.print(_clicks_say(compared))
    console.print(
        f"parity: {parity['rankings_replayed']} rankings replayed, {parity['bytes_different']} bytes different ({parity['verdict']})"
    )
    console.print(f"loop done in {time.monotonic() - started_s:.0f} s; the served log: {served.log}")
    return 0 if parity["ok"] and report.ok else 1


def _second(served: Workspace, ranker: str, options: TrainOptions, incumbent: Release, console: Console) -> str:
    """Trains on what was served, judges, and releases; returns the release's id."""
    with served.alone_with(ranker, _WHO):
        train_ranker(served, ranker, options)
        verdict = judge_trained(served, ranker, incumbent)
        console.print(gate_table(verdict))
        forced = "" if verdict.passed else "; published all the same, to see what users do"
        console.print(f"gate: {verdict.decision}: {'; '.join(verdict.reasons)}{forced}", markup=False, soft_wrap=True)
        return release(served, ranker, verdict.for_manifest()).release_id


@dataclass(frozen=True)
class _Session:
    """A user's visit: when it begins, milliseconds, and how many requests it has."""

    user_id: int
    from_ms: int
    requests: int


class _Traffic:
    """Users who ask, look at the top, and act on it."""

    def __init__(self, live: Live, simulator: Simulator) -> None:
        self.live, self.simulator = live, simulator
        self._lock = Lock()  # the simulator draws from one generator
        self._random = np.random.default_rng([SEED, 9])
        self._kafka = kafka_config(live.settings)

    def run(self, requests: int, *, from_ms: int) -> int:
        """Sessions within _TRAFFIC_DAYS from a time on, until there are so many requests; returns how many were ranked."""
        random, sessions = self._random, list[_Session]()
        while (left := requests - sum(session.requests for session in sessions)) > 0:
            user_id = int(random.integers(1, self.simulator.users + self.simulator.held_back + 1))
            begin_ms = from_ms + int(random.integers(0, _TRAFFIC_DAYS * DAY_MS - 3_600_000))
            sessions.append(_Session(user_id, begin_ms, min(left, 15, int(random.geometric(0.2)))))
        with ThreadPoolExecutor(THREADS) as threads:
            return sum(threads.map(self._session, sorted(sessions, key=lambda session: session.from_ms)))

    def _session(self, session: _Session) -> int:
        with self._lock:
            user, random = self.simulator.user(session.user_id), np.random.default_rng(self._random.integers(2**32))
        time_ms = session.from_ms
        for _ in range(session.requests):
            with self._lock:
                shown = self.simulator.request(user, time_ms)
            request = RankRequest(
                ranker=self.live.ranker,
                user_id=session.user_id,
                candidate_ids=shown.candidate_ids.astype("<u8").tobytes(),
                request_time_ms=time_ms,
                candidate_features={"retrieval_score": feature_column(shown.retrieval_score.tolist())},
                request_features={"device": feature_column([user.device])},
            )
            partitions = self.live.producer.log_identity.partition_count
            after = end_of(self._kafka, self.live.settings.topic_actions, session.user_id, partitions)
            answer = rank_fresh(self.live.client, request, after, _TIMEOUT_S)
            with self._lock:
                actions = self.simulator.respond(shown)
            self._act(session.user_id, shown, answer, actions, random)
            time_ms += int(random.integers(45_000, 120_000))
        return session.requests

    def _act(
        self, user_id: int, shown: SimulatedRequest, answer: Ranking, actions: list[SimulatedAction], random: np.random.Generator
    ) -> None:
        """Impressions of what was seen, and what the user did with it."""
        seen = answer.ids[:SEEN].tolist()
        done = [SimulatedAction("impression", item, shown.time_ms + 500, float("nan")) for item in seen]
        done += [action for action in actions if action.entity_id in seen]
        domain, events = self.live.domain, np.zeros(len(done), EVENT_DTYPE)
        for event, action in zip(events, done, strict=True):
            event["event_time_ms"], event["event_id"] = action.time_ms, random.integers(1, 2**63)
            event["entity_kind"], event["entity_id"] = domain.entities["item"], action.entity_id
            event["action"], event["value"] = domain.actions[action.action].id, action.value
            event["surface"] = domain.surfaces[shown.surface]
            is_lost = action.action != "impression" and random.random() < 0.1
            event["request_id"] = 0 if is_lost else answer.request_id
        self.live.producer.produce_many(np.full(len(done), user_id, np.uint64), events, events["event_time_ms"] + 1)
        self.live.producer.flush()


def _label(settings: Settings, domain: Domain, *, until_ms: int) -> LabelReport:
    options = LabelOptions(
        replay=replay_options(settings, None, ""),
        domain=domain,
        rules=Rules.of(domain, window_ms=WINDOW_MS, grace_ms=GRACE_MS, late_ms=LATE_MS),
        out=Workspace(settings.domain, settings.home, served=True).log,
        until_ms=until_ms,
        ledger=settings.home / LEDGER,
    )
    return label(options)


def _switch(settings: Settings, live: Live, ranker: str, first: str, second: str) -> None:
    """Serves the second release, and the first one to half of the users; comes back when both answer."""
    announce_release(settings, ranker, second, now_ms())
    announce_experiment(settings, ranker, make_experiment(ranker, "loop", [f"first={first}:50%"], [], now_ms()))
    deadline_s = time.monotonic() + _SWITCH_S_MAX
    found: set[str] = set()
    while not {first, second} <= found:
        if time.monotonic() > deadline_s:
            raise RuntimeError(
                f"within {_SWITCH_S_MAX:.0f} s only {sorted(found)} answered, not {first} and {second}; see the servers' logs"
            )
        # Of users whom nobody has seen, at a time from before all others: these lists are in no day that is compared.
        asked = [live.client.rank(ranker, 2**40 + user, [1, 2], kinds=1, request_time_ms=START_MS) for user in range(16)]
        found = {answer.release_id for answer in asked}


def compare_arms(domain: Domain, ranker: str, log: Path, names: Mapping[str, str], *, from_ms: int, control: str) -> list[Outcome]:
    """What users did with each release's lists; `names`: what a release is called."""

    def arms_of(served: Served) -> tuple[Any, Any]:
        releases = served.column("release_id").tolist()
        called = np.array([names.get(release_id, "") for release_id in releases], object)
        return called, called != ""

    return outcomes_of_log(domain, ranker, log, arms_of, from_ms=from_ms, control=control)


def _clicks_say(found: list[Outcome]) -> str:
    """What may be concluded of the second arm against the first, the control."""
    _, low, high = found[-1].differences["click"]
    better = found[-1].arm if low > 0 else found[0].arm if high < 0 else None
    return "no difference of clicks is shown" if better is None else f"users click more on the lists of the {better} model"

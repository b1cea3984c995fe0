"""One tick of the loop that learns from what was served: label, look after a running canary, train, gate, publish, start a canary.

A scheduler calls it again and again (`freshrank cycle`); it never waits for traffic. What a tick leaves for the next one stands in
`<home>/cycle/<ranker>.json`, replaced before and behind whatever others see, so that a tick that was killed is made good by the next.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.announcing import announce_release, announced, releases_of
from deploy.experiments import announce_experiment, announced_experiments, make_experiment
from deploy.label_report import LabelReport
from deploy.learn import Workspace, continue_ranker, judge_trained, release, train_ranker
from deploy.settings import Settings
from features.domain import DAY_MS
from features.logs import Served, is_served_log
from features.tensors import tensor_fingerprint
from inference.announced import options as servable
from inference.gate import Limits
from inference.outcomes import GO_ON, PROMOTE, Outcome, decide, outcomes_of_log
from inference.release import Release, open_release, release_folder
from inference.served_examples import served_requests
from inference.train import TrainOptions

NOTHING, STARTED, WAITING, PROMOTED, STOPPED, REFUSED = (
    "nothing to do",
    "canary started",
    "canary goes on",
    "promoted",
    "stopped",
    "refused",
)
PUBLISHED = "published"
CANARY = "canary"
HOUR_MS = 3_600_000
_SILENT_TIMES = 3
"""A canary without a labelled list is stopped after so many times its least time."""


class CycleError(ValueError):
    """A tick that cannot go on; says what to do."""


@dataclass(frozen=True)
class CycleOptions:
    """How a tick decides.

    canary_percent: share of the users who get a new release first; 0: it is served to everybody at once. canary_ms_min, lists_min,
    users_min: how long, and of how many lists and users in each arm, before it is promoted. requests_min: newly served requests that a
    training needs. full_every_ms: time between trainings from scratch, with new embeddings. days: as for `continue_ranker`.
    """

    train: TrainOptions
    limits: Limits
    canary_percent: float = 5.0
    canary_ms_min: int = DAY_MS
    lists_min: int = 1_000
    users_min: int = 200
    requests_min: int = 5_000
    full_every_ms: int = 7 * DAY_MS
    days: int = 14
    force: bool = False


@dataclass(frozen=True)
class Ticked:
    """What a tick did: one of the constants above, why, and what is known of the arms."""

    what: str
    why: str
    arms: tuple[Outcome, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether a new model was turned down."""
        return self.what in (REFUSED, STOPPED)


@dataclass
class State:
    """What stays from tick to tick.

    release_id, incumbent, experiment: the canary, what the others are served, and the name of its experiment ("": none runs); announced:
    whether servers were told; since_ms: since when. full_ms: time of the last training from scratch. tried_until_ms: newest request of the
    last training: what was refused is not trained on again before there is more.
    """

    release_id: str = ""
    incumbent: str = ""
    experiment: str = ""
    announced: bool = False
    since_ms: int = 0
    full_ms: int = 0
    tried_until_ms: int = 0


class Cycle:
    """The loop of one ranker. `settings`: of the running stack; `work`: its served log; `label`: makes a labelling pass."""

    def __init__(
        self,
        settings: Settings,
        work: Workspace,
        ranker: str,
        options: CycleOptions,
        label: Callable[[], LabelReport],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._work, self._ranker, self._options, self._label, self._say = settings, work, ranker, options, label, say
        self._path = settings.home / "cycle" / f"{ranker}.json"

    def tick(self, now_ms: int) -> Ticked:
        """One tick at a time.

        Raises:
            CycleError: another tick runs, labelling found something to look at, or no release is served yet.
            TrainError, DatasetError, ReleaseError, StreamError: see there.
        """
        with self._alone():
            report = self._label()
            self._say(report.to_text())
            state = self._read()
            found = self._look_after_canary(state, now_ms)  # first: what is wrong with labels may be the canary's doing
            if found is not None:
                return found
            if not report.ok and not self._options.force:
                raise CycleError("label: something must be looked at (see above) before anything is trained; --force goes on with the rest")
            return self._train(state, now_ms)

    def _look_after_canary(self, state: State, now_ms: int) -> Ticked | None:
        """None: no canary runs any more, and another one may."""
        running = announced_experiments(self._settings).get(self._ranker)
        if running is not None and running.name != state.experiment:
            return Ticked(NOTHING, f"another experiment of the ranker runs: {running.name}; stop it first")
        if not state.experiment:
            return None
        served = self._incumbent().release_id
        if served == state.release_id:  # by a tick that was cut off, or by somebody
            return self._end(state, PROMOTED, f"{served} is served to everybody")
        if served != state.incumbent:
            return self._end(state, STOPPED, f"{state.release_id}: the served release has changed, to {served}")
        if running is None and state.announced:
            self._say(f"canary {state.experiment} was stopped by somebody")
            self._forget_canary(state)
            return None
        if running is None:
            self._announce_canary(state, now_ms)
            return Ticked(STARTED, f"{state.release_id}: the last tick was cut off before it")
        if not state.announced:
            state.announced = True
            self._write(state)
        arms = self._outcomes(state)
        found = {one.arm: one for one in arms}
        canary = found.get(CANARY)
        if canary is None:
            if now_ms - state.since_ms >= _SILENT_TIMES * max(self._options.canary_ms_min, HOUR_MS):
                return self._end(state, STOPPED, f"{state.release_id}: no list of it is labelled; was it ever loaded?")
            return Ticked(WAITING, "no list of the canary is labelled yet", arms)
        decision, why = decide(canary, found[""], self._utilities(), lists_min=self._options.lists_min, users_min=self._options.users_min)
        if decision == PROMOTE and now_ms - state.since_ms < self._options.canary_ms_min:
            decision, why = GO_ON, f"{(now_ms - state.since_ms) / 3_600_000:.1f} of {self._options.canary_ms_min / 3_600_000:.1f} hours"
        if decision == GO_ON:
            return Ticked(WAITING, why, arms)
        if decision == PROMOTE:
            announce_release(self._settings, self._ranker, state.release_id, now_ms)
        return self._end(state, PROMOTED if decision == PROMOTE else STOPPED, f"{state.release_id}: {why}", arms)

    def _end(self, state: State, what: str, why: str, arms: tuple[Outcome, ...] = ()) -> Ticked:
        """The canary is over."""
        announce_experiment(self._settings, self._ranker, None)
        self._forget_canary(state)
        return Ticked(what, why, arms)

    def _forget_canary(self, state: State) -> None:
        self._write(State(full_ms=state.full_ms, tried_until_ms=state.tried_until_ms))

    def _train(self, state: State, now_ms: int) -> Ticked:
        options, work = self._options, self._work
        incumbent = self._incumbent()
        before_ms = incumbent.manifest.get("trained", {}).get("before_ms")
        times = self._request_times()
        new = int((times > max(before_ms or 0, state.tried_until_ms)).sum())
        if new < options.requests_min:
            return Ticked(NOTHING, f"{new} requests are new; a training needs {options.requests_min}")
        same_model = incumbent.manifest["tensor_fingerprint"] == tensor_fingerprint(work.domain, self._ranker)
        state.full_ms = state.full_ms or incumbent.created_ms
        due = now_ms - state.full_ms >= options.full_every_ms
        scratch = before_ms is None or not same_model or due
        with work.alone_with(self._ranker, "freshrank cycle"):
            if scratch:
                self._say("train from scratch")
                train_ranker(work, self._ranker, options.train, since_ms=before_ms or 0)
            else:
                self._say(f"train on from {incumbent.release_id}")
                continue_ranker(work, self._ranker, incumbent, options.train, days=options.days)
            state.tried_until_ms = int(times.max())
            self._write(state)
            verdict = judge_trained(work, self._ranker, incumbent, options.limits)
            why = "; ".join(verdict.reasons)
            if not verdict.passed and not options.force:
                return Ticked(REFUSED, f"gate: {verdict.decision}: {why}")
            written = release(work, self._ranker, verdict.for_manifest(), only=True)
        if scratch:
            state.full_ms = now_ms
            self._write(state)
        if not options.canary_percent:
            announce_release(self._settings, self._ranker, written.release_id, now_ms)
            return Ticked(PUBLISHED, f"{written.release_id}: {why}")
        state.release_id, state.experiment = written.release_id, f"cycle-{written.created_ms}"
        state.incumbent = incumbent.release_id
        self._announce_canary(state, now_ms)
        return Ticked(STARTED, f"{written.release_id}: {why}")

    def _announce_canary(self, state: State, now_ms: int) -> None:
        state.since_ms, state.announced = now_ms, False
        self._write(state)  # before anybody is told: the next tick knows whose experiment it is
        arm = f"{CANARY}={state.release_id}:{self._options.canary_percent:g}%"
        announce_experiment(self._settings, self._ranker, make_experiment(self._ranker, state.experiment, [arm], (), now_ms))
        state.announced = True
        self._write(state)

    def _incumbent(self) -> Release:
        said = releases_of(announced(self._settings))
        served = servable(self._work.releases, said).get(self._ranker)
        if not served:
            raise CycleError(f"nothing of {self._ranker} is served yet: `freshrank train` and `freshrank publish` make the first release")
        return open_release(release_folder(self._work.releases, served[0].release_id))

    def _request_times(self) -> Any:
        log = self._work.log
        if not is_served_log(log):
            return np.zeros(0, np.int64)
        times = [batch.request_time_ms for batch in served_requests(self._work.domain, self._ranker, log, self._work.erased)]
        return np.concatenate([np.zeros(0, np.int64), *times])

    def _utilities(self) -> dict[str, float]:
        return {name: head.utility for name, head in self._work.domain.ranker[self._ranker].heads.items()}

    def _outcomes(self, state: State) -> tuple[Outcome, ...]:
        """Of the lists that were served in the experiment, each from the release that its arm should have."""

        def arms_of(served: Served) -> tuple[Any, Any]:
            arm = np.asarray(served.column("arm"))
            release_id = np.where(arm == CANARY, state.release_id, state.incumbent)
            return arm, (served.column("experiment") == state.experiment) & (served.column("release_id") == release_id)

        return tuple(outcomes_of_log(self._work.domain, self._ranker, self._work.log, arms_of))

    def _read(self) -> State:
        try:
            return State(**json.loads(self._path.read_text("utf-8")))
        except FileNotFoundError:
            return State()
        except (ValueError, TypeError) as error:
            raise CycleError(f"{self._path}: {error}; remove it, and stop a canary that runs with `freshrank experiment stop`") from error

    def _write(self, state: State) -> None:
        partial = self._path.with_suffix(".part")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(state), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with Path(self._path.parent, f"{self._ranker}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CycleError("another tick of this ranker's cycle is under way") from error
            yield

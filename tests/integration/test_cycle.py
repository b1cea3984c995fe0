"""The loop's ticks over a served log: what each one does, what the next one finds, and what a tick that was cut off leaves.

Real training, gate, releases and served log; announcements are kept in memory (test_experiments.py and test_releases.py have real ones).
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from test_training import CLICK, DOMAIN, DOMAIN_TEXT, OPTIONS, SHOWN, START_MS, Log, intent_log

import deploy.cycle as cycle
from deploy.cycle import NOTHING, PROMOTED, PUBLISHED, REFUSED, STARTED, STOPPED, WAITING, Cycle, CycleError, CycleOptions
from deploy.label_report import LabelReport
from deploy.learn import Workspace, continue_ranker, judge_trained, release, train_ranker
from deploy.settings import Settings
from features.actions import EVENT_DTYPE
from features.domain import DAY_MS
from features.logs import ACTIONS, IMPRESSIONS, SERVED, LogWriter, actions_schema, impressions_schema, served_schema, write_summary
from features.sequence import NEVER_ERASED, definition, law
from features.tables import generation_names
from inference.checkpoints import TrainError
from inference.gate import Limits
from protos.v1.ranking_pb2 import Experiment, ReleaseAnnouncement

NOW_MS = START_MS + 100 * DAY_MS
LATER_MS = 4_102_444_800_000  # 2100: behind the time that releases of the test are made at
OPTIONS_OF_CYCLE = CycleOptions(
    train=replace(OPTIONS, epochs=1, learning_rate=1e-3),
    limits=Limits(requests_min=50, positives_min=20, auc_loss_max=0.05),
    lists_min=100,
    users_min=20,
    requests_min=200,
    full_every_ms=1000 * DAY_MS,
)


class World:
    """A home folder with a served log, and what is announced."""

    def __init__(self, home, log: Log) -> None:
        self.home, self.log = home, log
        self.work = Workspace(home / "toy.toml", home, served=True)
        self.work.domain_path.write_text(DOMAIN_TEXT)
        self.arms: dict[int, tuple[str, str, str]] = {}
        """(experiment, arm, release) of a request; those that are not named were served by the first release in no experiment."""
        self.released: list[str] = []
        self.experiment = None
        self.report = LabelReport()
        self.cut = ""

    def write(self, requests: int) -> None:
        """The served log of the first requests."""
        what = definition(DOMAIN, "main")
        wanted = sorted({row["request_id"]: row["request_time_ms"] for row in self.log.impressions}.items(), key=lambda item: item[1])
        chosen = dict(wanted[:requests])
        until_ms = max(chosen.values())
        impressions = [{**row, "seen": True} for row in self.log.impressions if row["request_id"] in chosen]
        user_of = {row["request_id"]: row["user_id"] for row in impressions}
        actions = sorted((row for row in self.log.actions if row["append_time_ms"] <= until_ms), key=lambda row: row["append_time_ms"])
        by_user: dict[int, list[dict[str, object]]] = {}
        for row in actions:
            by_user.setdefault(row["user_id"], []).append(row)
        served = []
        for request_id, time_ms in chosen.items():
            experiment, arm, release_id = self.arms.get(request_id, ("", "", "first"))
            past = [row for row in by_user[user_of[request_id]] if row["append_time_ms"] < time_ms and row["action"] != SHOWN]
            served.append(self._served(request_id, user_of[request_id], time_ms, experiment, arm, release_id, law(what, events_of(past))))
        folder = self.work.log
        actions = [{**row, "partition": 0, "offset": offset} for offset, row in enumerate(actions)]
        ordered = sorted(impressions, key=lambda row: (row["request_time_ms"], row["request_id"]))
        name = f"{requests:06d}.parquet"
        parts = {}
        for table, rows, schema in (
            (ACTIONS, actions, actions_schema(DOMAIN, order="offset")),
            (IMPRESSIONS, ordered, impressions_schema(DOMAIN, served=True)),
            (SERVED, served, served_schema(DOMAIN)),
        ):
            parts[table] = [f"{table.removesuffix('.parquet')}-{name}"]
            with LogWriter(folder, parts[table][0], schema) as writer:
                writer.write(pa.Table.from_pylist(rows, schema=schema))
        write_summary(folder, {"parts": parts, "label": {"has_seen": True}})

    @staticmethod
    def _served(request_id, user, time_ms, experiment, arm, release_id, events):
        return {
            "request_id": request_id,
            "user_id": user,
            "request_time_ms": time_ms,
            "served_time_ms": time_ms,
            "ranker": "home",
            "release_id": release_id,
            "generations": "{}",
            "tier": 1,
            "sequence_source": 1,
            "experiment": experiment,
            "arm": arm,
            "shuffle_bound": 0,
            "who": [user],
            "log_epoch": [1],
            "offset_read": [0],
            "row_digest": 0,
            "digest": b"",
            "events": events.tobytes(),
            "erased_before_ms": NEVER_ERASED,
            "labels": 0,
        }

    def tick(self, now_ms: int = NOW_MS, **changes):
        options = replace(OPTIONS_OF_CYCLE, **changes)
        one = Cycle(Settings(home=self.home, domain=self.work.domain_path), self.work, "home", options, label=lambda: self.report)
        return one.tick(now_ms)

    # What deploy.cycle asks of Kafka.
    def announced(self, _):
        if not self.released:
            return {}
        return {
            "release/home": ReleaseAnnouncement(ranker="home", release_id=self.released[-1], announced_time_ms=LATER_MS).SerializeToString()
        }

    def announce_release(self, _, ranker, release_id, _now_ms):
        assert ranker == "home"
        self.released.append(release_id)
        self._cut("released")

    def experiments(self, _):
        return {} if self.experiment is None else {"home": self.experiment}

    def announce_experiment(self, _, ranker, experiment):
        assert ranker == "home"
        self._cut("before the experiment")
        self.experiment = experiment
        self._cut("behind the experiment")

    def _cut(self, where):
        if self.cut == where:
            self.cut = ""
            raise KeyboardInterrupt(where)


def events_of(rows):
    events = np.zeros(len(rows), EVENT_DTYPE)
    for i, row in enumerate(rows):
        for name in EVENT_DTYPE.names:
            events[name][i] = row[name]
    return events


@pytest.fixture(scope="module")
def first_home(tmp_path_factory):
    """A home folder whose first release was trained on the first 400 of 2,000 served requests."""
    world = World(tmp_path_factory.mktemp("first"), intent_log(users=200))
    world.write(400)
    train_ranker(world.work, "home", OPTIONS)
    release(world.work, "home")
    return world.home


@pytest.fixture
def world(first_home, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(first_home, home)
    world = World(home, intent_log(users=200))
    for name, fake in (
        ("announced", world.announced),
        ("announce_release", world.announce_release),
        ("announced_experiments", world.experiments),
        ("announce_experiment", world.announce_experiment),
    ):
        monkeypatch.setattr(cycle, name, fake)
    return world


def in_experiment(world, *, clicks: float) -> None:
    """The later requests were served in the experiment; the canary's users clicked `clicks` times as often."""
    random = np.random.default_rng(3)
    state = json.loads((world.home / "cycle" / "home.json").read_text())
    for row in world.log.impressions[400 * 8 :]:
        canary = row["user_id"] % 2 == 0
        world.arms[row["request_id"]] = (state["experiment"], *(("canary", state["release_id"]) if canary else ("", state["incumbent"])))
        if canary and random.random() > clicks:
            row["labels"] = []
        if canary and clicks > 1 and not row["labels"] and random.random() < 0.2:
            row["labels"] = [CLICK]


def started(world):
    world.write(900)
    found = world.tick()
    assert found.what == STARTED, found
    return json.loads((world.home / "cycle" / "home.json").read_text())["release_id"]


def test_little_that_is_new_is_nothing_to_do(world):
    world.write(410)
    found = world.tick()
    assert (found.what, found.refused) == (NOTHING, False)
    assert "a training needs 200" in found.why


def test_a_new_model_passes_the_gate_and_becomes_a_canary(world):
    canary = started(world)
    assert world.experiment.arms[0].release_id == canary
    assert world.experiment.arms[0].share == 500
    assert world.released == [], "the others are served what was served before"
    manifest = json.loads((world.home / "releases" / canary / "manifest.json").read_text())
    assert manifest["only"]
    assert manifest["trained"]["gate"]["decision"] == "passed"
    assert world.tick().what == WAITING, "no list of it is labelled yet"


@pytest.mark.parametrize(("clicks", "what"), [(1.5, PROMOTED), (0.3, STOPPED)])
def test_what_its_users_do_decides(world, clicks, what):
    canary = started(world)
    in_experiment(world, clicks=clicks)
    world.write(2000)
    if what == PROMOTED:
        assert world.tick(NOW_MS + DAY_MS // 2).what == WAITING, "its time is not over"
    found = world.tick(NOW_MS + DAY_MS)
    assert found.what == what, found
    assert world.experiment is None
    assert world.released == ([canary] if what == PROMOTED else [])
    assert {arm.arm: arm.lists > 100 for arm in found.arms} == {"": True, "canary": True}
    assert world.tick(NOW_MS + DAY_MS, requests_min=5_000).what == NOTHING
    assert found.refused == (what == STOPPED)


@pytest.mark.parametrize("cut", ["before the experiment", "behind the experiment"])
def test_a_tick_that_was_cut_off_is_made_good(world, cut):
    world.write(900)
    world.cut = cut
    with pytest.raises(KeyboardInterrupt):
        world.tick()
    found = world.tick(NOW_MS + 1)
    assert found.what == (STARTED if cut.startswith("before") else WAITING), found
    canary = json.loads((world.home / "cycle" / "home.json").read_text())["release_id"]
    assert [arm.release_id for arm in world.experiment.arms] == [canary]
    assert len(list((world.home / "releases").glob("*/manifest.json"))) == 2, "trained once"


def test_a_promotion_that_was_cut_off_is_made_good(world):
    canary = started(world)
    in_experiment(world, clicks=1.5)
    world.write(2000)
    world.cut = "released"
    with pytest.raises(KeyboardInterrupt):
        world.tick(NOW_MS + DAY_MS)
    assert world.tick(NOW_MS + DAY_MS).what == PROMOTED
    assert world.released == [canary]
    assert world.experiment is None


def test_what_is_worse_or_cannot_be_judged_is_refused(world):
    world.write(900)
    found = world.tick(limits=Limits(requests_min=10**6))
    assert (found.what, found.refused) == (REFUSED, True)
    assert len(list((world.home / "releases").glob("*/manifest.json"))) == 1
    assert world.tick(limits=Limits(requests_min=10**6)).what == NOTHING, "not trained again on the same"


def test_without_a_canary_it_is_served_to_everybody(world):
    world.write(900)
    assert world.tick(canary_percent=0).what == PUBLISHED
    assert len(world.released) == 1
    assert world.experiment is None


def test_somebody_else_s_experiment_is_left_alone(world):
    world.write(900)
    world.experiment = Experiment(ranker="home", name="theirs")
    found = world.tick()
    assert found.what == NOTHING
    assert "theirs" in found.why


def test_a_canary_that_somebody_stopped_is_over(world):
    started(world)
    world.experiment = None
    assert world.tick().what == NOTHING
    assert json.loads((world.home / "cycle" / "home.json").read_text())["experiment"] == ""


def test_a_faulty_label_pass_ends_the_tick_and_two_ticks_never_run_at_once(world):
    world.write(900)
    world.report = LabelReport(differs=1, unproved=1)
    with pytest.raises(CycleError, match="label"):
        world.tick()
    one = Cycle(Settings(home=world.home, domain=world.work.domain_path), world.work, "home", OPTIONS_OF_CYCLE, label=world.tick)
    with pytest.raises(CycleError, match="another tick"):
        one.tick(NOW_MS)


def test_a_training_that_is_in_use_is_left_alone_until_the_release_is_made(world, monkeypatch):
    world.write(900)
    with world.work.alone_with("home", "freshrank train"), pytest.raises(TrainError, match="in use by `freshrank train`"):
        world.tick()

    def judged(*arguments):
        with pytest.raises(TrainError, match="in use by `freshrank cycle`"), world.work.alone_with("home", "freshrank train"):
            pass
        return judge_trained(*arguments)

    monkeypatch.setattr(cycle, "judge_trained", judged)
    assert world.tick().what == STARTED


def state_of(world):
    return json.loads((world.home / "cycle" / "home.json").read_text())


def test_a_due_training_starts_from_scratch_and_the_next_one_goes_on(world):
    world.write(900)
    tables = {path.name for path in (world.home / "tables").glob("*/*")}
    assert world.tick(LATER_MS, full_every_ms=DAY_MS, canary_percent=0, force=True).what == PUBLISHED
    with_new = {path.name for path in (world.home / "tables").glob("*/*")}
    assert with_new > tables, "with new embeddings"
    assert state_of(world)["full_ms"] == LATER_MS
    world.released.clear()  # the release of the test's clock
    world.write(2000)
    assert world.tick(LATER_MS + 1, full_every_ms=DAY_MS, force=True).what == STARTED
    assert {path.name for path in (world.home / "tables").glob("*/*")} == with_new


def test_the_time_of_the_first_release_counts_until_there_was_a_whole_training(world):
    world.write(900)
    world.tick(limits=Limits(requests_min=10**6))
    (first,) = (world.home / "releases").glob("*/manifest.json")
    assert state_of(world)["full_ms"] == json.loads(first.read_text())["created_ms"]


def test_a_canary_that_is_served_already_is_promoted(world):
    canary = started(world)
    in_experiment(world, clicks=0.3)  # what its users do does not matter any more
    world.write(2000)
    world.released.append(canary)
    assert world.tick(NOW_MS + 1).what == PROMOTED
    assert world.experiment is None


def test_a_canary_whose_rival_has_changed_is_stopped(world):
    started(world)
    other = release(world.work, "home")  # somebody publishes
    world.released.append(other.release_id)
    found = world.tick(NOW_MS + 1)
    assert found.what == STOPPED
    assert "has changed" in found.why
    assert world.experiment is None


def test_a_canary_that_nobody_ever_got_is_stopped_in_the_end(world):
    started(world)
    assert world.tick(NOW_MS + 2 * DAY_MS).what == WAITING
    assert world.tick(NOW_MS + 3 * DAY_MS).what == STOPPED


def test_faulty_labels_do_not_keep_a_bad_canary_alive(world):
    started(world)
    in_experiment(world, clicks=0.2)
    world.write(2000)
    world.report = LabelReport(differs=1, unproved=1)
    found = world.tick(NOW_MS + DAY_MS)
    assert found.what == STOPPED, found


def test_served_requests_are_trained_on_with_the_vectors_that_they_were_served_with(tmp_path):
    """Of a ranker with `refresh` the hours' vectors are those of `freshrank refresh`: a training makes no others behind them."""
    world = World(tmp_path, intent_log(users=60))
    refreshed = DOMAIN_TEXT.replace('user_space = "items"', 'user_space = "items"\nrefresh = {}')
    world.work.domain_path.write_text(refreshed)
    world.write(300)
    train_ranker(world.work, "home", replace(OPTIONS, epochs=1))
    first = release(world.work, "home")
    there = generation_names(world.work.tables, "items")
    world.write(600)
    assert continue_ranker(world.work, "home", first, replace(OPTIONS, epochs=1)).generations["items"] == there[-1]
    assert generation_names(world.work.tables, "items") == there

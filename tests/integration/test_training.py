"""From a canonical log to trained weights: what a request may see, embeddings, training, resume, evaluation."""

import asyncio
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from plain_inputs import plain_inputs

from deploy.learn import Workspace, evaluate_ranker, import_data, release, train_ranker, train_without_sequence
from deploy.simulator import Simulator
from features.domain import parse_domain
from features.erasures import LEDGER, Erasure, append_lines
from features.logs import ACTIONS, IMPRESSIONS, LogWriter, actions_schema, impressions_schema, read_actions, read_requests
from features.pack import Packer
from features.sequence import NEVER_ERASED, definition, law
from features.tables import USER, Member, TableSet, generation_names, item_member, open_generation, write_generation
from inference.dataset import Dataset, History, build_dataset, split_times
from inference.embeddings import EmbeddingError, publish_embeddings
from inference.evaluate import comparison_table, evaluate
from inference.metrics import auc
from inference.release import ReleaseError
from inference.served import Releases
from inference.train import TrainError, TrainOptions, learning_rate, load_trained, predict, train
from inference.triton import TritonModels

DOMAIN_TEXT = """
name = "toy"
[entities]
video = 1
[actions]
shown = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
hide = { id = 3, kind = "negative" }
[sequence.main]
id = 1
length = 8
caps = { hide = 2 }
[features]
score = { side = "candidate", kind = "number", normalise = "standard" }
labels_of_item = { side = "candidate", kind = "list", hash_buckets = 16, length_max = 2 }
hour = { side = "request", kind = "category", hash_buckets = 8, dimension = 2 }
[ranker.home]
sequence = "main"
sequence_length = 8
sequence_actions = ["click", "hide"]
item_space = "items"
user_space = "items"
embedding_dimension = 8
features = ["score", "labels_of_item", "hour"]
model = { action_dimension = 4, feedforward = 8, first_k = 3, hidden = [16], cross_rank = 8, time_window_hours_max = 0.02 }
heads.click = { actions = ["click"], weights = { click = 3.0, hide = 0.5 }, base_weight = 1.5 }
heads.hide = { actions = ["hide"] }
"""
DOMAIN = parse_domain(DOMAIN_TEXT, source="toy")
START_MS = 1_700_000_000_000
SHOWN, CLICK, HIDE = 1, 2, 3
OPTIONS = TrainOptions(epochs=4, batch_rows=256, seed=3, threads=1, patience=4, learning_rate=5e-3, progress=False)


@dataclass
class Log:
    """Rows of a log in the making."""

    actions: list[dict[str, int]] = field(default_factory=list)
    impressions: list[dict[str, object]] = field(default_factory=list)
    requests: int = 0

    def act(self, user: int, item: int, action: int, time_ms: int, *, append_ms: int | None = None, erase: bool = False) -> None:
        append_ms = time_ms if append_ms is None else append_ms
        self.actions.append(
            {
                "user_id": user,
                "entity_kind": 0 if erase else 1,
                "entity_id": item,
                "action": 0 if erase else action,
                "event_time_ms": 0 if erase else time_ms,
                "event_id": len(self.actions) + 1,
                "request_id": 0,
                "surface": 0,
                "value": float("nan"),
                "append_time_ms": append_ms,
                "log_epoch": 0,
                "partition": -1,
                "offset": -1,
                "erase": erase,
            }
        )

    def request(self, user: int, time_ms: int, answers: dict[int, list[int]]) -> None:
        self.requests += 1
        for position, (item, labels) in enumerate(answers.items()):
            self.impressions.append(
                {
                    "request_id": self.requests,
                    "user_id": user,
                    "request_time_ms": time_ms,
                    "position": position,
                    "surface": 0,
                    "entity_kind": 1,
                    "entity_id": item,
                    "labels": labels,
                    "score": float(item % 5),
                    "labels_of_item": [item] * (item % 3),
                    "hour": time_ms // 3_600_000 % 24 + 1,
                }
            )

    def write(self, folder: Path) -> Path:
        for name, rows, schema, keys in (
            (ACTIONS, self.actions, actions_schema(DOMAIN), ("append_time_ms",)),
            (IMPRESSIONS, self.impressions, impressions_schema(DOMAIN), ("request_time_ms", "request_id")),
        ):
            ordered = sorted(rows, key=lambda row, keys=keys: tuple(row[key] for key in keys))  # type: ignore[misc]
            with LogWriter(folder, name, schema) as writer:
                writer.write(pa.Table.from_pylist(ordered, schema=schema))
        return folder


def intent_log(*, users: int = 80, requests: int = 10, seed: int = 0) -> Log:
    """Users with an intent, one of two halves of the items, that changes now and then: only the latest clicks tell it."""
    random = np.random.default_rng(seed)
    log = Log()
    moments = sorted(
        (START_MS + int(t), user) for user in range(users) for t in random.uniform(0, 4e8) + np.cumsum(random.uniform(5e4, 2e5, requests))
    )
    intent = random.integers(0, 2, users)
    for time_ms, user in moments:
        if random.random() < 0.1:
            intent[user] = 1 - intent[user]
        answers: dict[int, list[int]] = {}
        for delay, item in enumerate(random.choice(40, 8, replace=False).tolist()):
            clicked = random.random() < (0.75 if item % 2 == intent[user] else 0.08)
            answers[item] = [CLICK] if clicked else []
            log.act(user, item, SHOWN, time_ms + delay)
            if clicked:
                log.act(user, item, CLICK, time_ms + 1000 + delay)
        log.request(user, time_ms, answers)
    return log


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A log with embeddings: (log, tables)."""
    folder = tmp_path_factory.mktemp("world")
    log = intent_log().write(folder / "log")
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    publish_embeddings(DOMAIN, "home", log, folder / "tables", until_ms=validation_ms)
    return log, folder / "tables"


def sequence_of(dataset: Dataset, request: int) -> dict[str, list[object]]:
    low, high = dataset.sequence_starts[request : request + 2]
    return {name: values[low:high].tolist() for name, values in dataset.of_sequence.items()}


def test_a_future_event_is_invisible(tmp_path: Path, world: tuple[Path, Path]) -> None:
    now = START_MS + 1_000_000

    def packed(name: str, *planted: dict[str, int]) -> dict[str, list[object]]:
        log = Log()
        log.act(7, 1, CLICK, now - 5000)
        log.act(7, 2, HIDE, now - 4000)
        log.request(7, now, {3: [CLICK], 4: []})
        for event in planted:
            log.act(7, 5, CLICK, **event)
        dataset, _ = build_dataset(DOMAIN, "home", log.write(tmp_path / name), world[1])
        return sequence_of(dataset, 0)

    alone = packed("alone")
    assert alone["sequence_action"] == [HIDE, CLICK]
    assert alone["sequence_age_ms"] == [4000, 5000]
    future = {"time_ms": now + 10, "append_ms": now + 10}
    appended_late = {"time_ms": now - 4500, "append_ms": now + 1}
    same_millisecond = {"time_ms": now - 4500, "append_ms": now}
    assert packed("future", future, appended_late, same_millisecond) == alone
    just_before = packed("before", {"time_ms": now - 4500, "append_ms": now - 1})
    assert just_before["sequence_age_ms"] == [4000, 4500, 5000]


def test_history_is_the_law_over_what_was_appended_before(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    log = Log()
    for _ in range(300):
        append_ms = START_MS + int(random.integers(0, 1000))
        late_ms = int(random.integers(0, 200))
        action = int(random.choice([SHOWN, CLICK, HIDE]))
        log.act(int(random.integers(0, 3)), int(random.integers(0, 9)), action, append_ms - late_ms, append_ms=append_ms)
    folder = log.write(tmp_path)
    records = next(iter(read_actions(folder, DOMAIN)))
    what = definition(DOMAIN, "main")
    history = History(DOMAIN, "home", folder)
    for moment in range(START_MS, START_MS + 1001, 50):
        for user in range(3):
            visible = (records.users == user) & (records.append_time_ms < moment)
            assert history.before(user, moment)[0].tobytes() == law(what, records.events[visible]).tobytes()
    assert history.before(99, START_MS)[1] == NEVER_ERASED
    with pytest.raises(ValueError, match="later moment"):
        history.before(0, START_MS)


def test_an_erased_user_starts_again(tmp_path: Path) -> None:
    log = Log()
    log.act(1, 1, CLICK, START_MS)
    log.act(1, 0, 0, 0, append_ms=START_MS + 100, erase=True)
    log.act(1, 2, CLICK, START_MS + 50, append_ms=START_MS + 150)  # arrives late: its event time is before the erasure
    log.act(1, 3, CLICK, START_MS + 160)
    log.request(1, START_MS + 99, {5: []})
    history = History(DOMAIN, "home", log.write(tmp_path / "log"))
    assert history.before(1, START_MS + 100)[0]["entity_id"].tolist() == [1]
    assert history.before(1, START_MS + 155)[0]["entity_id"].tolist() == []
    assert history.before(1, START_MS + 200)[0]["entity_id"].tolist() == [3]

    publish_embeddings(DOMAIN, "home", tmp_path / "log", tmp_path / "tables", until_ms=START_MS + 200, snapshots=1)
    assert open_generation(tmp_path / "tables", "items").ids(item_member("video")).tolist() == [3]
    with pytest.raises(EmbeddingError, match="no positive action"):
        publish_embeddings(DOMAIN, "home", tmp_path / "log", tmp_path / "tables", until_ms=START_MS + 120)


def test_the_ledger_s_users_start_again_whatever_the_log_still_holds(tmp_path: Path) -> None:
    log = Log()
    log.act(1, 1, CLICK, START_MS)
    log.act(1, 2, CLICK, START_MS + 50, append_ms=START_MS + 150)  # arrives behind the erasure
    log.act(1, 3, CLICK, START_MS + 160)
    log.act(2, 4, CLICK, START_MS + 20)
    for time_ms in (START_MS + 90, START_MS + 100, START_MS + 200):
        for user in (1, 2, 3):
            log.request(user, time_ms, {5: []})
    folder, erased = log.write(tmp_path / "log"), {1: START_MS + 100, 3: START_MS + 190}
    history = History(DOMAIN, "home", folder, erased)
    assert history.before(1, START_MS + 155)[0]["entity_id"].tolist() == []
    events, erased_before_ms = history.before(1, START_MS + 200)
    assert (events["entity_id"].tolist(), erased_before_ms) == ([3], START_MS + 100)
    assert history.before(3, START_MS + 200)[1] == START_MS + 190, "tables from before it are not looked up"
    assert history.before(2, START_MS + 200)[1] == NEVER_ERASED
    for until_ms, known in ((START_MS + 60, [2]), (START_MS + 155, [2]), (START_MS + 200, [1, 2])):
        root = tmp_path / f"tables{until_ms}"
        publish_embeddings(DOMAIN, "home", folder, root, until_ms=until_ms, snapshots=1, erased=erased)
        assert open_generation(root, "items").ids(USER).tolist() == known
    dataset, _ = build_dataset(DOMAIN, "home", folder, root, erased=erased)
    assert list(zip(dataset.user_id.tolist(), (dataset.request_time_ms - START_MS).tolist(), strict=True)) == [
        (2, 90),
        (2, 100),
        (1, 200),
        (2, 200),
        (3, 200),
    ]
    later = {1: START_MS + 300}
    generation = publish_embeddings(DOMAIN, "home", folder, tmp_path / "later", until_ms=START_MS + 200, snapshots=1, erased=later)[-1]
    assert open_generation(tmp_path / "later", "items", generation.name).ids(USER).tolist() == [2]
    append_lines(tmp_path / LEDGER, [Erasure(1, 1, 1, 0, 0, START_MS + 300).to_json()])
    assert Workspace(tmp_path / "domain.toml", tmp_path).erased == later


def test_a_batch_holds_what_pack_made(world: tuple[Path, Path]) -> None:
    dataset, tables = build_dataset(DOMAIN, "home", *world)
    requests = next(iter(read_requests(world[0], DOMAIN)))
    newest = int(split_times(DOMAIN, "home", world[0], OPTIONS.fractions)[0])
    packer = Packer(DOMAIN, "home", tables)
    expected = [packer.pack(inputs).tensors for inputs in plain_inputs(DOMAIN, "home", requests, History(DOMAIN, "home", world[0]))]
    chosen = dataset.part(newest, 2**62)[[5, 0, 9]]
    batch = dataset.batch(chosen)
    for place, request in enumerate(chosen):
        rows = batch.request_row == place
        for name, values in expected[request].items():
            got = batch.tensors[name][rows if name in dataset.of_candidate else place].numpy()
            if name in dataset.of_sequence:
                assert not values[len(got) :].any()
                values = values[: len(got)]
            np.testing.assert_array_equal(got, values, err_msg=name)
    assert batch.tensors["candidate_number"].shape == (24, 1)
    assert batch.tensors["candidate_list_labels_of_item"].max() > 0


def test_labels_and_weights_follow_the_matrix(tmp_path: Path, world: tuple[Path, Path]) -> None:
    log = Log()
    log.act(1, 1, CLICK, START_MS)
    log.request(1, START_MS + 1, {1: [CLICK], 2: [HIDE], 3: [], 4: [CLICK, HIDE]})
    dataset, _ = build_dataset(DOMAIN, "home", log.write(tmp_path), world[1])
    assert dataset.labels.tolist() == [[True, False], [False, True], [False, False], [True, True]]
    assert dataset.weights.tolist() == [[3.0, 1.0], [0.5, 1.0], [1.5, 1.0], [3.5, 1.0]]


def test_a_user_erased_since_is_packed_as_serving_does(tmp_path: Path) -> None:
    log = Log()
    for user in (1, 2):
        log.act(user, 3, CLICK, START_MS)
        log.act(user, 4, CLICK, START_MS + 10)
    folder = log.write(tmp_path / "before")
    publish_embeddings(DOMAIN, "home", folder, tmp_path / "tables", until_ms=START_MS + 100, snapshots=1)
    log.act(1, 0, 0, 0, append_ms=START_MS + 150, erase=True)
    for user in (1, 2):
        log.request(user, START_MS + 120, {3: [CLICK]})
        log.request(user, START_MS + 200, {3: [CLICK]})
    folder = log.write(tmp_path / "after")
    dataset, _ = build_dataset(DOMAIN, "home", folder, tmp_path / "tables")
    known = dataset.of_request["user_embedding"].any(1)
    assert list(zip(dataset.user_id.tolist(), known.tolist(), strict=True)) == [(1, True), (2, True), (1, False), (2, True)]
    assert History(DOMAIN, "home", folder).before(1, START_MS + 200)[1] == START_MS + 150


def test_each_ranker_has_the_requests_of_its_surfaces(tmp_path: Path) -> None:
    Simulator(3, users=60, held_back=5, items=200).write(tmp_path / "published", requests=200)
    work = Workspace(Path("domains/simulator.toml"), tmp_path / "home")
    import_data(work, tmp_path / "published")
    domain = work.domain
    (batch,) = read_requests(work.log, domain)
    for ranker in ("home", "related"):
        number = domain.surfaces[ranker]
        own = np.flatnonzero(batch.surface == number)
        assert 0 < len(own) < len(batch)
        validation_ms, _ = split_times(domain, ranker, work.log, (0.7, 0.15, 0.15))
        assert validation_ms == batch.request_time_ms[own[int(0.7 * len(own))]]
        publish_embeddings(domain, ranker, work.log, work.tables, until_ms=validation_ms, snapshots=1)
        dataset, tables = build_dataset(domain, ranker, work.log, work.tables)
        assert dataset.request_time_ms.tolist() == batch.request_time_ms[own].tolist()
        packer, history = Packer(domain, ranker, tables), History(domain, ranker, work.log)
        everything = [packer.pack(inputs).tensors for inputs in plain_inputs(domain, ranker, batch, history)]
        for name, values in dataset.of_candidate.items():
            np.testing.assert_array_equal(values, np.concatenate([everything[i][name] for i in own]), err_msg=name)
        label = np.concatenate([batch.label(domain.actions["click"].id)[batch.starts[i] : batch.starts[i + 1]] for i in own])
        np.testing.assert_array_equal(dataset.labels[:, list(domain.ranker[ranker].heads).index("click")], label)


def test_embeddings_know_the_training_part_only(tmp_path: Path) -> None:
    log = intent_log(users=30, requests=8)
    until_ms = START_MS + 200_000_000
    folders = publish_embeddings(DOMAIN, "home", log.write(tmp_path / "a"), tmp_path / "tables_a", until_ms=until_ms)
    for item in range(1, 40, 2):
        log.act(500, item, CLICK, until_ms + item)
    later = publish_embeddings(DOMAIN, "home", log.write(tmp_path / "b"), tmp_path / "tables_b", until_ms=until_ms)
    assert [folder.name for folder in folders] == [folder.name for folder in later]  # a name holds a hash of the content

    items = open_generation(tmp_path / "tables_a", "items")
    vectors = items.vectors(item_member("video"), np.arange(40, dtype=np.uint64)).astype(np.float32)
    assert 0.5 < np.linalg.norm(vectors, axis=1).mean() <= 1.0
    similar = vectors @ vectors.T
    even = np.arange(40) % 2 == 0
    assert similar[np.ix_(even, even)].mean() > similar[np.ix_(even, ~even)].mean() + 0.1


def test_a_request_gets_the_user_vector_of_its_time(world: tuple[Path, Path]) -> None:
    log, tables = world
    dataset, newest = build_dataset(DOMAIN, "home", log, tables)
    names = generation_names(tables, "items")
    assert len(names) == 9
    assert newest.generations["items"] == names[-1]
    first = open_generation(tables, "items", names[0])
    assert len(first.ids(USER)) == 0
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    assert not dataset.of_request["user_embedding"][0].any()  # before anything was known
    request = int(dataset.part(validation_ms, 2**62)[0])
    user = dataset.user_id[request : request + 1]
    expected = open_generation(tables, "items").vectors(USER, user)[0]
    np.testing.assert_array_equal(dataset.of_request["user_embedding"][request], expected)


def test_training_learns_and_writes_its_results(tmp_path: Path, world: tuple[Path, Path]) -> None:
    result = train(DOMAIN, "home", *world, tmp_path, OPTIONS)
    assert result.metrics["test"]["heads"]["click"]["auc"] > 0.65
    assert result.metrics["test"]["heads"]["hide"]["auc"] is None  # nothing was hidden
    parts = result.metrics["parts"]
    assert parts["train"]["until_ms"] < parts["validation"]["from_ms"] <= parts["validation"]["until_ms"] < parts["test"]["from_ms"]
    assert parts["train"]["requests"] == pytest.approx(560, abs=2)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    model, _ = load_trained(DOMAIN, "home", tmp_path)
    dataset, _ = build_dataset(DOMAIN, "home", *world)
    test = dataset.part(parts["test"]["from_ms"], 2**62)
    probabilities, labels, *_ = predict(model, dataset, test)
    assert auc(probabilities[:, 0], labels[:, 0]) == pytest.approx(result.metrics["test"]["heads"]["click"]["auc"])

    other = parse_domain(DOMAIN_TEXT.replace("length_max = 2", "length_max = 3"), source="toy")
    with pytest.raises(TrainError, match="train again"):
        load_trained(other, "home", tmp_path)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, world: tuple[Path, Path]) -> None:
    dataset, _ = build_dataset(DOMAIN, "home", *world)
    whole = train(DOMAIN, "home", *world, tmp_path / "whole", OPTIONS, dataset=dataset)

    def interrupt(figures: dict[str, object]) -> None:
        if figures["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(DOMAIN, "home", *world, tmp_path / "cut", OPTIONS, dataset=dataset, after_epoch=interrupt)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    other = replace(OPTIONS, seed=4)
    with pytest.raises(TrainError, match="interrupted run"):
        train(DOMAIN, "home", *world, tmp_path / "cut", other, dataset=dataset, resume=True)
    epochs: list[object] = []
    resumed = train(
        DOMAIN, "home", *world, tmp_path / "cut", OPTIONS, dataset=dataset, resume=True, after_epoch=lambda f: epochs.append(f["epoch"])
    )
    assert epochs == [3, 4]
    assert [epoch["epoch"] for epoch in resumed.metrics["epochs"]] == [1, 2, 3, 4]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path: Path, world: tuple[Path, Path]) -> None:
    wild = replace(OPTIONS, epochs=12, patience=1, learning_rate=0.05)
    result = train(DOMAIN, "home", *world, tmp_path, wild)
    losses = [epoch["loss"] for epoch in result.metrics["epochs"]]
    assert len(losses) < 12
    assert result.metrics["best_epoch"] == int(np.argmin(losses)) + 1 == len(losses) - 1


def test_a_time_budget_ends_the_first_epoch(tmp_path: Path, world: tuple[Path, Path]) -> None:
    short = replace(OPTIONS, epochs=1000, patience=1000, seconds_max=0.5)
    result = train(DOMAIN, "home", *world, tmp_path, short)
    assert 1 <= len(result.metrics["epochs"]) < 100


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(share, OPTIONS) for share in np.linspace(0, 1, 101)]
    assert np.argmax(rates) == 10
    assert max(rates) == OPTIONS.learning_rate
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(OPTIONS.learning_rate / 100)


def test_evaluation_shows_what_the_sequence_is_worth(tmp_path: Path, world: tuple[Path, Path]) -> None:
    trained = train(DOMAIN, "home", *world, tmp_path / "with", replace(OPTIONS, epochs=8, patience=8))
    result = evaluate(DOMAIN, "home", *world, tmp_path / "with", tmp_path / "out")
    row = result["heads"]["click"]["auc"]
    assert row["with"] == pytest.approx(trained.metrics["test"]["heads"]["click"]["auc"])
    assert row["difference"] == pytest.approx(row["with"] - row["without"])
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert result["heads"]["click"]["hit"]["low"] > 0
    assert result["heads"]["click"]["log_loss"]["difference"] < 0
    assert result["verdict"] == {"click": "ahead", "hide": "no difference shown"}
    assert result["requests_longer_than_hit_at"] == result["test"]["requests"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert comparison_table(result).row_count == 12
    assert result["heads"]["click"]["grouped_auc"]["low"] > 0
    assert result["heads"]["click"]["mrr"]["difference"] > 0
    assert result["lower_is_better"] == ["hide"]
    assert result["calibration_error"]["click"]["with"] == pytest.approx(trained.metrics["test"]["heads"]["click"]["calibration_error"])
    assert 0 < result["diversity"]["with"]["intra_list_distance"] < 2
    assert result["diversity"]["with"]["category_entropy"] is None  # the toy's items have no category
    with pytest.raises(TrainError, match="without the sequence"):
        evaluate(DOMAIN, "home", *world, tmp_path / "out" / "without_sequence", tmp_path / "again")


QUICK = replace(OPTIONS, epochs=1)


@pytest.fixture
def work(tmp_path: Path, world: tuple[Path, Path]) -> Workspace:
    """The log of `world` in a home of its own."""
    (tmp_path / "toy.toml").write_text(DOMAIN_TEXT)
    shutil.copytree(world[0], tmp_path / "home" / "logs" / "toy")
    return Workspace(tmp_path / "toy.toml", tmp_path / "home")


def test_a_second_training_leaves_the_served_release_as_it_is(work: Workspace) -> None:
    async def served(*switches: dict[str, str]) -> tuple[dict[str, str], int]:
        """What a (re)start, and then these announcements, serve: generations and the digest of one packed request."""
        triton = TritonModels("127.0.0.1:1")  # nobody is there: only the tables count here
        releases = Releases(work.releases, work.tables, work.home / "repository", triton)
        try:
            await releases.start()
            for generations in switches:
                await releases.switch("home", written.release_id, generations)
            with releases.use("home") as of_home:
                tensors = of_home.packer.pack(inputs).tensors
                return dict(of_home.generations), of_home.packer.digest(tensors)
        finally:
            await releases.close()
            await triton.close()

    *_, inputs = plain_inputs(DOMAIN, "home", next(iter(read_requests(work.log, DOMAIN))), History(DOMAIN, "home", work.log))
    first = train_ranker(work, "home", QUICK)
    packed = build_dataset(DOMAIN, "home", work.log, work.tables, generations=first.generations)[0].of_request["user_embedding"]
    written = release(work, "home")
    before = asyncio.run(served())
    assert before[0] == first.generations

    later = replace(QUICK, seed=5, fractions=(0.8, 0.1, 0.1))
    others = [train_ranker(work, "home", options).generations for options in (replace(QUICK, seed=4), later)]
    assert generation_names(work.tables, "items")[-1] == others[-1]["items"]
    assert train_without_sequence(work, "home", QUICK).generations == others[-1]
    assert asyncio.run(served()) == asyncio.run(served({})) == before
    for other in others:
        with pytest.raises(ReleaseError, match=f"{other['items']} .*{first.generations['items']}"):
            asyncio.run(served({"items": other["items"]}))
    again, tables = build_dataset(DOMAIN, "home", work.log, work.tables, generations=first.generations)
    np.testing.assert_array_equal(again.of_request["user_embedding"], packed)

    lineages = [TableSet.open(work.tables, DOMAIN, "home", each).items.lineage for each in (first.generations, *others)]
    assert len(set(lineages)) == 3
    members = {name: Member(tables.items.ids(name), tables.items.vector_table(name)[1:]) for name in tables.items.members}
    newer = write_generation(work.tables, "items", tables.items.created_ms + 1000, members, lineage=lineages[0])
    assert asyncio.run(served())[0]["items"] == newer.name


def test_evaluation_leaves_the_training_to_release_alone(work: Workspace) -> None:
    trained = train_ranker(work, "home", QUICK)
    kept = {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    result = evaluate_ranker(work, "home", replace(QUICK, seed=9))
    assert {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()} == kept
    evaluated = work.home / "evaluation" / "home"
    assert json.loads((evaluated / "evaluation.json").read_text()) == result
    used = [json.loads((evaluated / name / "metrics.json").read_text()) for name in ("with_sequence", "without_sequence")]
    assert used[0]["generations"] == used[1]["generations"] != trained.generations

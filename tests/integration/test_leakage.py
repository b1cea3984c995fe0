"""Nothing of a request's future reaches it: planted and shuffled futures, planted labels, the parts in time, what a worker would have had.

Each guard has a control that shows that it could fail: the same information planted before the request is seen, and gives the label away.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import CLICK, DOMAIN, HIDE, OPTIONS, SHOWN, START_MS, Log, intent_log

from features.logs import read_actions, read_requests
from features.sequence import definition, law
from inference.baseline import columns_of
from inference.dataset import Dataset, History, build_dataset, split_times
from inference.embeddings import newest_generations, publish_embeddings
from inference.metrics import auc
from inference.train import TrainOptions, predict, train

ONE_EPOCH = replace(OPTIONS, epochs=1, small=False)


def packed(folder: Path, log: Log, until_ms: int) -> tuple[Path, Path, Dataset, dict[str, str]]:
    """(log, tables, dataset, generations), with embeddings of what came before `until_ms`."""
    folder.mkdir()
    written = log.write(folder / "log")
    generations = newest_generations(publish_embeddings(DOMAIN, "home", written, folder / "tables", until_ms=until_ms))
    dataset, _ = build_dataset(DOMAIN, "home", written, folder / "tables", generations=generations)
    return written, folder / "tables", dataset, generations


def inputs_before(dataset: Dataset, moment_ms: int, *, labels: bool = True) -> dict[str, np.ndarray]:
    """Everything that training reads of the requests before a moment."""
    requests = dataset.part(0, moment_ms)
    rows, places = dataset.starts[len(requests)], dataset.sequence_starts[len(requests)]
    found = {name: values[: len(requests)] for name, values in dataset.of_request.items()}
    found |= {name: values[:rows] for name, values in dataset.of_candidate.items()}
    found |= {name: values[:places] for name, values in dataset.of_sequence.items()}
    return found | ({"labels": dataset.labels[:rows], "weights": dataset.weights[:rows]} if labels else {})


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def middle_ms() -> int:
    """A moment that half of the requests of `intent_log` come before."""
    return int(np.median([row["request_time_ms"] for row in intent_log().impressions]))  # type: ignore[arg-type]


def test_a_planted_future_changes_nothing_before_it(tmp_path: Path, middle_ms: int) -> None:
    log, _, dataset, _ = packed(tmp_path / "alone", intent_log(), middle_ms)

    def planted(late: bool) -> Log:
        """Each early request gets a hide on every candidate, just before it; late: the log hears of it when the early ones are over."""
        found = intent_log()
        for number, row in enumerate(list(found.impressions)):
            now = int(row["request_time_ms"])  # type: ignore[call-overload]
            if now < middle_ms:
                append_ms = middle_ms + number if late else now - 1
                found.act(int(row["user_id"]), int(row["entity_id"]), HIDE, now - 1, append_ms=append_ms)  # type: ignore[call-overload]
        return found

    late_log, _, late, _ = packed(tmp_path / "late", planted(late=True), middle_ms)
    _, _, early, _ = packed(tmp_path / "early", planted(late=False), middle_ms)
    assert same(inputs_before(dataset, middle_ms), inputs_before(late, middle_ms))
    assert not same(inputs_before(dataset, middle_ms), inputs_before(early, middle_ms))
    columns, others = columns_of(DOMAIN, "home", log, dataset), columns_of(DOMAIN, "home", late_log, late)
    end = dataset.starts[len(dataset.part(0, middle_ms))]
    np.testing.assert_array_equal(columns.values[:end], others.values[:end])
    assert not np.array_equal(columns.values[end:], others.values[end:], equal_nan=True)


def test_a_shuffled_future_trains_the_same_weights(tmp_path: Path) -> None:
    validation_ms, _ = split_times(DOMAIN, "home", intent_log().write(tmp_path / "log"), OPTIONS.fractions)
    weights = []
    for name, shuffled in (("as it was", False), ("shuffled", True)):
        log = intent_log()
        if shuffled:
            random = np.random.default_rng(1)
            later = [row for row in log.impressions if int(row["request_time_ms"]) >= validation_ms]  # type: ignore[call-overload]
            answers = [row["labels"] for row in later]
            for row, place in zip(later, random.permutation(len(answers)).tolist(), strict=True):
                row["labels"] = answers[place]
            acts = [row for row in log.actions if row["append_time_ms"] >= validation_ms]
            items = random.permutation([row["entity_id"] for row in acts]).tolist()
            for row, item in zip(acts, items, strict=True):
                row["entity_id"] = item
        written, tables, dataset, generations = packed(tmp_path / name, log, validation_ms)
        result = train(DOMAIN, "home", written, tables, tmp_path / name / "model", ONE_EPOCH, dataset=dataset, generations=generations)
        weights.append((result.model.state_dict(), result.metrics["test"]["heads"]["click"]["auc"]))
    for name, value in weights[0][0].items():
        assert torch.equal(value, weights[1][0][name]), name
    assert weights[0][1] > weights[1][1]


def telling_log(delay_ms: int, *, late: bool = False) -> Log:
    """Labels without any pattern; a planted action on the clicked item, `delay_ms` behind the request, tells them. `late`: it says that it
    happened before the request, but the log got it behind it.
    """
    random = np.random.default_rng(7)
    log = Log()
    for user in range(120):
        for visit in range(4):
            now = START_MS + int(random.integers(0, 4e8)) // 4 + visit * 100_000_000
            items = random.choice(40, 4, replace=False).tolist()
            clicked = int(random.choice(items))
            log.act(user, clicked, CLICK, now - 1 if late else now + delay_ms, append_ms=now + delay_ms)
            log.request(user, now, {item: [CLICK] if item == clicked else [] for item in items})
    return log


@pytest.mark.parametrize(
    ("delay_ms", "late", "seen"), [(-1000, False, True), (0, False, False), (0, True, False), (5, False, False), (5, True, False)]
)
def test_a_planted_label_is_found_before_the_request_only(tmp_path: Path, delay_ms: int, late: bool, seen: bool) -> None:
    _, _, dataset, _ = packed(tmp_path / "world", telling_log(delay_ms, late=late), START_MS + 2**40)
    newest = np.zeros(len(dataset.labels), bool)
    for i in range(len(dataset)):
        tensors = dataset.request(i)
        if len(tensors["sequence_embedding"]):
            rows = slice(int(dataset.starts[i]), int(dataset.starts[i + 1]))
            newest[rows] = (tensors["candidate_embedding"] == tensors["sequence_embedding"][0]).all(1)
    assert (auc(newest.astype(float), dataset.labels[:, 0]) > 0.9) == seen


@pytest.mark.parametrize(("delay_ms", "least", "most"), [(-80_000, 0.95, 1.0), (0, 0.35, 0.65)])  # further back than the time window
def test_a_model_finds_a_planted_label_only_where_it_was_planted_before(tmp_path: Path, delay_ms: int, least: float, most: float) -> None:
    """One candidate a request, a label without pattern, and an action whose kind tells it."""
    random = np.random.default_rng(7)
    log = Log()
    for user in range(150):
        for visit in range(4):
            now, item, clicked = (
                START_MS + int(random.integers(0, 10**8)) + visit * 10**8,
                int(random.integers(0, 40)),
                random.random() < 0.5,
            )
            log.act(user, int(random.integers(0, 40)), CLICK if clicked else HIDE, now + delay_ms)
            log.request(user, now, {item: [CLICK] if clicked else []})
    written, tables, dataset, generations = packed(tmp_path / "world", log, START_MS + 2**40)
    options = TrainOptions(epochs=12, batch_rows=32, threads=1, patience=12, learning_rate=1e-2, progress=False, small=False)
    result = train(DOMAIN, "home", written, tables, tmp_path / "model", options, dataset=dataset, generations=generations)
    test = dataset.part(result.metrics["parts"]["test"]["from_ms"], 2**62)
    probabilities, labels, *_ = predict(result.model, dataset, test)
    assert least <= auc(probabilities[:, 0], labels[:, 0]) <= most


def test_parts_follow_each_other_in_time(tmp_path: Path) -> None:
    log, _, dataset, _ = packed(tmp_path / "world", intent_log(), START_MS + 2**40)
    validation_ms, test_ms = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    parts = [dataset.part(0, validation_ms), dataset.part(validation_ms, test_ms), dataset.part(test_ms, 2**62)]
    assert np.concatenate(parts).tolist() == list(range(len(dataset)))
    limits = [(dataset.request_time_ms[part].min(), dataset.request_time_ms[part].max()) for part in parts]
    assert limits[0][1] < validation_ms <= limits[1][0] <= limits[1][1] < test_ms <= limits[2][0]


def test_a_request_sees_what_a_worker_would_have_had(tmp_path: Path) -> None:
    """The worker's fold over the records in the order of the log, record by record, against what the dataset packs."""
    random = np.random.default_rng(3)
    log = Log()
    for _ in range(500):
        append_ms = START_MS + int(random.integers(0, 5000))
        late_ms = int(random.integers(0, 800)) if random.random() < 0.3 else 0
        log.act(
            int(random.integers(0, 4)),
            int(random.integers(0, 9)),
            int(random.choice([SHOWN, CLICK, HIDE])),
            append_ms - late_ms,
            append_ms=append_ms,
        )
    for _ in range(80):
        log.request(int(random.integers(0, 4)), START_MS + int(random.integers(1, 5000)), {1: [], 2: [CLICK]})
    folder = log.write(tmp_path / "log")
    (records,), (requests,) = read_actions(folder, DOMAIN), read_requests(folder, DOMAIN)
    what, state, done = definition(DOMAIN, "main"), {}, 0
    history = History(DOMAIN, "home", folder)
    for user, now in zip(requests.user_id.tolist(), requests.request_time_ms.tolist(), strict=True):
        while done < len(records) and records.append_time_ms[done] < now:
            owner = int(records.users[done])
            kept = state.get(owner, records.events[:0])
            state[owner] = law(what, np.concatenate([kept, records.events[done : done + 1]]))
            done += 1
        expected = state.get(user, records.events[:0])
        assert history.before(user, now)[0].tobytes() == expected.tobytes()

"""Trainings that are killed, resumed, shared by processes, and what they leave: arrays on disk, event files, a report."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from test_training import CLICK, DOMAIN, DOMAIN_TEXT, HIDE, OPTIONS, SHOWN, START_MS, Log, intent_log

from features.domain import parse_domain
from features.erasures import Erasure, ledger_fingerprint
from features.log_erasure import drop_past
from features.logs import PACKED, read_requests
from features.sequence import definition, law
from inference import history
from inference.dataset import POOL, Dataset, build_dataset, split_times
from inference.embeddings import publish_embeddings
from inference.history import History
from inference.packed import default_cache
from inference.report import reliability_bins
from inference.train import TrainOptions, train

FAR = 2**60
"""Ids near to each other that a float64 cannot tell apart."""
SCRIPT = Path(__file__).parents[1] / "training_process.py"
STEADY = DOMAIN_TEXT.replace("first_k = 3", "first_k = 3, dropout = 0.0")
QUICK = {"epochs": 2, "batch_rows": 256, "seed": 3, "threads": 1, "patience": 2, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A log with embeddings: (log, tables)."""
    folder = tmp_path_factory.mktemp("world")
    log = intent_log().write(folder / "log")
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    publish_embeddings(DOMAIN, "home", log, folder / "tables", until_ms=validation_ms, snapshots=3)
    return log, folder / "tables"


def command(folder: Path, world: tuple[Path, Path], out: str, text: str = DOMAIN_TEXT, **options: object) -> list[str]:
    (folder / "toy.toml").write_text(text)
    return [str(SCRIPT), str(folder / "toy.toml"), *map(str, world), str(folder / out), json.dumps(QUICK | options)]


def steps_of(lines: Iterator[str] | list[str]) -> dict[int, float]:
    return {int(number): float.fromhex(loss) for number, loss in (line.split() for line in lines)}


def run_all(arguments: list[str]) -> dict[int, float]:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=240)
    return steps_of(done.stdout.splitlines())


def run_here(world: tuple[Path, Path], out: Path, text: str = DOMAIN_TEXT, **options: object) -> dict[int, float]:
    found: dict[int, float] = {}
    given = TrainOptions(**QUICK | options)  # type: ignore[arg-type]
    train(parse_domain(text, source="toy"), "home", *world, out, given, after_step=found.__setitem__)
    return found


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, world: tuple[Path, Path]) -> None:
    whole = run_here(world, tmp_path / "whole")
    assert len(whole) > 30
    killed = subprocess.Popen(
        [sys.executable, *command(tmp_path, world, "cut", checkpoint_s=0.0)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert killed.stdout is not None
    before: dict[int, float] = {}
    with killed:
        for line in killed.stdout:
            if line.endswith("\n"):
                before |= steps_of([line])
            if len(before) == len(whole) * 2 // 3:
                killed.send_signal(signal.SIGKILL)  # what it has said until then is read to the end
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    after = run_all(command(tmp_path, world, "cut", checkpoint_s=0.0, resume=True))
    # A kill may come between a checkpoint and what is said of it.
    assert max(before) < min(after) <= max(before) + 2, "it goes on within the epoch, behind the newest checkpoint"
    assert max(after) == max(whole)
    assert {number: whole[number] for number in before | after} == before | after
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_two_processes_train_as_one(tmp_path: Path, world: tuple[Path, Path]) -> None:
    one = run_here(world, tmp_path / "one", STEADY)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run_all([*torchrun, *command(tmp_path, world, "two", STEADY)])
    assert list(one) == list(two)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-4)
    of = [json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "two")]
    assert of[0]["test"]["loss"] == pytest.approx(of[1]["test"]["loss"], rel=1e-3)


def test_pieces_of_a_batch_add_up_to_it(tmp_path: Path, world: tuple[Path, Path]) -> None:
    whole = run_here(world, tmp_path / "whole", STEADY, epochs=1, piece_tokens=1 << 20)
    pieces = run_here(world, tmp_path / "pieces", STEADY, epochs=1, piece_tokens=100)
    np.testing.assert_allclose(list(pieces.values()), list(whole.values()), rtol=2e-4)
    rough = run_here(world, tmp_path / "rough", STEADY, epochs=1, bf16=True)
    np.testing.assert_allclose(list(rough.values()), list(whole.values()), rtol=0.05)


def test_a_training_leaves_events_and_a_report(tmp_path: Path, world: tuple[Path, Path]) -> None:
    result = train(DOMAIN, "home", *world, tmp_path, replace(OPTIONS, epochs=2))
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(file.read_bytes()):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in found["validation/loss"]] == [24, 48]
    assert found["validation/loss"][-1][1] == pytest.approx(result.metrics["epochs"][-1]["loss"])
    assert len(found["train/loss"]) == len(result.metrics["curve"]) == 48
    assert {"train/auc", "train/samples_per_s", "train/learning_rate", "validation/auc/click"} < found.keys()
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "http-equiv" not in page
    assert "<script" not in page
    assert " src=" not in page
    assert f"{result.metrics['test']['heads']['click']['auc']:.4f}" in page
    bins = result.metrics["reliability"]["click"]["bins"]
    assert sum(each["rows"] for each in bins) == result.metrics["parts"]["test"]["rows"]
    assert 0 <= result.metrics["epochs"][0]["data_wait_share"] < 1


def events_of(data: bytes) -> Iterator[Event]:
    """Records of an event file: length, its checksum, bytes, their checksum."""
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_reliability_is_the_means_of_bins() -> None:
    random = np.random.default_rng(0)
    probabilities = random.random(10_000)
    labels = random.random(10_000) < probabilities
    fair = reliability_bins(probabilities, labels)
    assert fair["error"] < 0.02
    assert [each["rows"] for each in fair["bins"]] == [1000] * 10
    assert reliability_bins(probabilities / 2, labels)["error"] == pytest.approx(0.25, abs=0.02)
    assert reliability_bins(np.zeros(0), np.zeros(0, bool)) == {"bins": [], "error": None}


def test_sequences_of_a_batch_are_those_of_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    log = Log()
    for _ in range(600):
        append_ms = START_MS + int(random.integers(0, 1000))
        user, erase = int(random.integers(2, 8)), random.random() < 0.01
        late_ms, action = int(random.integers(0, 200)), int(random.choice([SHOWN, CLICK, HIDE]))
        log.act(FAR + user, int(random.integers(0, 9)), action, append_ms - late_ms, append_ms=append_ms, erase=erase and user > 5)
    for time_ms in sorted(random.integers(0, 1100, 200).tolist()):
        log.request(FAR + int(random.integers(0, 8)), START_MS + time_ms, {1: []})  # two of them never acted
    folder, erased = log.write(tmp_path), {FAR + 5: START_MS + 300, FAR + 1: START_MS + 5}
    (batch,) = read_requests(folder, DOMAIN)
    one_by_one = History(DOMAIN, "home", folder, erased)
    expected = [one_by_one.before(int(user), int(at)) for user, at in zip(batch.user_id, batch.request_time_ms, strict=True)]
    assert sum(len(events) for events, _ in expected) > 500
    for at_once in (1 << 20, 50):
        monkeypatch.setattr(history, "EVENTS_AT_ONCE", at_once)
        source, found = History(DOMAIN, "home", folder, erased), []
        parts = list(source.sequences(batch))
        for part in parts:
            for low, high, erased_ms in zip(part.starts[:-1], part.starts[1:], part.erased_before_ms, strict=True):
                found.append((part.events[low:high].tobytes(), int(erased_ms)))
        assert found == [(events.tobytes(), erased_ms) for events, erased_ms in expected]
        assert (len(parts) == 1) == (at_once > 50)
        with pytest.raises(ValueError, match="later moment"):
            list(source.sequences(batch))
    assert law(definition(DOMAIN, "main"), expected[-1][0]).tobytes() == expected[-1][0].tobytes()


def arrays_of(dataset: Dataset) -> dict[str, bytes]:
    parts = {"": vars(dataset), "request.": dataset.of_request, "candidate.": dataset.of_candidate, "sequence.": dataset.of_sequence}
    return {
        f"{kind}{name}": values.tobytes() for kind, of in parts.items() for name, values in of.items() if isinstance(values, np.ndarray)
    }


def test_arrays_are_packed_once_until_something_changes(tmp_path: Path, world: tuple[Path, Path]) -> None:
    log = intent_log(users=30).write(tmp_path / "log")
    cache, counted = default_cache(log), list[int]()

    def packed(domain=DOMAIN, erased=None) -> Dataset:
        counted.clear()
        return build_dataset(domain, "home", log, world[1], cache=cache, erased=erased or {}, packed=counted.append)[0]

    first = packed()
    assert sum(counted) == len(first) == 300
    whole = arrays_of(first)
    assert arrays_of(packed()) == whole == arrays_of(build_dataset(DOMAIN, "home", log, world[1])[0])
    assert counted == []
    other = parse_domain(DOMAIN_TEXT.replace("base_weight = 1.5", "base_weight = 2.5"), source="toy")
    assert np.unique(packed(other).weights[:, 0]).tolist() == [2.5, 3.0]
    assert np.unique(packed().weights[:, 0]).tolist() == [1.5, 3.0]
    assert counted == [], "both stay"

    for path in cache.glob("*/user_id.npy"):
        path.write_bytes(path.read_bytes()[:200])
    assert arrays_of(packed()) == whole
    assert sum(counted) == 300, "damaged arrays are packed again"

    erased = {4: 2**61}
    without = packed(erased=erased)
    assert sum(counted) == len(without) == 290
    assert 4 not in without.user_id
    assert len(list(cache.iterdir())) == 1, "what was packed under another ledger is gone"
    log_of_more = intent_log(users=31).write(log)
    assert log_of_more == log
    assert len(packed(erased=erased)) == 300
    assert sum(counted) == 300


def test_forgetting_a_user_in_the_log_forgets_the_arrays(tmp_path: Path, world: tuple[Path, Path]) -> None:
    log = intent_log(users=10).write(tmp_path / "log")
    build_dataset(DOMAIN, "home", log, world[1], cache=default_cache(log))
    build_dataset(DOMAIN, "home", log, world[1], cache=default_cache(log))
    (folder,) = (log / PACKED).iterdir()
    assert json.loads((folder / "meta.json").read_text())["ledger"] == ledger_fingerprint({})
    erased = {4: 2**61}
    erasures = [Erasure(4, 1, 0, 0, 0, 2**61)]
    drop_past(log, [])
    assert folder.exists()
    assert drop_past(log, erasures) > 0
    assert not folder.exists()
    build_dataset(DOMAIN, "home", log, world[1], cache=default_cache(log), erased=erased)
    assert drop_past(log, erasures) == 0
    assert len(list((log / PACKED).iterdir())) == 1


def test_batches_hold_every_request_once_and_shuffle_by_blocks() -> None:
    random = np.random.default_rng(0)
    R = POOL + 5_000
    sizes, lengths = random.integers(1, 5, R), random.integers(0, 9, R)
    dataset = Dataset(
        user_id=np.zeros(R, np.uint64),
        request_time_ms=np.arange(R),
        starts=history.starts_of(sizes),
        labels=np.zeros((0, 1), bool),
        weights=np.zeros((0, 1), np.float32),
        of_request={},
        of_candidate={},
        of_sequence={},
        sequence_starts=history.starts_of(lengths),
    )
    requests = dataset.part(100, R)
    for order in (None, np.random.default_rng(1)):
        batches = dataset.batches(requests, 64, order)
        assert sorted(np.concatenate(batches).tolist()) == requests.tolist()
        assert all(sizes[batch].sum() <= 64 for batch in batches)
        assert all((np.diff(lengths[batch]) >= 0).all() for batch in batches)
    first = np.concatenate(batches)[: POOL // 2]
    assert 0.4 < (first < R // 2).mean() < 0.6
    again = dataset.batches(requests, 64, np.random.default_rng(1))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    for batch in batches[:50]:
        pieces = [batch[piece] for piece in dataset.pieces(batch, lengths[batch], 100)]
        assert np.concatenate(pieces).tolist() == batch.tolist()
        for piece in pieces:
            assert len(piece) == 1 or sizes[piece].sum() * max(1, lengths[piece].max()) <= 100


def test_torchrun_s_processes_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.parallel import threads_each

    assert threads_each(4) == 4
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "8")
    assert threads_each(4) == 1

"""Item vectors made anew every hour: what a generation may know, that generations stay comparable, and which one a request is given."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from deploy.learn import Workspace, continue_ranker, judge_trained, release, train_ranker
from features.actions import EVENT_DTYPE
from features.domain import Domain, Refresh, parse_domain
from features.logs import LoggedActions, read_actions
from features.tables import USER, Generation, generation_names, generations_of, lineage_of, open_generation, time_of
from features.tensors import tensor_fingerprint
from inference.dataset import _Packers, build_dataset
from inference.embeddings import EmbeddingError, Positives, factorised
from inference.gate import Contender, Limits, judge
from inference.refreshed import SETTLED_MS, generations, publish_present, publish_refreshed, rotation
from inference.release import load_model
from inference.train import TrainOptions
from streams.importer import import_log

HOUR_MS = 3_600_000
T = 1_700_002_800_000  # a whole hour
DOMAIN = """
name = "news"
[entities]
article = 1
[actions]
click = { id = 2, kind = "positive" }
[sequence.main]
id = 1
[ranker.home]
sequence = "main"
sequence_length = 10
item_space = "together"
user_space = "together"
embedding_dimension = 8
refresh = { every_ms = 3_600_000, window_ms = 21_600_000 }
[ranker.home.heads.click]
actions = ["click"]
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "article"
time = "time"
negatives = { action = "click", uniform = 3 }
[[log.actions]]
action = "click"
"""


def clicks(hours: int = 30, seed: int = 0) -> npt.NDArray[np.int64]:
    """Rows (user, item, time): articles of two topics, of which some come every hour and are read for six; a user reads one topic."""
    random = np.random.default_rng(seed)
    rows = []
    for hour in range(hours):
        users = random.integers(0, 60, 150)
        age = random.integers(0, 6, 150)
        items = 2 * (10 * np.maximum(hour - age, 0) + random.integers(0, 10, 150)) + users % 2
        times = T + hour * HOUR_MS + random.integers(0, HOUR_MS, 150)
        rows.append(np.stack([users, items + 1, times], 1))
    return np.concatenate(rows)[np.argsort(np.concatenate(rows)[:, 2], kind="stable")]


def imported(folder: Path, rows: npt.NDArray[np.int64]) -> tuple[Domain, Path]:
    folder.mkdir()
    (folder / "log.csv").write_text("user,item,time\n" + "".join(f"{user},{item},{time_ms}\n" for user, item, time_ms in rows.tolist()))
    domain = parse_domain(DOMAIN, source="news.toml")
    import_log(domain, folder, folder / "log", created_ms=T)
    return domain, folder / "log"


def positives(rows: npt.NDArray[np.int64]) -> Positives:
    users, items, times = rows.T
    return Positives(users.astype(np.uint64), np.ones(len(rows), np.uint8), items.astype(np.uint64), times)


def opened(root: Path, folders: list[Path]) -> list[Generation]:
    return [open_generation(root, "together", folder.name) for folder in folders]


def test_a_generation_knows_what_came_before_it_and_no_more(tmp_path: Path) -> None:
    rows = clicks()
    cut_ms = T + 20 * HOUR_MS
    other = rows.copy()
    other[rows[:, 2] >= cut_ms, 1] = 1  # all that comes later is on one item
    told = []
    for name, each in (("one", rows), ("other", other)):
        domain, log = imported(tmp_path / name, each)
        folders = publish_refreshed(domain, "home", log, tmp_path / name / "tables")
        told.append(opened(tmp_path / name / "tables", folders))
    assert [held.created_ms for held in told[0]] == [int(rows[0, 2]), *(T + hour * HOUR_MS for hour in range(1, 30)), int(rows[-1, 2]) + 1]
    assert len({held.lineage for held in told[0]}) == 1
    early = [(one, two) for one, two in zip(*told, strict=True) if one.created_ms <= cut_ms]
    assert len(early) == 21
    assert [one.name for one, _ in early] == [two.name for _, two in early]  # a log that has grown goes on with what is there
    for one, two in early:
        for member in ("item.article", USER):
            np.testing.assert_array_equal(one.ids(member), two.ids(member))
            np.testing.assert_array_equal(one.vector_table(member), two.vector_table(member))
        assert set(one.ids("item.article").tolist()) == set(rows[rows[:, 2] < one.created_ms, 1].tolist())
    assert not np.array_equal(told[0][-1].ids("item.article"), told[1][-1].ids("item.article"))


def test_a_log_that_has_grown_or_lost_a_user_leaves_no_stale_hour(tmp_path: Path) -> None:
    """An hour that a shorter log, or one before an erasure, knew otherwise: what was made last counts, wherever the newest is asked for."""
    rows = clicks(8)
    root = tmp_path / "tables"
    domain, log = imported(tmp_path / "early", rows[rows[:, 2] < T + 5 * HOUR_MS + HOUR_MS // 2])
    early = opened(root, publish_refreshed(domain, "home", log, root))
    domain, log = imported(tmp_path / "late", rows)
    late = opened(root, publish_refreshed(domain, "home", log, root))
    assert early[-1].created_ms < T + 5 * HOUR_MS + HOUR_MS // 2, "it is not of an hour that it knows half of"
    assert [held.name for held in early[:-1]] == [held.name for held in late[: len(early) - 1]]
    assert early[-1].name not in {held.name for held in late}
    user = int(np.setdiff1d(rows[:, 0], rows[rows[:, 2] < T + HOUR_MS, 0])[0])
    without = opened(root, publish_refreshed(domain, "home", log, root, erased={user: int(rows[-1, 2]) + 1}))
    assert without[-1].lineage == late[-1].lineage, "the user did nothing in the first hour"
    assert {held.created_ms for held in without} == {held.created_ms for held in late}
    assert {held.name for held in without} != {held.name for held in late}
    assert open_generation(root, "together").name == without[-1].name
    newest = {}
    for name in generations_of(root, "together", late[-1].lineage):
        newest.setdefault(time_of(name), name)
    assert [newest[held.created_ms] for held in without] == [held.name for held in without]
    _, tables = build_dataset(domain, "home", log, root)
    packers = _Packers(domain, "home", root, tables)
    for held in without:
        assert packers.at(held.created_ms).tables.items.name == held.name


def test_vectors_of_neighbouring_hours_are_comparable() -> None:
    found = list(generations(positives(clicks()), Refresh(every_ms=HOUR_MS, window_ms=6 * HOUR_MS), 8, seed=0))
    likeness, topics = [], []
    for (_, before, known), (_, items, _) in pairwise(found[10:]):
        live = np.flatnonzero(known & (items.vectors != before.vectors).any(1))  # made anew
        a, b = before.vectors[live], items.vectors[live]
        likeness.append(float(np.mean((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-9))))
        odd = items.ids % 2 == 1
        today = np.abs(items.vectors).any(1)
        topics.append(float(items.vectors[odd & today].mean(0) @ items.vectors[~odd & today].mean(0)))
    assert np.mean(likeness) > 0.6  # without the rotation the mean is about 0
    assert np.mean(topics) < 0.1


def test_the_rotation_finds_a_turn_and_keeps_dot_products() -> None:
    random = np.random.default_rng(1)
    old = random.normal(size=(50, 6)).astype(np.float32)
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0].astype(np.float32)
    new = old @ turn.T
    np.testing.assert_allclose(new @ rotation(new, old), old, atol=1e-5)
    found = rotation(random.normal(size=(5, 6)).astype(np.float32), old[:5])
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-5)
    assert rotation(old[:0], old[:0]).shape == (6, 6)


def test_a_request_is_given_the_generation_of_its_hour(tmp_path: Path) -> None:
    domain, log = imported(tmp_path / "one", clicks())
    root = tmp_path / "tables"
    folders = publish_refreshed(domain, "home", log, root)
    dataset, tables = build_dataset(domain, "home", log, root)
    assert tables.items.name == folders[-1].name
    packers = _Packers(domain, "home", root, tables)
    last_ms = -1
    for i in range(0, len(dataset), 97):
        at_ms = int(dataset.request_time_ms[i])
        items = packers.at(at_ms).tables.items
        assert items.created_ms <= at_ms
        assert at_ms - items.created_ms < HOUR_MS
        assert packers.at(at_ms).tables.users is items
        last_ms = max(last_ms, items.created_ms)
        held = items.vector_table("item.article")
        assert held is not None
        rows = dataset.candidate_rows(np.array([i]))
        for vector in dataset.of_candidate["candidate_embedding"][rows]:
            assert (held == vector).all(1).any()
    assert last_ms > T + 25 * HOUR_MS


def test_a_ranker_is_trained_on_and_judged_with_the_vectors_of_the_hours_since(tmp_path: Path) -> None:
    rows = clicks(40)
    work = Workspace(tmp_path / "news.toml", tmp_path)
    work.domain_path.write_text(DOMAIN)

    def hold(until_ms: int) -> None:
        known = rows[rows[:, 2] < until_ms].tolist()
        (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{user},{item},{time_ms}\n" for user, item, time_ms in known))
        import_log(work.domain, tmp_path, work.log, tables_root=work.tables, created_ms=T)

    options = TrainOptions(epochs=1, seconds_max=20, threads=1, small=False, progress=False)
    hold(T + 25 * HOUR_MS)
    train_ranker(work, "home", options)
    first = release(work, "home")
    assert (
        open_generation(work.tables, "together", first.generations["together"]).created_ms
        == rows[rows[:, 2] < T + 25 * HOUR_MS, 2].max() + 1
    )
    hold(T + 40 * HOUR_MS)
    # A running stack has made an hour since; its vectors are comparable, and what it serves with.
    event = np.zeros(1, EVENT_DTYPE)
    event["entity_id"], event["entity_kind"], event["action"] = 1, 1, 2
    later = LoggedActions.imported(np.ones(1, np.uint64), event, np.array([T + 41 * HOUR_MS + 1]))

    def actions(_: int) -> list[LoggedActions]:
        return [*read_actions(work.log, work.domain), later]  # its log has gone on, into the hour

    publish_present(work.domain, "home", first, actions, work.tables, T + 41 * HOUR_MS + SETTLED_MS)
    generations = continue_ranker(work, "home", first, options).generations
    newest = open_generation(work.tables, "together", generations["together"])
    assert newest.created_ms == T + 41 * HOUR_MS
    assert rows[-1, 2] + 1 in map(time_of, generation_names(work.tables, "together")), "the hours of the log are made as well"
    assert newest.lineage == lineage_of(work.tables, "together", first.generations["together"])
    verdict = judge_trained(work, "home", first, Limits(requests_min=50, positives_min=20, auc_loss_max=0.5))
    assert verdict.passed
    assert verdict.heads is not None
    # The incumbent is judged with the vectors that it would serve with now, not with those of its training alone.
    stale = judge(
        "home",
        Contender("now", load_model(first), work.domain, generations, verdict.from_ms),
        Contender.of(first),
        work.log,
        work.tables,
        limits=Limits(requests_min=50, positives_min=20),
    )
    assert stale.heads is not None
    assert stale.heads["click"]["auc"]["with"] == verdict.heads["click"]["auc"]["without"]
    assert stale.heads["click"]["auc"]["with"] != stale.heads["click"]["auc"]["without"]


def test_what_asks_for_it_and_what_does_not(tmp_path: Path) -> None:
    domain, log = imported(tmp_path / "one", clicks(3))
    plain = parse_domain(DOMAIN.replace("refresh = {", "# "), source="news.toml")
    assert tensor_fingerprint(domain, "home") == tensor_fingerprint(plain, "home")  # how vectors are made is no part of the interface
    with pytest.raises(EmbeddingError, match="ask for no refresh"):
        publish_refreshed(plain, "home", log, tmp_path / "tables")
    ranker = domain.ranker["home"]
    two = domain.model_copy(update={"ranker": {"home": ranker, "other": ranker.model_copy(update={"refresh": None})}})
    with pytest.raises(EmbeddingError, match=r"ranker\.other\.refresh: differs"):
        publish_refreshed(two, "home", log, tmp_path / "tables")


def test_a_factorisation_goes_on_from_the_one_before() -> None:
    """Of a log whose spectrum is flat, as that of articles is: an hour more, in which items get other rows, must not turn the vectors."""
    random = np.random.default_rng(3)
    users, rows, now_row = random.integers(0, 2000, 30_000).astype(np.uint64), random.integers(0, 400, 30_000), random.permutation(400)
    before = factorised(users[:-500], rows[:-500], 400, 16, seed=0)

    def likeness(start: npt.NDArray[np.float32] | None) -> float:
        now = factorised(users[500:], now_row[rows[500:]], 400, 16, seed=0, start=start)[now_row]
        now = now @ rotation(now, before)
        return float(np.median((now * before).sum(1) / (np.linalg.norm(now, axis=1) * np.linalg.norm(before, axis=1))))

    start = np.empty_like(before)
    start[now_row] = before
    assert likeness(start) > 0.95
    assert likeness(None) < 0.9  # what the start is for


def test_where_it_starts_changes_little_of_what_a_clear_spectrum_gives() -> None:
    rows = clicks(hours=4)
    users, items = rows[:, 0].astype(np.uint64), np.unique(rows[:, 1], return_inverse=True)[1].reshape(-1)
    plain = factorised(users, items, items.max() + 1, 2, seed=0)
    start = np.random.default_rng(1).normal(size=plain.shape).astype(np.float32)
    warm = factorised(users, items, items.max() + 1, 2, seed=0, start=start)
    np.testing.assert_allclose(warm @ warm.T, plain @ plain.T, atol=0.1)

"""After the record, the job and the worker's purge, no file below the home folder holds anything of the user's past; replay still agrees.

The home folder is made of the real parts: RocksDB state, LMDB view, archives, canonical logs, tables.
"""

import io
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from test_replay import DOMAIN, EPOCH, ERASED, IDLE, PARTITIONS, START_MS, MemoryLog, make_world, random_actions

from deploy.base_file import write_base_file
from deploy.replay import ACTIONS, RANKINGS, ReplayOptions, replay
from features.actions import APPEND_TIME_HEADER, CANONICAL_BYTES, ERASE, decode_batch, encode_action, encode_erase
from features.base import Base
from features.domain import DAY_MS, parse_domain
from features.erasures import LEDGER, Erasure, LedgerError, append_lines, erased_before_ms, erased_users, read_ledger
from features.ids import partition_of, user_key
from features.logs import ACTIONS as LOGGED_ACTIONS
from features.logs import IMPRESSIONS, LoggedActions, LogWriter, actions_schema, impressions_schema, read_actions
from features.samples import WARM, read_samples, write_samples
from features.tables import USER, generation_names, open_generation
from protos.v1.ranking_pb2 import RankRequest
from streams.archive import ArchiveError, ParquetLog, write_archive
from streams.core import fold_batch
from streams.erasure import ErasureJob, Summary, run_job
from streams.erasure_audit import AUDIT, PLACES, Audit, key_of
from streams.errors import StreamError, TopicError
from streams.history import History
from streams.kafka import KafkaConfig, Topics, check_retention, end_offsets, ensure_topics, new_producer, oldest_record_ms
from streams.purge import ErasurePass
from streams.state import definitions
from streams.store import RocksStore
from streams.view import PartitionView

SHOP = parse_domain(DOMAIN, source="test")
DEADLINE_MS = 30 * DAY_MS
PARTITION = partition_of(user_key(ERASED), PARTITIONS)
NOW_MS = START_MS + DAY_MS
LATE_MS = 777


def decoded(partition, records, first_offset=0):
    return decode_batch(
        log_epoch=EPOCH,
        partition=partition,
        offsets=first_offset + np.arange(len(records)),
        keys=[key for _, key, _ in records],
        values=[value for _, _, value in records],
        append_times_ms=np.array([append_ms for append_ms, _, _ in records], np.int64),
        future_tolerance_ms=SHOP.future_tolerance_ms,
        partition_count=PARTITIONS,
    )


def distinctive_actions():
    """The world of replay, in which every id of the erased user's past is a number that stands nowhere else. Returns it with these ids.

    Behind the erasure come late events: with event times from before it, which must be dropped for ever.
    """
    actions, random, secrets = random_actions(), np.random.default_rng(9), []
    records = actions[PARTITION]
    batch = decoded(PARTITION, records)
    at = int(np.flatnonzero(batch.verdict == ERASE)[0])
    erased_ms = int(batch.append_time_ms[at])
    mine = np.flatnonzero((batch.users == ERASED) & (batch.verdict != ERASE)).tolist()
    for number, i in enumerate(mine):
        event, append_ms = batch.events[i], int(batch.append_time_ms[i])
        is_late = i > at and number % 3 == 0
        is_past = i < at or is_late
        event_id = int(random.integers(2**61, 2**63))
        secrets += [event_id] if is_past else []
        value = encode_action(
            user_id=ERASED,
            entity_kind=int(event["entity_kind"]),
            entity_id=int(event["entity_id"]),
            action=int(event["action"]),
            event_time_ms=erased_ms - LATE_MS if is_late else max(int(event["event_time_ms"]), erased_ms + 1 if i > at else 0),
            event_id=event_id,
        )
        records[i] = (append_ms, user_key(ERASED), value)
    # Dead letters that name the user: a wrong key, and bytes that are no action under the right one.
    garbage = [i for i, record in enumerate(records[:at]) if record[2] == b"garbage"]
    event_id = int(random.integers(2**61, 2**63))
    misplaced = encode_action(user_id=ERASED, entity_kind=1, entity_id=1, action=1, event_time_ms=erased_ms, event_id=event_id)
    records[garbage[0]] = (records[garbage[0]][0], b"0123456789abcdef", misplaced)
    records[garbage[1]] = (records[garbage[1]][0], user_key(ERASED), b"\x99 no action " + event_id.to_bytes(8, "little"))
    return actions, [*secrets, event_id], at, erased_ms


class Home:
    """A home folder with everything in it, as a worker, an importer and an archiver leave it."""

    def __init__(self, root, records, secrets, erased_ms):
        self.path, self.secrets, self.erased_ms = root / "home", secrets, erased_ms
        self.world = make_world(root, DOMAIN, records)
        shutil.move(root / "tables", self.path / "tables")
        write_archive(self.world.actions, self.archive / ACTIONS)
        write_archive(self.world.rankings, self.archive / RANKINGS)
        self.write_state()
        self.write_logs()
        self.job = ErasureJob(home=self.path, domain=SHOP, deadline_ms=DEADLINE_MS, topics=Topics(actions="actions", rankings="rankings"))

    @property
    def archive(self):
        return self.path / "archive"

    def write_state(self):
        """The worker's store and view, with the erasure noted and nothing purged yet."""
        kept, state = definitions(SHOP), self.path / "state" / "worker-0"
        self.stores = RocksStore(state, kept, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
        self.erasures = ErasurePass(state, list(kept), wait_s=0.0)
        self.held = {}
        for partition, records in self.world.actions.records.items():
            store, view = self.stores.open(partition, EPOCH), PartitionView(self.path / "view", partition, map_bytes=1 << 24)
            view.sync(store.meta, store.scan, 0)
            self.erasures.opened(partition, store)
            for start in range(0, len(records), 50):
                batch = decoded(partition, records[start : start + 50], start)
                if (batch.verdict == ERASE).any():
                    store.purge([])  # flushes, so that what is erased now stands in a file of its own
                self.erasures.note(partition, batch)
                keys, rows, meta = fold_batch(kept, store, batch)
                store.write(keys, rows, meta)
                view.write(keys, rows, meta)
            self.held[partition] = store, view

    def purge(self):
        for partition, (store, view) in self.held.items():
            while self.erasures.due(partition, store):
                self.erasures.run(partition, store, view)

    def close(self):
        for partition, (store, view) in self.held.items():
            self.erasures.closed(partition, store)
            view.close()
            store.close()

    def write_logs(self):
        """What an import would have left: the same actions, and impressions of every user."""
        folder = self.path / "logs" / SHOP.name
        batches = [decoded(partition, records) for partition, records in self.world.actions.records.items()]
        users, events, stamps, erase = (
            np.concatenate([getattr(batch, name)[batch.verdict > 0] for batch in batches])
            for name in ("users", "events", "append_time_ms", "verdict")
        )
        order = np.argsort(stamps, kind="stable")
        logged = replace(LoggedActions.imported(users[order], events[order], stamps[order]), erase=(erase == ERASE)[order])
        with LogWriter(folder, LOGGED_ACTIONS, actions_schema(SHOP), row_group_rows=100) as writer:
            writer.write_actions(logged)
        n = 200
        rows = {
            "request_id": np.arange(n, dtype=np.uint64),
            "user_id": np.where(np.arange(n) % 5 == 0, ERASED, 5).astype(np.uint64),
            "request_time_ms": self.erased_ms - 100 + np.arange(n),
            "position": np.zeros(n, np.int32),
            "surface": np.ones(n, np.uint16),
            "entity_kind": np.ones(n, np.uint8),
            "entity_id": np.arange(n, dtype=np.uint64),
            "labels": [[1]] * n,
            "hour": np.zeros(n, np.float32),
            "retrieval": np.zeros(n, np.float32),
        }
        with LogWriter(folder, IMPRESSIONS, impressions_schema(SHOP)) as writer:
            writer.write(pa.table(rows))

    def replay(self):
        return replay(ReplayOptions(self.world.releases, self.path / "tables", archive=self.archive, score_sample=0))

    def found(self):
        """Folders below home whose files hold an id of the user's past, in either byte order; Parquet is searched as it reads."""
        wanted = [number.to_bytes(8, order) for number in self.secrets for order in ("little", "big")]
        texts = [form for number in self.secrets for form in (str(number).encode(), f"{number:x}".encode())]
        return {name for name, data in self.contents() if any(part in data for part in (*wanted, *texts))}

    def naming(self):
        """Files that hold the user's own id in any form, by their folder."""
        forms = [ERASED.to_bytes(8, "little"), ERASED.to_bytes(8, "big"), user_key(ERASED), str(ERASED).encode()]
        return {name for name, data in self.contents() if any(form in data for form in forms)}

    def contents(self):
        for path in (path for path in sorted(self.path.rglob("*")) if path.is_file()):
            folder = path.relative_to(self.path).parts[0]
            if path.suffix == ".parquet":
                yield folder, plain(path)
            else:
                yield folder, path.read_bytes()


def plain(path: Path) -> bytes:
    """A Parquet file's content with neither compression nor encodings that would hide bytes."""
    out = io.BytesIO()
    pq.write_table(pq.read_table(path), out, compression="none", use_dictionary=False)
    return out.getvalue()


@pytest.fixture
def home(tmp_path):
    records, secrets, _, erased_ms = distinctive_actions()
    found = Home(tmp_path, records, secrets, erased_ms)
    yield found
    found.close()


def test_nothing_of_the_past_is_left_and_replay_agrees(home):
    before = home.replay()
    assert before.ok, before.to_text()
    assert before.excluded["erased_since"] > 5
    assert home.found() - {"view"} == {"state", "archive", "logs"}, "LMDB may have used the view's free pages again; see test_purge"
    assert "tables" in home.naming()
    summary = run_job(home.job, NOW_MS)
    assert summary.removed["archived records"] > len(home.secrets)
    assert summary.removed["canonical logs"] > len(home.secrets)
    assert summary.removed["embeddings"] == 4, "two generations of two spaces"
    assert home.found() - {"view"} == {"state"}
    (entry,) = Audit(home.path / AUDIT).of_user(ERASED)
    assert {name for name, place in entry.places.items() if place.status == "due"} >= {"state", "view"}
    home.purge()
    run_job(home.job, NOW_MS + 1)
    assert home.found() == set()
    assert home.naming() == {"state", "view", "archive", "logs", "audit", LEDGER}, "who was erased is known, not what they did"
    after = home.replay()
    assert after.ok, after.to_text()
    for name in ("rankings_read", "rankings_replayed", "excluded", "digests_equal", "events_read", "events_rejected", "bytes_compared"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.rows_different, after.bytes_different, after.offsets_without_record) == (0, 0, 0)
    replayed = {name: (row.events_visible, row.events_missing) for name, row in (("before", before), ("after", after))}
    assert replayed["before"] == replayed["after"]


def test_late_events_of_the_past_still_touch_the_row_and_are_still_dropped(home):
    run_job(home.job, NOW_MS)
    values = [value for piece in ParquetLog(home.archive / ACTIONS).read(PARTITION) for value in piece.values if value is not None]
    batch_of_blanks = encode_action(user_id=ERASED, entity_kind=1, entity_id=0, action=1, event_time_ms=1, event_id=0)
    assert values.count(batch_of_blanks) > 5
    assert len(batch_of_blanks) == CANONICAL_BYTES


def test_a_second_run_and_a_run_that_was_cut_off_change_nothing_more(home, monkeypatch):
    replaced = []
    real = Path.replace

    def replace_until_cut(self, target):
        replaced.append(Path(target).name)
        if len(replaced) == 6:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_until_cut)
    with pytest.raises(KeyboardInterrupt):
        run_job(home.job, NOW_MS)
    monkeypatch.undo()
    assert home.replay().ok, "in the middle, too"
    run_job(home.job, NOW_MS + 1)
    home.purge()
    assert home.found() == set()
    files = {path: path.read_bytes() for path in home.path.rglob("*.parquet")}
    assert run_job(home.job, NOW_MS + 2).removed == {"archives": 2, "canonical logs": 0, "embeddings": 0}
    assert {path: path.read_bytes() for path in home.path.rglob("*.parquet")} == files
    assert len(read_ledger(home.path / LEDGER)) == 1


def test_requests_that_servers_keep_for_their_next_start_forget_the_user_too(home):
    folder, other = home.path / WARM, ERASED + 1
    requests = [RankRequest(user_id=ERASED), RankRequest(user_id=other), RankRequest(user_id=other, identities=[ERASED])]
    folder.mkdir()
    write_samples(folder / "home.pb", requests)
    (folder / ".home.pb.part").write_bytes(requests[0].SerializeToString())  # of a killed server
    assert run_job(home.job, NOW_MS).removed["warm-up requests"] == 2
    assert read_samples(folder / "home.pb") == [requests[1]]
    assert not any(ERASED.to_bytes(8, "little") in path.read_bytes() for path in folder.iterdir())
    (entry,) = Audit(home.path / AUDIT).of_user(ERASED)
    assert entry.places["warm-up requests"].status == "done"
    assert run_job(home.job, NOW_MS + 1).removed["warm-up requests"] == 0


def test_an_archive_made_later_and_one_from_another_log_are_rewritten_too(home, tmp_path):
    run_job(home.job, NOW_MS)
    home.purge()
    write_archive(home.world.actions, home.path / "again" / ACTIONS)
    other = replace(home.world.actions, log_epoch=EPOCH + 1)
    write_archive(other, tmp_path / "elsewhere")
    assert home.found() == {"again"}
    run_job(replace(home.job, archives=(tmp_path / "elsewhere",)), NOW_MS)
    assert home.found() == set()
    wanted = [number.to_bytes(8, "little") for number in home.secrets]
    left = [value for piece in ParquetLog(tmp_path / "elsewhere").read(PARTITION) for value in piece.values if value is not None]
    # The late events came after the erasure, and that log may hold no erasure which would drop them: it is not known to be the same one.
    assert sum(any(part in value for part in wanted) for value in left) < len(home.secrets) / 2


def test_old_programs_refuse_what_they_would_misread(home):
    manifest = home.archive / ACTIONS / "archive.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**said, "archive_version": 1}))
    before = [len(piece) for piece in ParquetLog(home.archive / ACTIONS).read(0)]
    run_job(home.job, NOW_MS)
    assert json.loads(manifest.read_text())["archive_version"] == 2
    assert [len(piece) for piece in ParquetLog(home.archive / ACTIONS).read(0)] == before
    manifest.write_text(json.dumps({**said, "archive_version": 3}))
    with pytest.raises(ArchiveError, match="version 3, this program reads 2"):
        ParquetLog(home.archive / ACTIONS)


def hold_state(folder, held, release):
    store = RocksStore(folder, definitions(SHOP)).open(PARTITION, EPOCH)
    held.set()
    release.wait(60)
    store.close()


def test_a_state_that_nobody_uses_is_removed_before_the_deadline(home):
    run_job(home.job, NOW_MS)
    home.close()
    home.held = {}
    half_ms = home.erased_ms + DEADLINE_MS // 2 + 1
    states = home.path / "state" / "worker-0"
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    worker = context.Process(target=hold_state, args=(states, held, release))
    worker.start()
    try:
        assert held.wait(60)
        run_job(home.job, half_ms)
        assert (states / str(PARTITION) / "CURRENT").exists(), "a worker holds it"
    finally:
        release.set()
        worker.join(60)
    assert worker.exitcode == 0
    run_job(home.job, half_ms - 2)
    assert (states / str(PARTITION)).exists(), "a worker may still come back to it"
    aside = states / f"{PARTITION}.damaged"
    checkpoint = states / "checkpoints" / f"{PARTITION}-17"
    for copy in (aside, checkpoint):
        shutil.copytree(states / str(PARTITION), copy)
    run_job(home.job, half_ms)
    assert Audit(home.path / AUDIT).of_user(ERASED)[0].places["state"].status == "due", "the copy that was set aside is not a day old"
    assert not (states / str(PARTITION)).exists()
    assert not (home.path / "view" / str(PARTITION)).exists()
    assert (states / str(1 - PARTITION)).exists()
    run_job(home.job, int(aside.stat().st_mtime * 1000) + DAY_MS + 1_000)
    assert not aside.exists()
    assert not checkpoint.exists()
    assert home.found() == set()


def test_snapshots_go_some_time_after_the_purge(home):
    removed = []
    job = replace(home.job, expire_snapshots=removed.append)

    def status(now_ms):
        run_job(job, now_ms)
        return Audit(home.path / AUDIT).of_user(ERASED)[0].places["snapshots"].status

    assert status(NOW_MS) == "due"
    home.purge()
    assert status(NOW_MS + 1) == "due", "there may be no snapshot from after the purge yet"
    assert removed == []
    assert status(NOW_MS + DAY_MS) == "done"
    assert status(NOW_MS + DAY_MS + 1) == "done"
    assert removed == [NOW_MS + 1 + DAY_MS // 12], "once"


def test_what_is_due_behind_the_deadline_is_overdue(home):
    home.purge()
    assert not run_job(home.job, home.erased_ms + DEADLINE_MS).overdue
    summary = run_job(home.job, home.erased_ms + DEADLINE_MS + 1)
    assert summary.due == 1
    assert summary.overdue == [f"user {ERASED:016x}: {place}" for place in ("dead letters", "ranking log", "actions topic")]


def erasure(user=1, event_id=2, offset=3, append_time_ms=1_000):
    return Erasure(user, event_id, EPOCH, 0, offset, append_time_ms, "asked")


def test_a_retried_erasure_is_one_for_the_audit(tmp_path):
    path = tmp_path / AUDIT
    audit = Audit(path)
    once, again, other = erasure(), erasure(offset=9, append_time_ms=5_000), erasure(event_id=7, offset=5)
    assert audit.asked([once, other], 100, 50) == 2
    for place in PLACES:
        audit.set(audit.entries[key_of(once)], place, "done", "", 60)
    audit.write()
    assert audit.asked([once, again, other], 100, 70) == 1
    for found in (audit, Audit(path)):
        entry = found.entries[key_of(once)]
        assert (entry.records, entry.asked_ms, entry.deadline_ms, entry.last.offset) == (2, 1_000, 1_100, 9)
        assert entry.open, "what came between the two is due again"
        assert len(found.entries) == 2
    assert Audit(path).asked([once, again, other], 100, 80) == 0
    unnamed = [erasure(event_id=0, offset=offset) for offset in (20, 21)]
    assert len({key_of(one) for one in unnamed}) == 2, "without an event id each record is an erasure"


def test_a_torn_last_line_is_cut_off_and_any_other_is_an_error(tmp_path):
    path = tmp_path / LEDGER
    append_lines(path, [erasure().to_json()])
    with path.open("ab") as file:
        file.write(b'{"user_id": "00')
    assert read_ledger(path) == [erasure()]
    append_lines(path, [erasure(offset=4).to_json()])
    assert read_ledger(path) == [erasure(), erasure(offset=4)]
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(LedgerError, match="line 1"):
        read_ledger(path)
    assert read_ledger(tmp_path / "none") == []


def test_erased_times_of_many_users():
    erased = erased_users([erasure(user=5, append_time_ms=10), erasure(user=5, append_time_ms=7), erasure(user=2**64 - 1)])
    users = np.array([0, 5, 6, 2**64 - 1], np.uint64)
    assert erased_before_ms(erased, users).tolist() == [-1, 10, -1, 1_000]
    assert erased_before_ms({}, users).tolist() == [-1] * 4


def test_canonical_logs_keep_other_users_and_what_the_user_did_since(home):
    folder = home.path / "logs" / SHOP.name
    before = list(read_actions(folder, SHOP))
    run_job(home.job, NOW_MS)
    after = list(read_actions(folder, SHOP))
    was, now = ([batch.users for batch in batches] for batches in (before, after))
    assert np.concatenate(now).size < np.concatenate(was).size
    others = [[batch.events[batch.users != ERASED].tobytes() for batch in batches] for batches in (before, after)]
    assert b"".join(others[0]) == b"".join(others[1])
    mine = np.concatenate([batch.events["event_time_ms"][(batch.users == ERASED) & ~batch.erase] for batch in after])
    assert len(mine) > 5
    assert (mine > home.erased_ms).all()
    assert sum(int(batch.erase.sum()) for batch in after) == 1
    times = pq.read_table(folder / IMPRESSIONS).to_pydict()
    left = [time for user, time in zip(times["user_id"], times["request_time_ms"], strict=True) if user == ERASED]
    assert min(left) > home.erased_ms
    assert times["user_id"].count(ERASED) > 5


def test_a_log_that_is_a_base_s_history_stays_and_is_said_to_be_due(home):
    """The base names its files by their content: rewritten, no state could be rebuilt from it. So a person has to bootstrap again."""
    folder = home.path / "logs" / SHOP.name
    history = History(str(folder))
    base = Base(tuple(map(history.describe, history.files)), 1, 0, 0, 1, SHOP.future_tolerance_ms, ())
    write_base_file(home.path, base, str(folder))
    run_job(home.job, NOW_MS)
    home.purge()
    summary = run_job(home.job, NOW_MS + 1)
    assert home.found() == {"logs"}
    (entry,) = Audit(home.path / AUDIT).of_user(ERASED)
    assert (entry.places["base history"].status, entry.places["canonical logs"].status) == ("due", "absent")
    assert summary.due == 1
    (home.path / "base.json").unlink()
    run_job(home.job, NOW_MS + 2)
    assert home.found() == set()
    (entry,) = Audit(home.path / AUDIT).of_user(ERASED)
    assert (entry.places["base history"].status, entry.places["canonical logs"].status) == ("absent", "done")


def test_generations_keep_their_name_and_everybody_else(home):
    root = home.path / "tables"
    (older, newer) = generation_names(root, "two_tower")
    before = open_generation(root, "two_tower", newer, verify=True)
    users, vectors = before.ids(USER).copy(), np.array(before.vector_table(USER))
    run_job(home.job, NOW_MS)
    after = open_generation(root, "two_tower", newer, verify=True)
    kept = users != ERASED
    assert after.ids(USER).tolist() == users[kept].tolist()
    assert (after.vector_table(USER) == vectors[np.concatenate(([True], kept))]).all()
    assert after.vectors(USER, np.array([ERASED], np.uint64)).tobytes() == vectors[:1].tobytes(), "as an unknown user"
    assert generation_names(root, "two_tower") == [older, newer]
    assert not list(root.glob("*/.*"))
    (root / "two_tower" / ".dropping-x").mkdir()
    (root / "two_tower" / older).rename(root / "two_tower" / ".dropping-x" / older)
    assert generation_names(root, "two_tower") == [newer], "killed between the two renames"
    run_job(home.job, NOW_MS)
    assert generation_names(root, "two_tower") == [older, newer]
    assert not list(root.glob("*/.*"))


def test_an_idle_user_s_row_is_replayed_as_none_once_the_log_s_clock_has_passed_it(tmp_path):
    world = make_world(tmp_path, DOMAIN, random_actions())
    digests = [record.row_digest for record in world.records() if record.request.user_id == IDLE]
    none = xxhash.xxh3_64_intdigest(b"")
    assert digests[-1] == none
    assert any(digest != none for digest in digests)
    assert world.replay(tmp_path).ok
    for record in world.records():
        if record.request.user_id == IDLE and record.row_digest == none:
            record.row_digest = next(digest for digest in digests if digest != none)
    assert world.replay(tmp_path).rows_different == digests.count(none)


@pytest.mark.servers
def test_topics_are_judged_by_what_they_still_hold(home, kafka):
    """Real topics: the promise is checked against their settings, and the audit against their oldest record."""
    config = KafkaConfig(kafka.bootstrap)
    names = ("actions", "dead_letters", "rankings", "announcements")
    topics = Topics(**{name: f"erasure.{name}" for name in names})
    identity = ensure_topics(config, topics, partition_count=PARTITIONS)
    bounded = [topics.actions, topics.dead_letters, topics.rankings]
    warnings = check_retention(config, bounded, deadline_ms=DEADLINE_MS, strict=False)
    assert [warning.split(":")[0] for warning in warnings] == [f"topic {name}" for name in bounded]
    assert "for ever" in warnings[0]
    assert f"--entity-name {topics.actions} --add-config cleanup.policy=delete,retention.ms=" in warnings[0]
    with pytest.raises(TopicError, match=r"erasure\.actions.*erasure\.rankings"):
        check_retention(config, bounded, deadline_ms=DEADLINE_MS, strict=True)
    short = Topics(**{name: f"erasure.short.{name}" for name in names})
    ensure_topics(config, short, partition_count=1, retention_ms=20 * DAY_MS)
    assert check_retention(config, [short.actions, short.rankings], deadline_ms=DEADLINE_MS, strict=True) == []
    (warning,) = check_retention(config, [short.actions], deadline_ms=25 * DAY_MS, strict=False)
    assert "up to 27.0 days" in warning, "retention and segment together"

    producer = new_producer(config, "test")
    for partition, records in home.world.actions.records.items():
        for append_ms, key, value in records:
            producer.produce(topics.actions, value, key, partition, headers=[(APPEND_TIME_HEADER, str(append_ms).encode())])
    producer.produce(topics.actions, encode_erase(user_id=ERASED, event_id=77, reason="again"), user_key(ERASED), PARTITION)
    producer.produce(topics.rankings, b"a ranking", user_key(ERASED))
    assert producer.flush(30) == 0
    assert oldest_record_ms(config, topics.dead_letters) is None
    job = replace(home.job, kafka=config, topics=topics)
    first = run_job(job, NOW_MS)
    assert (first.new, first.warnings) == (3, []), "of the archive, of the topic, and the one with an event id of its own"
    ends = end_offsets(config, topics.actions, range(PARTITIONS))
    cursor = json.loads((home.path / "audit" / "cursor.json").read_text())
    assert [cursor[f"{identity.epoch:016x}:{partition}"] for partition in range(PARTITIONS)] == [ends[p] for p in range(PARTITIONS)]
    last = Audit(home.path / AUDIT).of_user(ERASED)[-1]
    assert (last.last.event_id, last.last.reason) == (77, "again")
    assert (last.places["actions topic"].status, last.places["dead letters"].status) == ("due", "done")
    assert run_job(job, NOW_MS).new == 0
    assert isinstance(run_job(replace(job, kafka=None), NOW_MS), Summary)


def test_one_run_at_a_time(tmp_path):
    job = ErasureJob(home=tmp_path, domain=SHOP, deadline_ms=DEADLINE_MS)
    write_archive(MemoryLog("actions", EPOCH, {0: [(1, user_key(1), b"garbage")]}), tmp_path / "archive")
    with pytest.raises(StreamError, match="another run"):
        run_job(job, NOW_MS, lambda _: run_job(job, NOW_MS))
    assert run_job(job, NOW_MS) == Summary()


def test_an_empty_home_has_nothing_to_do(tmp_path):
    assert run_job(ErasureJob(home=tmp_path, domain=SHOP, deadline_ms=DEADLINE_MS), NOW_MS) == Summary()
    log = MemoryLog("actions", EPOCH, {0: [(1, user_key(1), b"garbage")]})
    write_archive(log, tmp_path / "archive")
    assert run_job(ErasureJob(home=tmp_path, domain=SHOP, deadline_ms=DEADLINE_MS), NOW_MS) == Summary()

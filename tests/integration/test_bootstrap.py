"""Bootstrap: files of history to stores, then a real broker's log without a gap or a double, and parity on top of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams_world import DOMAIN, DOMAIN_TOML, new_world, random_load, read_log, worker
from typer.testing import CliRunner

from deploy.cli import app
from deploy.kafka_server import KafkaServer
from deploy.options import settings_for
from deploy.processes import kafka_config
from features.base import Base, BaseError
from features.ids import partitions_of
from features.logs import ACTIONS, IMPRESSIONS, LoggedActions, LogWriter, actions_schema
from features.oracle import history_batch, naive_fold
from features.sequence import decode_row, definition
from streams.archive import Span
from streams.bootstrap import BUCKET_EVENTS, bootstrap, check_continues
from streams.errors import StateError
from streams.history import History, open_base
from streams.kafka import log_identity
from streams.producer import ActionProducer
from streams.state import check_base, definitions
from streams.store import RocksStore

EPOCH, PARTITIONS = 7, 3


def history(count: int, user_count: int, seed: int, erased: tuple[int, ...] = ()) -> LoggedActions:
    """Unsorted actions, and an erasure of some users in the middle of them."""
    users, events = random_load(count, user_count, seed)
    append_time_ms = events["event_time_ms"] + 50
    found = LoggedActions.imported(users, events, append_time_ms)
    for i, user in enumerate(erased):
        place = count // 2 + i
        found.users[place], found.erase[place], found.events[place] = user, True, np.zeros((), events.dtype)
    return found


def columns(actions: LoggedActions) -> dict[str, np.ndarray]:
    found = {name: actions.events[name] for name in actions.events.dtype.names}
    found |= {"user_id": actions.users, "append_time_ms": actions.append_time_ms, "erase": actions.erase}
    return {name: np.ascontiguousarray(column) for name, column in found.items()}


def write_export(folder: Path, actions: LoggedActions, *, files: int = 3, seed: int = 0, **change: object) -> Path:
    """Plain Parquet files in no order, with small row groups."""
    order = np.random.default_rng(seed).permutation(len(actions))
    (folder / "year=2024").mkdir(parents=True)
    for i, where in enumerate(np.array_split(order, files)):
        table = pa.table({name: column[where] for name, column in (columns(actions) | change).items() if column is not None})
        pq.write_table(table, folder / "year=2024" / f"part-{i}.parquet", row_group_size=500)
    return folder


def rows_of(state: Path, partition_count: int, epoch: int) -> dict[tuple[str, int], bytes]:
    """Every row by sequence and user; each must stand in its user's partition."""
    found = {}
    names = {sequence.id: name for name, sequence in DOMAIN.sequence.items()}
    for partition in range(partition_count):
        held = RocksStore(state, definitions(DOMAIN), cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(partition, epoch)
        keys = [key for key, _ in held.scan()]
        assert keys == sorted(keys)
        for key, row in held.scan():
            user = int.from_bytes(key[1:], "big")
            assert partitions_of(np.array([user], np.uint64), partition_count)[0] == partition
            assert held.get([key]) == [row]
            found[names[key[0]], user] = row
        assert held.meta.applied_offset == -1
        held.close()
    return found


def check_rows(rows: dict[tuple[str, int], bytes], actions: LoggedActions, clock_ms: int) -> None:
    naive = naive_fold([history_batch(actions, EPOCH, 0)], clock_ms)
    expected = {}
    for name in DOMAIN.sequence:
        for user, found in naive.items():
            sequence = found.sequence(definition(DOMAIN, name))
            if len(sequence) or found.erasures:
                expected[name, user] = sequence.tobytes()
    assert {place: decode_row(row).events.tobytes() for place, row in rows.items()} == expected


@pytest.mark.parametrize("bucket_events", [BUCKET_EVENTS, 100])
def test_stores_hold_the_naive_fold_of_the_files(tmp_path, bucket_events):
    """Also in many small buckets, and with a user whose past is many times larger than a bucket."""
    actions = history(4_000, 70, seed=1, erased=(3, 4, 999))
    actions.users[::4] = np.where(actions.erase[::4], actions.users[::4], 1)
    source = write_export(tmp_path / "export", actions)
    steps = []
    base = bootstrap(
        str(source),
        DOMAIN,
        tmp_path / "state",
        PARTITIONS,
        lambda base_id: EPOCH if len(base_id) == 32 else 0,
        processes=2,
        progress=lambda *step: steps.append(step),
        bucket_events=bucket_events,
    )
    assert (base.events, base.erasures, base.rejected) == (3_997, 3, 0)
    assert base.clock_ms == actions.append_time_ms.max()
    assert [file.name for file in base.files] == [f"year=2024/part-{i}.parquet" for i in range(3)]
    rows = rows_of(tmp_path / "state", PARTITIONS, EPOCH)
    check_rows(rows, actions, base.clock_ms)
    assert [step for step in steps if step[1] == step[2]] == [("read", 4_000, 4_000), ("fold", steps[-1][2], steps[-1][2])]
    assert (steps[-1][2] > PARTITIONS) == (bucket_events == 100)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["0", "1", "2"], "nothing is left of the work"
    with open_base(base, str(source)) as found:
        assert len(found.row_groups()) == 9


def test_the_same_base_again_builds_what_is_missing_and_another_is_refused(tmp_path):
    actions = history(600, 20, seed=2)
    source = write_export(tmp_path / "export", actions, files=1)
    state = tmp_path / "state"

    def build(**options):
        return bootstrap(str(source), DOMAIN, state, PARTITIONS, lambda base_id: int(base_id[:8], 16), processes=1, **options)

    base = build()
    epoch = int(base.id[:8], 16)
    rows = rows_of(state, PARTITIONS, epoch)
    (state / "1").rename(tmp_path / "lost")
    (state / "2").rename(tmp_path / "also lost")
    RocksStore(state, definitions(DOMAIN), cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(2, epoch).close()  # a worker looked
    (state / ".bootstrap" / "spill").mkdir(parents=True)  # of a run that was killed
    (state / ".bootstrap" / "spill" / "3-1").write_bytes(bytes(48))
    kept_inode = (state / "0").stat().st_ino
    assert build() == base
    assert rows_of(state, PARTITIONS, epoch) == rows
    assert (state / "0").stat().st_ino == kept_inode
    write_export(tmp_path / "export2", history(600, 20, seed=3), files=1)
    source = tmp_path / "export2"
    with pytest.raises(StateError, match=r"belongs to log .*Bootstrap builds beside no other state: move .*state away"):
        build()
    with pytest.raises(BaseError, match="no"):
        build(check=lambda _: (_ for _ in ()).throw(BaseError("no")))
    assert rows_of(state, PARTITIONS, epoch) == rows


def test_canonical_logs_and_short_exports_are_read(tmp_path):
    actions = history(300, 9, seed=4)
    with LogWriter(tmp_path / "log", ACTIONS, actions_schema(DOMAIN)) as writer:
        order = np.argsort(actions.append_time_ms, kind="stable")
        writer.write_actions(LoggedActions.imported(actions.users[order], actions.events[order], actions.append_time_ms[order]))
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "log" / IMPRESSIONS)
    assert History(str(tmp_path / "log")).files == (ACTIONS,)
    assert History(str(tmp_path / "log" / ACTIONS)).files == (ACTIONS,)
    absent = dict.fromkeys(("append_time_ms", "erase", "request_id", "surface", "value"))
    with History(str(write_export(tmp_path / "short", actions, files=1, **absent))) as short:
        (first, *_) = short.read(short.row_groups()[0])
    assert (first.append_time_ms == first.events["event_time_ms"]).all()
    assert np.isnan(first.events["value"]).all()
    assert not first.erase.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": np.arange(30)}, r"part-0.parquet: column user_id is int64, expected uint64"),
        ({"event_id": None}, r"column event_id is missing, expected uint64"),
        ({"entity_id": pa.array([None, *range(29)], pa.uint64())}, r"column entity_id has nulls"),
        ({"action": np.zeros(30, np.uint8)}, r"holds no action that the log would take \(30 were rejected\)"),
    ],
)
def test_wrong_columns_are_named(tmp_path, change, message):
    actions = history(30, 3, seed=5)
    (tmp_path / "export").mkdir()
    pq.write_table(
        pa.table({k: v for k, v in (columns(actions) | change).items() if v is not None}), tmp_path / "export" / "part-0.parquet"
    )
    with pytest.raises(BaseError, match=message):
        bootstrap(str(tmp_path / "export"), DOMAIN, tmp_path / "state", PARTITIONS, lambda _: EPOCH, processes=1)
    assert list((tmp_path / "state").iterdir()) == []


def test_a_base_is_its_files(tmp_path):
    source = write_export(tmp_path / "export", history(30, 3, seed=6), files=1)
    base = Base((History(str(source)).describe("year=2024/part-0.parquet"),), 30, 0, 0, 1, 1, ())
    open_base(base, str(source)).close()
    path = source / "year=2024" / "part-0.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(BaseError, match=f"part-0.parquet is not the file that base {base.id} was made of"):
        open_base(base, str(source))
    with pytest.raises(BaseError, match=r"part-0\.parquet is not there"):
        open_base(base, str(tmp_path))
    with pytest.raises(BaseError, match="no Parquet file"):
        _ = History(str(tmp_path / "nowhere")).files


@pytest.fixture
def settings(kafka, tmp_path, monkeypatch, request):
    """The command's settings: a home, and topics of this test's own on the shared broker."""
    world = new_world(kafka.bootstrap, tmp_path, request.node.name)
    (tmp_path / "domain.toml").write_text(DOMAIN_TOML, "utf-8")
    for name, value in (
        ("HOME", str(tmp_path / "home")),
        ("DOMAIN", str(tmp_path / "domain.toml")),
        ("KAFKA_BOOTSTRAP", kafka.bootstrap),
        ("TOPIC_ACTIONS", world.topics.actions),
        ("TOPIC_DEAD_LETTERS", world.topics.dead_letters),
        ("TOPIC_RANKINGS", world.topics.rankings),
        ("TOPIC_ANNOUNCEMENTS", world.topics.announcements),
    ):
        monkeypatch.setenv(f"FRESHRANK_{name}", value)
    return world


@pytest.mark.servers
def test_history_then_kafka_without_a_gap_or_a_double(settings, tmp_path):
    world = settings
    actions = history(3_000, 40, seed=8, erased=(5,))
    source = write_export(tmp_path / "export", actions)
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    tail = slice(2_400, 3_000)  # the log begins inside of the history
    producer.produce_many(actions.users[tail], actions.events[tail], actions.append_time_ms[tail])
    producer.flush()

    told = CliRunner().invoke(app, ["bootstrap", "--log", str(source)], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "home" / "base.json").read_text())
    base, place = Base.from_json(json.dumps(found), "base.json")
    assert base.id == told.stdout.strip()
    assert place == str(source)
    epoch = log_identity(world.kafka, world.topics.actions, base.id).epoch
    assert epoch != world.identity.epoch
    topics = replace(world.topics, base=base.id)
    config = replace(world.config, topics=topics, state_folder=tmp_path / "home" / "state" / "worker-0")
    world = replace(world, topics=topics, config=config, identity=log_identity(world.kafka, topics.actions, base.id))

    more, events = random_load(1_000, 45, seed=9)
    events["event_time_ms"] += 5_000
    with worker(config) as running:
        running.ready()
        reader = world.reader()
        assert reader.position(1).log_epoch == epoch
        producer.erase(6, "asked for")
        producer.produce_many(more, events)
        producer.flush()
        world.wait_applied(reader)
        naive = naive_fold([history_batch(actions, epoch, 0), *read_log(world)], base.clock_ms)
        assert len(naive) == 45
        for name in DOMAIN.sequence:
            for user, known in naive.items():
                (reading,) = reader.read(name, [user])
                assert decode_row(reading.row, user).events.tobytes() == known.sequence(definition(DOMAIN, name)).tobytes(), user
        reader.close()
    producer.close()

    refused = replace(config, state_folder=tmp_path / "empty")
    with worker(refused) as running:
        assert running.wait() == 1, "a worker on a base does not begin with an empty state"


@pytest.mark.servers
def test_a_gap_is_refused_unless_allowed(settings, tmp_path):
    actions = history(200, 10, seed=10)
    source = write_export(tmp_path / "export", actions, files=1)
    producer = ActionProducer(settings.kafka, DOMAIN, settings.topics.actions)
    late = actions.events[:20].copy()
    late["event_time_ms"] = actions.append_time_ms.max() + 700_000
    producer.produce_many(actions.users[:20], late, late["event_time_ms"])
    producer.close()
    command = ["bootstrap", "--log", str(source)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BaseError)
    assert "actions of 700 s are in neither. Add the history up to there, or accept the loss with --allow-gap" in str(refused.exception)
    assert not (tmp_path / "home" / "base.json").exists()
    allowed = CliRunner().invoke(app, [*command, "--allow-gap"], catch_exceptions=False)
    assert allowed.exit_code == 0
    assert "gap accepted" in allowed.stderr


@pytest.mark.servers
def test_a_local_home_needs_no_running_stack(tmp_path, monkeypatch):
    """The home's own Kafka runs as long as the command does; what a stack starts there later knows the base."""
    (tmp_path / "domain.toml").write_text(DOMAIN_TOML, "utf-8")
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    source = write_export(tmp_path / "export", history(500, 10, seed=11), files=1)
    told = CliRunner().invoke(app, ["bootstrap", "--log", str(source), "--domain", str(tmp_path / "domain.toml")], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    settings = settings_for(None)
    assert settings.log_base == told.stdout.strip()
    assert settings.domain == tmp_path / "home" / "domain.toml"
    with KafkaServer(settings.home / "kafka") as server:
        settings = settings.model_copy(update={"kafka_bootstrap": server.bootstrap})
        identity = log_identity(kafka_config(settings), settings.topic_actions, settings.log_base)
        rows = rows_of(settings.home / "state" / settings.worker_instance, settings.partitions, identity.epoch)
    assert len(rows) == 20


def test_a_log_cut_behind_the_history_is_a_gap():
    class Cut:
        topic, log_epoch, partitions = "t", 1, {0: (0, 5), 1: (3, 5), 2: (0, 0)}

        def read(self, partition):
            if partition < 2:
                yield LogPiece(np.array([1_000 if partition == 0 else 9_000]))

    class LogPiece:
        def __init__(self, append_time_ms):
            self.append_time_ms = append_time_ms

    log = Cut()
    log.partitions = {partition: Span(*span) for partition, span in log.partitions.items()}
    base = Base((), 1, 0, 0, 2_000, 0, ())
    assert "partition 1 now begins at offset 3" in check_continues(base, log, 500)
    assert check_continues(base, log, 7_000) is None
    log.partitions[1] = Span(0, 5)
    assert check_continues(base, log, 500) is None


def test_an_empty_state_on_a_base_is_refused(tmp_path):
    held = RocksStore(tmp_path, definitions(DOMAIN), cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
    check_base(held.meta, "", "here")
    with pytest.raises(StateError, match="here: the log stands on base abc and there is no state of it here: run `freshrank bootstrap`"):
        check_base(held.meta, "abc", "here")
    held.close()

"""One suite over every sequence reader: the LMDB view, the same behind gRPC, the source that looks for the owner, and one in memory that is
built on the naive oracle."""

import multiprocessing
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import grpc
import lmdb
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from readers_world import DOMAIN, EPOCH, PARTITIONS, USERS, OracleReader, Routed, announced, batches, build_view, partition_for, serving

from features.actions import EVENT_DTYPE
from features.ports import Position, Reading, SequenceCorruptError, SequenceUnavailableError
from features.sequence import NEVER_ERASED, Row, decode_row, definition, encode_row
from protos.v1.sequence_pb2 import GetSequencesRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.errors import FencedError, StateError, StreamError, ViewError
from streams.owners import OWNER
from streams.reader_service import ReaderConfig
from streams.remote_reader import RemoteReader
from streams.state import META_KEY, Meta, definitions, fingerprints, row_key
from streams.view import PartitionView
from streams.view_reader import ViewReader


@pytest.fixture(params=["view", "remote", "oracle", "routed here", "routed away"])
def reader(request, tmp_path):
    with ExitStack() as stack:
        if request.param == "oracle":
            yield OracleReader(batches(1))
            return
        build_view(tmp_path, batches(1))
        if request.param == "routed here":
            found = Routed(tmp_path, announced())
        elif request.param == "routed away":
            address = stack.enter_context(serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS)))
            found = Routed(tmp_path / "none", announced(("a", address, OWNER)))
        elif request.param == "view":
            found = ViewReader(tmp_path, DOMAIN, PARTITIONS)
        else:
            found = RemoteReader(stack.enter_context(serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS))), DOMAIN, timeout_s=30.0)
        stack.callback(found.close)
        yield found


@pytest.mark.parametrize("sequence", ["main", "clicks"])
def test_rows_are_the_naive_fold(reader, sequence):
    readings = reader.read(sequence, USERS)
    assert readings == OracleReader(batches(1)).read(sequence, USERS)
    assert any(decode_row(reading.row).events.size for reading in readings if reading.row)


def test_readings_stand_in_the_order_asked_for(reader):
    asked = [USERS[3], 999, USERS[0], USERS[3]]
    assert [reading.user_id for reading in reader.read("main", asked)] == asked
    assert reader.read("main", []) == []


def test_an_unknown_user_has_an_empty_row_and_a_watermark(reader):
    (reading,) = reader.read("main", [999])
    assert reading.row == b""
    assert reading.watermark == Position(EPOCH, partition_for(999), 79)
    assert reading.log_clock_ms == 200 + 40 + 39


def test_the_position_is_that_of_a_reading(reader):
    for reading in reader.read("main", USERS):
        assert reader.position(reading.user_id) == reading.watermark


def test_an_unknown_sequence_is_an_error(reader):
    with pytest.raises(KeyError):
        reader.read("nope", USERS)


def test_any_number_of_users_can_be_read(reader):
    asked = [*range(10_000, 12_100), USERS[0]]
    readings = reader.read("main", asked)
    assert [reading.user_id for reading in readings] == asked
    assert [reading.watermark for reading in readings] == [Position(EPOCH, partition_for(user), 79) for user in asked]
    assert readings[-1:] == OracleReader(batches(1)).read("main", USERS[:1])


# The age of the state.


def test_a_state_that_was_never_caught_up_has_no_age(reader):
    assert {reading.state_age_ms for reading in reader.read("main", USERS)} == {-1}


@pytest.mark.parametrize("remote", [False, True])
def test_the_age_runs_from_the_last_time_the_state_was_caught_up(tmp_path, remote):
    build_view(tmp_path, batches(1))
    user = next(user for user in USERS if partition_for(user) == 0)
    with ExitStack() as stack:
        if remote:
            reader = RemoteReader(stack.enter_context(serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS))), DOMAIN, timeout_s=30.0)
        else:
            reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
        stack.callback(reader.close)
        for ago_ms in (40_000, -60_000):
            caught_up_ms = now_ms() - ago_ms
            beat(tmp_path, caught_up_ms)
            (reading,) = reader.read("main", [user])
            # A clock that was set back makes a state new, never of negative age.
            assert max(0, ago_ms) <= reading.state_age_ms <= max(0, now_ms() - caught_up_ms)
        assert reader.read("main", [user]) == OracleReader(batches(1)).read("main", [user])
        assert [found.state_age_ms for found in reader.read("main", USERS) if found.watermark.partition == 1][:1] == [-1]


def beat(folder, caught_up_ms: int) -> None:
    """Says it of partition 0, as its worker does from another process (LMDB opens a file once in each)."""
    process = multiprocessing.get_context("spawn").Process(target=_beat, args=(folder, caught_up_ms))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _beat(folder, caught_up_ms: int) -> None:
    view = PartitionView(folder, 0, map_bytes=1 << 24)
    view.beat(caught_up_ms)
    view.close()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# What only the view can get wrong.


def test_nothing_is_read_before_there_is_a_view(tmp_path):
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    with pytest.raises(SequenceUnavailableError, match="is the worker running"):
        reader.read("main", USERS)
    assert reader.positions() == []
    build_view(tmp_path, batches(1))
    assert len(reader.read("main", USERS)) == len(USERS)
    reader.close()


def test_an_empty_partition_has_a_watermark(tmp_path):
    build_view(tmp_path, [])
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    assert [reading.watermark.offset for reading in reader.read("main", USERS[:1])] == [-1]
    reader.close()


def test_readers_wait_while_the_view_is_made_anew(tmp_path):
    build_view(tmp_path, batches(1))
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    meta = view.meta()

    def broken_scan():
        yield one_row(1, 1)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        view.rebuild(broken_scan(), meta)
    assert view.meta() is None
    view.close()
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    with pytest.raises(SequenceUnavailableError, match="rebuilding"):
        reader.read("main", [user for user in USERS if partition_for(user) == 0])
    assert reader.statistics()["unavailable"] == 1
    assert [position.partition for position in reader.positions()] == [1]
    reader.close()


def keys_in(view: PartitionView) -> list[bytes]:
    with view._environment.begin() as transaction:
        return [key for key, _ in transaction.cursor() if not key.startswith(b"\x00")]


def one_row(user: int, offset: int) -> tuple[bytes, bytes]:
    place = EPOCH, 0, offset
    row = Row(user, definition(DOMAIN, "main").fingerprint, *place, NEVER_ERASED, np.zeros(1, EVENT_DTYPE))
    return row_key(1, user), encode_row(row)


def test_a_view_of_another_definition_is_made_anew_and_one_beyond_the_log_is_refused(tmp_path):
    build_view(tmp_path, batches(1))
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    meta = view.meta()
    other = replace(meta, fingerprints=((1, 1),))
    assert view.sync(other, lambda: iter([one_row(7, 3)]), 1_000_000) == 1
    assert (view.meta(), keys_in(view)) == (other, [row_key(1, 7)])
    # What it shows is behind the log's end: that log lost records, and its other rows may be of the lost ones.
    shorter = replace(other, applied_offset=1)
    with pytest.raises(StateError, match="it lost records"):
        view.sync(shorter, lambda: iter([one_row(8, 1)]), other.applied_offset)
    assert (view.meta(), keys_in(view)) == (other, [row_key(1, 7)])
    view.close()


def test_a_view_of_a_log_that_was_truncated_and_has_grown_again_is_made_anew(tmp_path):
    build_view(tmp_path, batches(1))
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    shown = view.meta()
    behind = replace(shown, applied_offset=shown.applied_offset - 2, log_clock_ms=shown.log_clock_ms - 2)

    def adopt():
        view.rebuild([one_row(7, 3)], shown)
        view.sync(behind, lambda: iter(()), shown.applied_offset + 10)
        assert view.adopted == shown.applied_offset

    adopt()
    assert view.write([], [], replace(behind, applied_offset=shown.applied_offset - 1)), "not there yet"
    assert view.write([row_key(1, 7)], [b"not written"], replace(shown, leader_epoch=9))
    assert view.meta() == replace(shown, leader_epoch=9)
    adopt()
    assert not view.write([], [], replace(shown, log_clock_ms=shown.log_clock_ms + 1)), "of another log"
    adopt()
    assert not view.write([], [], replace(shown, applied_offset=shown.applied_offset + 1)), "passed by"
    # A crash between the store's write and the view's: the same offset, another log.
    assert view.sync(replace(shown, log_clock_ms=shown.log_clock_ms + 1), lambda: iter([one_row(8, 1)]), shown.applied_offset + 1) == 1
    assert keys_in(view) == [row_key(1, 8)]
    view.close()


def test_a_row_under_a_damaged_key_is_found_its_own_again(tmp_path):
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    meta = Meta(EPOCH, 0, 5, 50, fingerprints(definitions(DOMAIN)))
    rows = dict([one_row(7, 3), one_row(9, 4)])
    view.rebuild(sorted(rows.items()), meta)
    wrong = row_key(1, 8)
    view._put([(wrong, rows[row_key(1, 7)])])
    view._delete([row_key(1, 7)])
    assert view.mend(lambda keys: [rows.get(key) for key in keys], meta, 100) == 1
    assert view.rows([row_key(1, 7), wrong, row_key(1, 9)], meta) == [rows[row_key(1, 7)], None, rows[row_key(1, 9)]]
    view.close()


def test_a_view_behind_its_store_gets_the_rows_of_later_records_only(tmp_path):
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    meta = Meta(EPOCH, 0, 5, 50, fingerprints(definitions(DOMAIN)))
    rows = [one_row(7, 5), one_row(8, 4)]
    assert view.sync(meta, lambda: iter(rows), 100) == 2
    assert view.sync(meta, lambda: iter(rows), 100) == 0
    rows = [one_row(6, 9), one_row(7, 5), one_row(8, 6)]
    assert view.sync(replace(meta, applied_offset=9), lambda: iter(rows), 100) == 2
    with view._environment.begin() as transaction:
        assert [(key, row) for key, row in transaction.cursor() if not key.startswith(b"\x00")] == rows
    view.close()


def test_a_view_ahead_of_its_store_stays_until_the_store_passes_it(tmp_path):
    build_view(tmp_path, batches(1))
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    shown = view.meta()
    before = keys_in(view)
    older = replace(shown, applied_offset=shown.applied_offset - 5)
    assert view.sync(older, lambda: iter(()), 1_000_000) == 0
    key, row = one_row(7, shown.applied_offset)
    view.write([key], [row], shown)
    assert (view.meta(), keys_in(view)) == (shown, before)
    later = replace(shown, applied_offset=shown.applied_offset + 3)
    view.write([key], [one_row(7, later.applied_offset)[1]], later)
    assert view.meta() == later
    view.close()


def test_an_older_owner_is_fenced(tmp_path):
    build_view(tmp_path, batches(1))
    context = multiprocessing.get_context("spawn")  # one process opens a view once
    ready, go = context.Event(), context.Event()
    answers = context.Queue()
    older = context.Process(target=write_as_older_owner, args=(tmp_path, ready, go, answers))
    older.start()
    try:
        assert ready.wait(60)
        newer = PartitionView(tmp_path, 0, map_bytes=1 << 24)
        meta = newer.meta()
        go.set()
        assert answers.get(timeout=60) == ["FencedError"] * 3
        assert newer.meta() == meta
        newer.write([], [], replace(meta, applied_offset=meta.applied_offset + 1))
        newer.close()
    finally:
        go.set()
        older.join(30)
    assert older.exitcode == 0


def write_as_older_owner(folder, ready, go, answers) -> None:
    view = PartitionView(folder, 0, map_bytes=1 << 24)
    meta = view.meta()
    ready.set()
    assert go.wait(60)
    raised = []
    for attempt in (
        lambda: view.write([], [], replace(meta, applied_offset=meta.applied_offset + 7)),
        lambda: view.beat(1),
        lambda: view.rebuild(iter(()), meta),
    ):
        try:
            attempt()
        except StreamError as error:
            raised.append(type(error).__name__)
    answers.put(raised)
    view.close()


def test_a_view_of_an_earlier_boot_is_dropped_and_readers_follow(tmp_path):
    build_view(tmp_path, batches(1))
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    before = reader.read("main", USERS)
    for partition in range(PARTITIONS):
        (tmp_path / str(partition) / "boot").write_text("an earlier one")
    build_view(tmp_path, batches(2))
    after = reader.read("main", USERS)
    assert after == OracleReader(batches(2)).read("main", USERS)
    assert after != before
    assert reader.statistics()["reopened"] == PARTITIONS
    reader.close()


def test_a_view_of_an_earlier_boot_is_not_read(tmp_path):
    """It was not synced to disk, so a power loss may have torn it: rows of one moment, the watermark of another."""
    build_view(tmp_path, batches(1))
    for partition in range(PARTITIONS):
        (tmp_path / str(partition) / "boot").write_text("before the power went away")
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    with pytest.raises(SequenceUnavailableError, match="earlier boot"):
        reader.read("main", USERS)
    assert reader.positions() == []
    build_view(tmp_path, batches(1))
    assert reader.read("main", USERS) == OracleReader(batches(1)).read("main", USERS)
    reader.close()


def test_a_writer_whose_view_was_replaced_is_fenced(tmp_path):
    """Else it would go on writing what no reader sees: it may be the owner still, frozen for a while in a transaction."""
    build_view(tmp_path, batches(1))
    frozen = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    meta = frozen.meta()
    with frozen._writing():
        other = multiprocessing.get_context("spawn").Process(target=give_up_on_the_writer, args=(tmp_path,))
        other.start()
        other.join(60)
        assert other.exitcode == 0
    for attempt in (
        lambda: frozen.write([], [], replace(meta, applied_offset=meta.applied_offset + 1)),
        lambda: frozen.beat(1),
        lambda: frozen.rebuild(iter(()), meta),
    ):
        with pytest.raises(FencedError, match="replaced"):
            attempt()
    frozen.close()
    again = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    assert again.meta() is None
    again.close()


def give_up_on_the_writer(folder) -> None:
    PartitionView(folder, 0, map_bytes=1 << 24, lock_wait_s=0.0).close()


@pytest.mark.parametrize(
    ("damage", "says"), [("last bit", "checksum differs"), ("first bit", "not a sequence row"), ("other user", "another user")]
)
def test_a_row_that_cannot_be_trusted_is_data_loss(tmp_path, damage, says):
    build_view(tmp_path, batches(1))
    user, other = [user for user in USERS if partition_for(user) == 0][:2]
    with lmdb.open(str(tmp_path / "0"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        row = bytearray(transaction.get(row_key(1, user)))
        if damage == "last bit":
            row[-1] ^= 1
        elif damage == "first bit":
            row[0] ^= 1
        else:
            row = bytearray(transaction.get(row_key(1, other)))
        transaction.put(row_key(1, user), bytes(row))
    reader = ViewReader(tmp_path, DOMAIN, PARTITIONS)
    with pytest.raises(SequenceCorruptError, match=says):
        reader.read("main", [user])
    assert reader.statistics()["corrupt"] == 1
    reader.close()


@pytest.mark.parametrize("damage", ["bit", "other user", "nobody's"])
def test_damaged_rows_of_a_view_are_written_again_from_the_store(tmp_path, damage):
    build_view(tmp_path, batches(1))
    view = PartitionView(tmp_path, 0)
    with view._environment.begin() as transaction:
        good = {key: row for key, row in transaction.cursor() if not key.startswith(b"\0")}
    meta, (key, other) = view.meta(), sorted(good)[1:3]
    broken = {"bit": good[key][:-1] + bytes([good[key][-1] ^ 1]), "other user": good[other], "nobody's": b"x" * 80}[damage]
    place = row_key(1, 2**64 - 1) if damage == "nobody's" else key
    assert view.mend(lambda _: pytest.fail("nothing is damaged"), meta, 1_000) == 0
    with view._environment.begin(write=True) as transaction:
        transaction.put(place, broken)
    repaired = [view.mend(lambda keys: [good.get(key) for key in keys], meta, 2) for _ in range(len(good) // 2 + 2)]
    assert sum(repaired) == 1
    with view._environment.begin() as transaction:
        assert {key: row for key, row in transaction.cursor() if not key.startswith(b"\0")} == good
    view.close()


@pytest.mark.parametrize("at", [0, 4, 64])
def test_a_damaged_row_is_not_copied_into_a_view(tmp_path, at):
    view = PartitionView(tmp_path, 0, map_bytes=1 << 24)
    key, row = one_row(7, 5)
    damaged = row[:at] + bytes((row[at] ^ 1,)) + row[at + 1 :]
    with pytest.raises(SequenceCorruptError):
        view.sync(Meta(EPOCH, 0, 5, 50, fingerprints(definitions(DOMAIN))), lambda: iter([(key, damaged)]), 100)
    assert view.meta() is None
    view.close()


def test_a_view_of_other_definitions_is_not_read(tmp_path):
    build_view(tmp_path, batches(1))
    changed = DOMAIN.model_copy(update={"sequence": {**DOMAIN.sequence, "main": DOMAIN.sequence["main"].model_copy(update={"length": 5})}})
    reader = ViewReader(tmp_path, changed, PARTITIONS)
    with pytest.raises(SequenceUnavailableError, match=r"other \[sequence\] definitions"):
        reader.read("main", USERS)
    reader.close()


def test_a_full_view_is_an_error_that_says_what_to_raise(tmp_path):
    view = PartitionView(tmp_path, 0, map_bytes=1 << 17)
    meta = Meta(EPOCH, 0, 1, 1, fingerprints(definitions(DOMAIN)))
    with pytest.raises(ViewError, match="full at 131072 bytes: raise the worker's view_map_bytes"):
        view.write([row_key(1, user) for user in range(1, 100)], [b"x" * 4000] * 99, meta)
    assert view.meta() is None
    view.close()


# Over the wire.


@pytest.fixture
def served(tmp_path):
    """A channel to a reader service over a view that does not exist yet."""
    with serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS, reflection=True)) as address, grpc.insecure_channel(address) as channel:
        yield channel


def ask(channel, sequence: str, users: list[int]) -> list[Reading]:
    request = GetSequencesRequest(sequence=sequence, user_ids=np.array(users, "<u8").tobytes())
    answer = SequenceReaderStub(channel).GetSequences(request, timeout=30)
    places = [Position(found.watermark.log_epoch, found.watermark.partition, found.watermark.offset) for found in answer.sequences]
    return [Reading(found.user_id, found.row, place, found.log_clock_ms) for found, place in zip(answer.sequences, places, strict=True)]


def test_the_service_answers_as_the_view_does(served, tmp_path):
    health = health_pb2_grpc.HealthStub(served)
    check = health_pb2.HealthCheckRequest(service="freshrank.v1.SequenceReader")
    assert health.Check(check, timeout=30).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as refused:
        ask(served, "main", USERS)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    build_view(tmp_path, batches(1))
    expected = OracleReader(batches(1))
    for sequence in DOMAIN.sequence:
        assert ask(served, sequence, [*USERS, 999]) == expected.read(sequence, [*USERS, 999])
    deadline_s = time.monotonic() + 30
    while health.Check(check, timeout=30).status != health_pb2.HealthCheckResponse.SERVING:
        assert time.monotonic() < deadline_s


def replace_meta(view, data: bytes) -> bytes:
    """Sets the view's meta row from another process (LMDB opens a file once in each); returns the old one."""
    script = """
import sys, lmdb
with lmdb.open(sys.argv[1], map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
    sys.stdout.buffer.write(transaction.replace(bytes.fromhex(sys.argv[2]), sys.stdin.buffer.read()))
"""
    command = [sys.executable, "-c", script, str(view), META_KEY.hex()]
    return subprocess.run(command, input=data, check=True, capture_output=True, timeout=60).stdout


def test_the_service_outlives_a_view_that_cannot_be_trusted(served, tmp_path):
    build_view(tmp_path, batches(1))
    health = health_pb2_grpc.HealthStub(served)
    check = health_pb2.HealthCheckRequest(service="freshrank.v1.SequenceReader")

    def expect(status) -> None:
        deadline_s = time.monotonic() + 30
        while health.Check(check, timeout=30).status != status:
            assert time.monotonic() < deadline_s

    expect(health_pb2.HealthCheckResponse.SERVING)
    good = replace_meta(tmp_path / "0", b"garbage")
    expect(health_pb2.HealthCheckResponse.NOT_SERVING)
    replace_meta(tmp_path / "0", good)
    expect(health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize(
    ("sequence", "users", "names"), [("nope", [1], "sequence: 'nope'"), ("main", [], "user_ids"), ("main", [1] * 1001, "user_ids")]
)
def test_the_service_names_the_field_that_is_wrong(served, sequence, users, names):
    with pytest.raises(grpc.RpcError) as refused:
        ask(served, sequence, users)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(names)

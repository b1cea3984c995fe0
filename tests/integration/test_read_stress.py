"""Reads under a writer at full speed: every answer of every reader process is one moment of the state.

User u is rewritten by every batch whose number divides by u + 1, with that number in its row. So the watermark alone says which row each
user must have, also that some have none yet; and the view is made anew from time to time, which readers see as "nothing to read".
"""

import multiprocessing
import time
from dataclasses import replace

import numpy as np
from readers_world import DOMAIN, EPOCH

from features.actions import EVENT_DTYPE
from features.ports import SequenceUnavailableError
from features.sequence import NEVER_ERASED, Row, decode_row, definition, encode_row
from streams.state import Meta, definitions, fingerprints, row_key
from streams.view import PartitionView
from streams.view_reader import ViewReader

READERS, ENOUGH, DEADLINE_S = 3, 200, 60.0
USERS = [*range(40), 1_999, 9_999, 1 << 40]
"""Those of many digits get their first row late in the run, the last one never."""
REBUILT_EVERY = 300
MAP_BYTES = 1 << 26


def row_offset(user: int, watermark: int) -> int:
    """The last batch up to the watermark that rewrote the user; 0: none."""
    return watermark - watermark % (user + 1)


def encoded(user: int, offset: int) -> bytes:
    """A row whose size changes with the batch, so that pages are split and merged."""
    events = np.zeros(offset % 5 + 1, EVENT_DTYPE)
    events["event_time_ms"] = offset
    return encode_row(Row(user, definition(DOMAIN, "main").fingerprint, EPOCH, 0, offset, NEVER_ERASED, events))


def write_for_ever(folder, ready, stop, batches) -> None:
    view, number = PartitionView(folder, 0, map_bytes=MAP_BYTES), 0
    meta = Meta(EPOCH, 0, 0, 0, fingerprints(definitions(DOMAIN)))
    view.rebuild((), meta)
    ready.set()
    while not stop.is_set():
        number += 1
        meta = replace(meta, applied_offset=number)
        if number % REBUILT_EVERY:
            users = [user for user in USERS if number % (user + 1) == 0]
            view.write([row_key(1, user) for user in users], [encoded(user, number) for user in users], meta)
        else:
            stored = [(row_key(1, user), encoded(user, row_offset(user, number))) for user in USERS if row_offset(user, number)]
            view.rebuild(stored, meta)
    view.close()
    batches.put(number)


def read_enough(folder, seed: int, results) -> None:
    """Puts what was wrong, or how many moments were seen."""
    random, reader = np.random.default_rng(seed), ViewReader(folder, DOMAIN, 1)
    moments, rows, without_row, latest, deadline_s = 0, 0, 0, -1, time.monotonic() + DEADLINE_S
    while min(moments, rows, without_row) < ENOUGH:
        if time.monotonic() > deadline_s:
            results.put(f"in {DEADLINE_S} s only {moments} moments with {rows} rows and {without_row} users without one")
            return
        asked = random.choice(USERS, random.integers(1, len(USERS))).tolist()
        try:
            readings = reader.read("main", asked)
        except SequenceUnavailableError:
            continue
        watermark = readings[0].watermark.offset
        for user, reading in zip(asked, readings, strict=True):
            found = decode_row(reading.row, user) if reading.row else None
            offset, stamps = (found.offset, {found.offset, *found.events["event_time_ms"].tolist()}) if found else (0, {0})
            if (reading.watermark.offset, offset, stamps) != (watermark, row_offset(user, watermark), {offset}):
                results.put(f"user {user}: row {offset} {stamps} at watermark {reading.watermark.offset}, read with {watermark}")
                return
            rows, without_row = rows + bool(found), without_row + (found is None)
        if watermark < latest:
            results.put(f"watermark {watermark} behind {latest}")
            return
        moments, latest = moments + (watermark != latest), watermark
    reader.close()
    results.put("")


def test_every_read_is_one_moment_while_the_state_is_written(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, stop, batches, wrong = context.Event(), context.Event(), context.Queue(), context.Queue()
    writer = context.Process(target=write_for_ever, args=(tmp_path, ready, stop, batches))
    readers = [context.Process(target=read_enough, args=(tmp_path, seed, wrong)) for seed in range(READERS)]
    writer.start()
    try:
        assert ready.wait(DEADLINE_S)
        for reader in readers:
            reader.start()
        assert [wrong.get(timeout=2 * DEADLINE_S) for _ in readers] == [""] * READERS
        stop.set()
        assert batches.get(timeout=DEADLINE_S) > REBUILT_EVERY
    finally:
        stop.set()
        for process in (writer, *readers):
            if process.pid is not None:
                process.join(DEADLINE_S)
    assert [process.exitcode for process in (writer, *readers)] == [0] * (1 + READERS)


def test_the_check_sees_a_row_of_another_moment():
    assert [row_offset(user, 12) for user in (0, 3, 4, 11, 12)] == [12, 12, 10, 12, 0]
    assert decode_row(encoded(4, 10)).events["event_time_ms"].tolist() == [10]

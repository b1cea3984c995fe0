"""Lists that a pass wrote stay, whatever retention takes of the two logs before their day is closed."""

import shutil
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from label_world import (
    END_MS,
    FIRST_MS,
    HOUR_MS,
    START_MS,
    archived,
    domain_of,
    logged_lists,
    options_of,
    parts_of,
)
from test_replay import EPOCH, PARTITIONS, USERS, MemoryLog

from deploy.labelling import label
from features.erasures import Erasure, append_lines
from features.ids import partition_of, user_key
from features.logs import log_files, read_summary
from streams.archive import Span

MANY_BUCKETS = 2 << 20


@dataclass
class CutLog(MemoryLog):
    """A log whose partitions begin where retention has left them."""

    starts: dict[int, int] = field(default_factory=dict)

    @property
    def partitions(self):
        return {partition: Span(self.starts[partition], len(records)) for partition, records in self.records.items()}

    def read(self, partition):
        for records in super().read(partition):
            kept = np.flatnonzero(records.offsets >= self.starts[partition])
            if len(kept):
                yield records.take(kept)


def cut(log, before_ms):
    """Without the records from before a time, which are a log's first ones."""
    starts = {p: next((i for i, one in enumerate(found) if one[0] >= before_ms), len(found)) for p, found in log.records.items()}
    return CutLog(log.topic, log.log_epoch, log.records, starts=starts)


def labelled(world, home, **more):
    """(report, lists by key) of a pass over these logs."""
    archived(world, home / "archive")
    options = options_of(world, home / "archive", home, **more)
    return label(options), logged_lists(options.out, domain_of(world))


def closed_before_ms(home):
    return read_summary(home / "logs" / "shop.served")["label"]["closed_before_ms"]


def served_rows(home):
    rows = {}
    for path in log_files(home / "logs" / "shop.served", "served.parquet"):
        for row in pq.read_table(path).to_pylist():
            rows[row["user_id"], row["request_id"], row["request_time_ms"]] = row
    return rows


@pytest.mark.parametrize("memory_bytes", [512 << 20, MANY_BUCKETS])
@pytest.mark.parametrize("hours", [8, 26, 33, 1_000])
def test_retention_that_reaches_both_logs_takes_no_list(world, home, hours, memory_bytes):
    """Into the open days of the pass before, behind it, and to the end of both logs."""
    before, closed_ms = logged_lists(home / "logs" / "shop.served", domain_of(world)), closed_before_ms(home)
    _, whole = labelled(world, home.parent / "whole")
    cut_ms = START_MS + hours * HOUR_MS
    short = replace(world, actions=cut(world.actions, cut_ms), rankings=cut(world.rankings, cut_ms))
    report, after = labelled(short, home, memory_bytes=memory_bytes)
    assert before.keys() <= after.keys()
    gone = {key for key in before if key[2] < cut_ms - HOUR_MS}
    assert {key: after[key] for key in gone} == {key: before[key] for key in gone}
    assert report.stays >= sum(key[2] >= closed_ms for key in gone) > 5
    assert not report.ok
    assert "retention" in report.to_text()
    for key in after.keys() - before.keys():
        assert [row[0] for row in after[key]] == [row[0] for row in whole[key]]


def test_what_a_cut_log_of_actions_still_has_is_added_to_the_others(world, home):
    """A list stays as it was where an action from behind what it had read is gone; the rest are as if nothing was."""
    before = logged_lists(home / "logs" / "shop.served", domain_of(world))
    rows, closed_ms = served_rows(home), closed_before_ms(home)
    _, whole = labelled(world, home.parent / "whole")
    cut_ms = START_MS + 26 * HOUR_MS
    short = replace(world, actions=cut(world.actions, cut_ms))
    report, after = labelled(short, home)
    stays = 0
    for key, row in rows.items():
        places = [partition_of(user_key(user), PARTITIONS) for user in row["who"]]
        starts = [short.actions.starts[place] for place in places]
        read = zip(starts, row["log_epoch"], row["offset_read"], strict=True)
        is_gone = any(start > offset + 1 if epoch == EPOCH else key[2] < cut_ms for start, epoch, offset in read)
        stays += is_gone and key[2] >= closed_ms
        assert after[key] == (before if is_gone else whole)[key], key
    assert 5 < report.stays == stays < len(rows)
    assert any(after[key] != before[key] for key in before), "late actions came to the others"


def test_it_is_said_once_and_holds_in_later_passes(world, home):
    short = replace(world, actions=cut(world.actions, FIRST_MS), rankings=cut(world.rankings, FIRST_MS))
    first, lists = labelled(short, home, until_ms=FIRST_MS + HOUR_MS)
    assert sum("retention" in fault for fault in first.faults) == 1
    assert str(np.datetime64(FIRST_MS, "ms").astype("datetime64[D]")) in first.to_text()
    again, same = labelled(short, home, until_ms=FIRST_MS + HOUR_MS)
    assert again.stays == first.stays > 5
    assert not any("stay" in fault for fault in again.faults)
    assert same == lists


@pytest.mark.parametrize("at", ["fold 0", "merge impressions.parquet", "merge served.parquet", "replace", "sweep"])
def test_a_pass_that_keeps_lists_is_cut_off(world, home, at):
    short = replace(world, actions=cut(world.actions, FIRST_MS), rankings=cut(world.rankings, FIRST_MS))
    shutil.copytree(home, whole := home.parent / "whole")
    labelled(short, whole)

    def step(name):
        if name == at:
            raise RuntimeError(at)

    with pytest.raises(RuntimeError, match=at):
        labelled(short, home, step=step)
    if at != "sweep":
        labelled(short, home)
        names = read_summary(home / "logs" / "shop.served")["parts"]
        assert names == read_summary(whole / "logs" / "shop.served")["parts"]
    else:
        labelled(short, home, until_ms=END_MS + 1)
    assert parts_of(home / "logs" / "shop.served") == parts_of(whole / "logs" / "shop.served")


def test_an_erasure_reaches_lists_that_stay(world, home):
    short = replace(world, actions=cut(world.actions, FIRST_MS), rankings=cut(world.rankings, FIRST_MS))
    erasure = Erasure(USERS[1], 7, 1, 0, 5, END_MS)

    def step(name):
        if name == "merge served.parquet":
            append_lines(home / "erasures.jsonl", [erasure.to_json()])

    assert any(USERS[1] in row["who"] for row in served_rows(home).values())
    report, lists = labelled(short, home, step=step)
    assert report.erased_rows > 0
    rows = served_rows(home)
    assert rows.keys() == lists.keys()
    assert len(rows) > 20
    assert not any(USERS[1] in row["who"] for row in rows.values())

"""Hundreds of passes, each of which brings a few actions: the log stays one of few files, with the same rows in the same order."""

import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from label_world import DOMAIN, END_MS, START_MS, archived, rules_of
from test_replay import EPOCH, PARTITIONS, USERS, MemoryLog, World

import deploy.labelling
from deploy.labelling import SMALL_PARTS_MAX, LabelOptions, label
from deploy.replay import ReplayOptions
from features.actions import encode_action
from features.domain import parse_domain
from features.erasures import Erasure, append_lines
from features.ids import partition_of, user_key
from features.log_erasure import drop_past
from features.logs import log_files, read_actions

SHOP = parse_domain(DOMAIN, source="test")
PASSES = 3 * SMALL_PARTS_MAX + 8
ONE_EACH = {partition_of(user_key(user), PARTITIONS): user for user in USERS}
"""A user of each partition."""


class Passes:
    """A product in which somebody acts between one pass and the next, and nothing is ranked."""

    def __init__(self, home):
        self.home, self.expected = home, []
        actions, rankings = (MemoryLog(name, EPOCH, {p: [] for p in range(PARTITIONS)}) for name in ("actions", "rankings"))
        self.world = World(actions, rankings, home, home, "")
        self.options = LabelOptions(
            replay=ReplayOptions(releases=home / "releases", tables=home / "tables", archive=home / "archive"),
            domain=SHOP,
            rules=rules_of(SHOP),
            out=home / "logs" / "shop.served",
            until_ms=END_MS,
            ledger=home / "erasures.jsonl",
        )

    def act(self, number):
        """An action in each partition; the log has them in this order."""
        for partition, user in sorted(ONE_EACH.items()):
            time_ms, event = START_MS + number, PARTITIONS * number + partition
            value = encode_action(user_id=user, entity_kind=1, entity_id=1, action=1, event_time_ms=time_ms, event_id=event)
            self.world.actions.records[partition].append((time_ms, user_key(user), value))
            self.expected.append((user, event))

    def make(self):
        archived(self.world, self.home / "archive")
        return label(self.options)

    def logged(self):
        found = []
        for batch in read_actions(self.options.out, SHOP):
            found += zip(batch.users.tolist(), batch.events["event_id"].tolist(), strict=True)
        return found


@contextmanager
def few_open_files(more):
    """So many files may be opened beside those that are."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = (number for number in range(hard) if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, more, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_the_log_can_be_read_after_hundreds_of_passes(tmp_path):
    passes = Passes(tmp_path)
    for number in range(PASSES):
        passes.act(number)
        passes.make()
    with few_open_files(SMALL_PARTS_MAX + 20):
        assert passes.logged() == passes.expected
        passes.act(PASSES)
        passes.make()
        assert passes.logged() == passes.expected
    assert len(log_files(passes.options.out, "actions.parquet")) <= SMALL_PARTS_MAX


def merging(home, monkeypatch):
    """Behind four passes; the next one makes one part of them."""
    monkeypatch.setattr(deploy.labelling, "SMALL_PARTS_MAX", 4)
    passes = Passes(home)
    for number in range(4):
        passes.act(number)
        passes.make()
    assert len(log_files(passes.options.out, "actions.parquet")) == 4
    passes.act(4)
    return passes


class CutOffError(Exception):
    """The power went."""


def cut_off(at, steps):
    def step(name):
        steps.append(name)
        if len(steps) == at:
            raise CutOffError(name)

    return step


def test_a_pass_that_merges_parts_is_cut_off_anywhere(tmp_path, monkeypatch):
    before = merging(tmp_path / "home", monkeypatch)
    steps = []
    whole = merging(tmp_path / "whole", monkeypatch)
    whole.options = replace(whole.options, step=cut_off(-1, steps))
    whole.make()
    (merged,) = log_files(whole.options.out, "actions.parquet")
    assert "replace" in steps
    for at, name in enumerate(steps, 1):
        shutil.copytree(before.home, home := tmp_path / f"{at}")
        passes = merging_at(before, home)
        passes.options = replace(passes.options, step=cut_off(at, []))
        with pytest.raises(CutOffError):
            passes.make()
        done = name == "sweep"
        assert passes.logged() == (before.expected if done else before.expected[:-PARTITIONS])
        passes.options = replace(passes.options, step=lambda _: None)
        passes.make()
        assert passes.logged() == before.expected
        (path,) = log_files(passes.options.out, "actions.parquet")
        assert path.read_bytes() == merged.read_bytes()
        assert [found.name for found in path.parent.iterdir()] == [path.name]


def merging_at(passes, home):
    found = Passes(home)
    found.world, found.expected = passes.world, passes.expected
    return found


def test_an_erasure_reaches_parts_that_are_being_merged(tmp_path, monkeypatch):
    """Asked for while the pass is cut off: the rows stand in the parts that the job rewrites, and in the one that no summary names yet."""
    passes = merging(tmp_path, monkeypatch)
    users = {user for user, _ in passes.expected}
    erased = passes.expected[0][0]
    passes.options = replace(passes.options, step=cut_off(3, []))
    with pytest.raises(CutOffError):
        passes.make()
    erasure = Erasure(erased, 1, 1, 0, 0, END_MS)
    append_lines(passes.options.ledger, [erasure.to_json()])
    assert drop_past(passes.options.out, [erasure]) == 4
    passes.options = replace(passes.options, step=lambda _: None)
    report = passes.make()
    assert report.continued
    assert {user for user, _ in passes.logged()} == users - {erased}
    assert drop_past(passes.options.out, [erasure]) == 0

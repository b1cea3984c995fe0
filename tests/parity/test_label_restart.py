"""A labelling pass that is cut off anywhere: readers see the old log or the new one, and the next run ends it with the same bytes."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from label_world import END_MS, HOUR_MS, START_MS, domain_of, label_world, logged_lists, make_served, options_of, parts_of

from deploy.labelling import LabelError, label
from features.logs import LogError, log_files, read_requests, read_summary

FIRST_MS = START_MS + 30 * HOUR_MS
BUCKETS = 6 << 20


class CutOffError(Exception):
    """The power went."""


class Fault:
    """Cuts the pass off at its n-th step."""

    def __init__(self, at):
        self.at, self.steps = at, []

    def __call__(self, name):
        if len(self.steps) == self.at:
            raise CutOffError(name)
        self.steps.append(name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served"), seed=11, steps=120)


@pytest.fixture(scope="module")
def twice(world, tmp_path_factory):
    """(home folder behind the first pass, behind the second one, the second's steps)."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second") / "home"
    label_world(world, first, until_ms=FIRST_MS, memory_bytes=BUCKETS)
    shutil.copytree(first, second)
    fault = Fault(-1)
    report, _ = label_world(world, second, memory_bytes=BUCKETS, step=fault)
    assert report.ok, report.to_text()
    assert report.buckets > 2
    return first, second, fault.steps


def contents(home, domain):
    folder = home / "logs" / "shop.served"
    return (
        parts_of(folder),
        read_summary(folder),
        {path.name for path in log_files(folder, "actions.parquet")},
        logged_lists(folder, domain),
    )


def test_cut_off_at_each_step(world, twice, tmp_path):
    first, second, steps = twice
    domain = domain_of(world)
    old, new = contents(first, domain), contents(second, domain)
    assert {"plan", "spill rankings", "spill actions", "fold 1", "merge served.parquet", "replace", "sweep"} <= set(steps)
    assert old != new
    for at, name in enumerate(steps):
        home = tmp_path / f"{at}"
        shutil.copytree(first, home)
        with pytest.raises(CutOffError, match=name):
            label_world(world, home, memory_bytes=BUCKETS, step=Fault(at))
        expected = new if name == "sweep" else old
        assert contents(home, domain)[1:] == expected[1:], f"readers, cut off at {name}"
        if name == "sweep":  # the pass is done; the next one finds nothing that is new, and sweeps
            continue
        report, folder = label_world(world, home, memory_bytes=BUCKETS)
        assert report.continued == (name != "plan")
        assert contents(home, domain) == new, f"cut off at {name}"
        assert sorted(path.name for path in folder.iterdir()) == [
            ".label.lock",
            ".lock",
            "actions",
            "impressions",
            "served",
            "summary.json",
        ]
        shutil.rmtree(home)


def test_a_first_pass_that_is_cut_off_leaves_no_log(world, tmp_path):
    with pytest.raises(CutOffError):
        label_world(world, tmp_path, step=Fault(6))
    with pytest.raises(LogError, match="no such file"):
        logged_lists(tmp_path / "logs" / "shop.served", domain_of(world))
    report, folder = label_world(world, tmp_path)
    assert report.lists == len(logged_lists(folder, domain_of(world)))


def test_a_pass_behind_one_that_was_cut_off_before_its_sweep(world, twice, tmp_path):
    first, second, steps = twice
    home = tmp_path / "home"
    shutil.copytree(first, home)
    with pytest.raises(CutOffError):
        label_world(world, home, memory_bytes=BUCKETS, step=Fault(steps.index("sweep")))
    report, folder = label_world(world, home, memory_bytes=BUCKETS)
    assert (report.number, report.new, report.added, report.continued) == (3, 0, 0, False)
    assert logged_lists(folder, domain_of(world)) == contents(second, domain_of(world))[3]


def test_a_plan_that_the_logs_do_not_have_any_more_is_given_up(world, twice, tmp_path):
    first, second, steps = twice
    home = tmp_path / "home"
    shutil.copytree(first, home)
    with pytest.raises(CutOffError):
        label_world(world, home, memory_bytes=BUCKETS, until_ms=FIRST_MS + HOUR_MS, step=Fault(steps.index("fold 1")))
    report, _ = label_world(world, home, memory_bytes=BUCKETS)
    assert not report.continued, "the archive is another one now"
    assert contents(home, domain_of(world)) == contents(second, domain_of(world))


def _killed(world, archive, home, at):
    def step(name):
        if name == at:
            os.kill(os.getpid(), signal.SIGKILL)

    label(options_of(world, archive, home, memory_bytes=BUCKETS, step=step))


def test_sigkill(world, twice, tmp_path):
    """In processes of their own, in the midst of spilling and folding, and before the new summary."""
    first, second, _ = twice
    home = tmp_path / "home"
    shutil.copytree(first, home)
    archive, domain = second / "archive", domain_of(world)
    paths = replace(world, actions=None, rankings=None)
    for at in ("spill actions", "fold 2", "replace"):
        process = multiprocessing.get_context("spawn").Process(target=_killed, args=(paths, archive, home, at))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, at
        assert contents(home, domain)[1:] == contents(first, domain)[1:]
    report = label(options_of(world, archive, home, memory_bytes=BUCKETS))
    assert report.continued
    assert contents(home, domain) == contents(second, domain)


def test_who_reads_while_a_pass_commits_reads_the_old_log_to_its_end(world, twice, tmp_path):
    first, second, _ = twice
    home, domain = tmp_path / "home", domain_of(world)
    shutil.copytree(first, home)
    folder = home / "logs" / "shop.served"
    reading = read_requests(folder, domain, batch_rows=50)
    before = [next(reading)]
    label_world(world, home, memory_bytes=BUCKETS)
    before += reading
    expected = read_requests(first / "logs" / "shop.served", domain)
    ids = [np.concatenate([batch.request_id for batch in batches]).tolist() for batches in (before, expected)]
    assert ids[0] == ids[1]
    assert all(len(batch.served.table) == len(batch) for batch in before)
    assert contents(home, domain) == contents(second, domain)


def test_one_pass_at_a_time(world, tmp_path):
    def step(name):
        if name == "fold 0":
            with pytest.raises(LabelError, match="another run"):
                label(options_of(world, tmp_path / "archive", tmp_path, until_ms=END_MS))

    report, _ = label_world(world, tmp_path, step=step)
    assert report.ok

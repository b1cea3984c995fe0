"""What a labelling pass that never ends holds of an erased user: its scratch folder and the parts that no summary names yet."""

import fcntl
import os

import pytest
from label_world import END_MS, HOUR_MS, domain_of, label_world, options_of
from test_erasure import plain
from test_replay import USERS

from deploy.labelling import label
from features.domain import DAY_MS
from features.erasures import LEDGER, Erasure, append_lines
from features.ids import user_key
from streams.erasure import LABEL_LOCK, LABEL_WORK, ErasureJob, run_job
from streams.erasure_audit import AUDIT, Audit
from streams.kafka import Topics

USER = USERS[1]
DEADLINE_MS = 30 * DAY_MS


class CutOffError(Exception):
    """The power went."""


@pytest.fixture(autouse=True)
def erasure(home):
    """Of the user, known since the pass."""
    append_lines(home / LEDGER, [Erasure(USER, 7, 1, 0, 5, END_MS).to_json()])


def crash(world, home, at, **more):
    def step(name):
        if name == at:
            raise CutOffError(name)

    with pytest.raises(CutOffError):
        label_world(world, home, step=step, **more)


def job_of(world, home):
    topics = Topics(actions="actions", rankings="rankings")
    return ErasureJob(home=home, domain=domain_of(world), deadline_ms=DEADLINE_MS, topics=topics)


def began(home, at_ms):
    """The pass that was cut off began at that time; its files are new."""
    work = home / "logs" / "shop.served" / LABEL_WORK
    os.utime(work / "plan.json", (at_ms / 1000, at_ms / 1000))


def naming(home):
    """Files of the logs that hold the user's id, as a number or as a key."""
    found = set()
    for path in (path for path in (home / "logs").rglob("*") if path.is_file()):
        data = plain(path) if path.suffix == ".parquet" else path.read_bytes()
        if USER.to_bytes(8, "little") in data or user_key(USER) in data:
            found.add(path.relative_to(home / "logs" / "shop.served").parts[0])
    return found


def place(home):
    (entry,) = Audit(home / AUDIT).of_user(USER)
    return entry.places["canonical logs"]


@pytest.mark.parametrize("at", ["spill actions", "fold 0", "merge served.parquet", "replace"])
def test_a_pass_that_always_crashes_holds_nothing_a_day_later(world, home, at):
    for _ in range(3):
        crash(world, home, at)
    assert naming(home) == {LABEL_WORK, "actions", "impressions", "served"}
    now_ms = END_MS + 3 * DAY_MS
    began(home, now_ms - DAY_MS + HOUR_MS)
    run_job(job_of(world, home), now_ms)
    assert LABEL_WORK in naming(home), "it may go on: a day has not passed"
    began(home, now_ms - DAY_MS - HOUR_MS)
    run_job(job_of(world, home), now_ms)
    assert naming(home) == set()
    assert place(home).status == "done"
    report, _ = label_world(world, home)
    assert not report.continued
    assert naming(home) == set()


def test_the_deadline_does_not_wait_for_a_day(world, home):
    crash(world, home, "replace")
    packing = home / "logs" / "shop.served" / "packed" / ".home-1.part"  # a training's, which is a folder
    packing.mkdir(parents=True)
    now_ms = END_MS + DEADLINE_MS - HOUR_MS
    began(home, now_ms - HOUR_MS)
    run_job(job_of(world, home), now_ms)
    assert naming(home) == set()
    assert packing.is_dir()


def test_a_pass_that_runs_too_long_is_due(world, home):
    crash(world, home, "replace")
    now_ms = END_MS + 3 * DAY_MS
    began(home, now_ms - 2 * DAY_MS)
    with (home / "logs" / "shop.served" / LABEL_LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_job(job_of(world, home), now_ms)
        assert (place(home).status, LABEL_WORK in place(home).detail) == ("due", True)
        assert LABEL_WORK in naming(home)
        late = run_job(job_of(world, home), END_MS + DEADLINE_MS + 1)
        assert f"user {USER:016x}: canonical logs" in late.overdue
    run_job(job_of(world, home), now_ms)
    assert place(home).status == "done"
    assert naming(home) == set()


@pytest.mark.parametrize(("hours", "continued"), [(24, True), (25, False)])
def test_the_next_run_does_not_go_on_with_an_old_pass(world, home, hours, continued):
    """Also where the job always finds a pass at work: none lasts longer than a day and a run."""
    crash(world, home, "fold 0")
    options = options_of(world, home / "archive", home, until_ms=END_MS + hours * HOUR_MS)
    assert label(options).continued == continued

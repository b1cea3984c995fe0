"""Time slices of processes."""

import os
import platform
import sys
import threading
from pathlib import Path

import pytest

from deploy.scheduling import set_slice

SCHED = Path("/proc/thread-self/sched")
KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def slice_ns() -> int:
    (line,) = (line for line in SCHED.read_text("ascii").splitlines() if line.startswith("se.slice"))
    return int(line.rpartition(":")[2])


def in_thread(function) -> None:
    """Runs it where it changes nothing for other tests; raises what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        raise error


@pytest.mark.skipif(KERNEL < (6, 12) or not SCHED.exists(), reason="this kernel has no slices by thread, or does not show them")
def test_a_slice_is_set_for_this_thread_and_those_it_starts():
    own = slice_ns()

    def check() -> None:
        assert set_slice(7.0)
        assert slice_ns() == 7_000_000
        in_thread(lambda: pytest.fail("not inherited") if slice_ns() != 7_000_000 else None)
        assert set_slice(0)
        assert slice_ns() != 7_000_000

    in_thread(check)
    assert slice_ns() == own


def test_a_policy_that_the_operator_chose_stays(monkeypatch):
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_FIFO)
    assert not set_slice(7.0)


def test_the_interpreters_slice_is_never_made_longer():
    before_s = sys.getswitchinterval()
    try:
        set_slice(0.5)
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        set_slice(100.0)
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    finally:
        sys.setswitchinterval(before_s)
        set_slice(0)

"""The supervisor with real child processes: readiness, restart, order of the stop, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.supervisor import ChildFailedError, Command, FolderInUseError, Supervisor, SupervisorError, report_ready

ROOT = Path(__file__).parents[2]

# What deploy.supervisor.report_ready does, without the import's cost in every child.
READY = """
import json, os, pathlib, signal, sys, time
target = pathlib.Path(os.environ["FRESHRANK_READY_FILE"])
part = target.with_suffix(".part")
part.write_text(json.dumps({"pid": os.getpid(), "endpoint": "here:1"}))
part.replace(target)
"""
SERVE = READY + "signal.pause()\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "while True: signal.pause()\n"


def child(name: str, program: str, **settings: object) -> Command:
    return Command(name, (sys.executable, "-I", "-S", "-c", program), **settings)  # type: ignore[arg-type]


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not so within the time limit"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_ready_child_is_published_and_stopped(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        details = supervisor.start(child("server", SERVE)).wait_ready()
        pid = details["pid"]
        assert details["endpoint"] == "here:1"
        assert json.loads((tmp_path / "run" / "server.json").read_text()) == details
        assert (tmp_path / "run" / "server.pid").read_text() == f"{pid}\n"
        assert supervisor.statistics()["server"] == {"pid": pid, "ready": True, "restarts": 0, "endpoint": "here:1"}
    assert gone(pid)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_foreign_program_is_ready_when_its_check_says_so(tmp_path: Path) -> None:
    answers = iter([None, None, {"endpoint": "there:2"}])
    with Supervisor(tmp_path) as supervisor:
        waiting = child("kafka", "import signal; signal.pause()", ready=lambda: next(answers))
        details = supervisor.start(waiting).wait_ready()
        assert details["endpoint"] == "there:2"
        assert json.loads((tmp_path / "run" / "kafka.json").read_text()) == details
    assert next(answers, "all asked") == "all asked"


def test_a_child_that_dies_before_it_is_ready_shows_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        started = supervisor.start(child("worker", "import sys; print('disk is full'); sys.exit(3)", restart=False))
        with pytest.raises(ChildFailedError, match=r"worker: ended with exit status 3[^$]*disk is full"):
            started.wait_ready()


def test_a_child_that_never_gets_ready_is_killed(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        started = supervisor.start(child("worker", "import signal; signal.pause()", ready_within_s=0.1, restart=False))
        with pytest.raises(ChildFailedError, match="worker: "):
            started.wait_ready(5)
        assert started.pid is None


def test_a_stale_ready_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "worker.json").write_text(json.dumps({"pid": 1, "endpoint": "old:1"}))
    with Supervisor(tmp_path) as supervisor:
        started = supervisor.start(child("worker", "import sys; sys.exit(1)", restart=False))
        with pytest.raises(ChildFailedError):
            started.wait_ready(5)


def test_a_killed_child_comes_back_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.supervisor._BACKOFF_FIRST_S", 0.01)
    events: list[str] = []
    cleaned: list[bool] = []
    with Supervisor(tmp_path, lambda name, text: events.append(f"{name} {text}")) as supervisor:
        worker = supervisor.start(child("worker", SERVE, cleanup=lambda: cleaned.append(True)))
        first = worker.wait_ready()["pid"]
        worker.kill()
        until(lambda: worker.statistics()["restarts"] == 1 and worker.statistics()["ready"])
        assert worker.wait_ready()["pid"] != first
        assert cleaned == [True]
    assert events == ["worker ready at here:1", "worker ended with signal SIGKILL", "worker ready at here:1"]


def test_children_stop_in_reverse_order_and_the_stubborn_are_killed(tmp_path: Path) -> None:
    order = tmp_path / "order"
    leave = "\nsignal.signal(signal.SIGTERM, lambda *a: (open({path!r}, 'a').write({name!r}), sys.exit(0)))\n"
    with Supervisor(tmp_path) as supervisor:
        stubborn = supervisor.start(child("stubborn", STUBBORN, stop_within_s=0.1)).wait_ready()["pid"]
        for name in "ab":
            program = "import signal, sys" + leave.format(path=str(order), name=name) + SERVE
            supervisor.start(child(name, program)).wait_ready()
    assert order.read_text() == "ba"
    assert gone(stubborn)


def test_one_folder_has_one_stack(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        with pytest.raises(FolderInUseError, match=f"pid {os.getpid()}"), Supervisor(tmp_path):
            pytest.fail("two stacks share a folder")
        supervisor.start(child("a", SERVE))
        with pytest.raises(SupervisorError, match="already a child"):
            supervisor.start(child("a", SERVE))
    with Supervisor(tmp_path):
        assert (tmp_path / "stack.lock").read_text() == f"{os.getpid()}\n"


STACK = """
import contextlib, sys
from pathlib import Path
from deploy.supervisor import Command, Supervisor
with contextlib.suppress(KeyboardInterrupt), Supervisor(Path(sys.argv[1])) as supervisor:
    supervisor.start(Command("server", (sys.executable, "-I", "-S", "-c", sys.argv[2]))).wait_ready()
    print("up", flush=True)
    supervisor.wait_for_signal()
print("stopped", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "status", "last"), [(signal.SIGTERM, 0, "stopped\n"), (signal.SIGINT, 0, "stopped\n"), (signal.SIGKILL, -9, "")]
)
def test_no_child_outlives_its_stack(tmp_path: Path, number: signal.Signals, status: int, last: str) -> None:
    argv = [sys.executable, "-S", "-c", STACK, str(tmp_path), SERVE]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as stack:
        assert stack.stdout is not None
        assert stack.stdout.readline() == "up\n"
        pid = json.loads((tmp_path / "run" / "server.json").read_text())["pid"]
        stack.send_signal(number)
        assert stack.stdout.read() == last
        assert stack.wait(10) == status
        until(lambda: gone(pid))


def test_report_ready_writes_what_the_supervisor_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_ready("nowhere:0")  # no supervisor: nothing to do
    monkeypatch.setenv("FRESHRANK_READY_FILE", str(tmp_path / "run" / "x.json"))
    report_ready("here:1", health="here:2")
    assert json.loads((tmp_path / "run" / "x.json").read_text()) == {"pid": os.getpid(), "endpoint": "here:1", "health": "here:2"}
    assert len(list((tmp_path / "run").iterdir())) == 1

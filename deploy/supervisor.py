"""Child processes: started, watched until ready, restarted when they die, stopped in reverse order, never left behind.

A child is ready when its file `<folder>/run/<name>.json` names its present pid. freshrank's own processes write that file with
`report_ready`; for a foreign program (Kafka, Triton) the supervisor writes it as soon as the command's `ready` check succeeds.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

READY_FILE_VARIABLE = "FRESHRANK_READY_FILE"
_POLL_S = 0.05
_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.25, 10.0
_STEADY_S = 30.0  # a child that lived this long after it was ready starts again at the first backoff

# The shim asks the kernel to kill it when the thread that forked it ends, then becomes the program. preexec_fn would do the same,
# but it runs Python between fork and exec, which can deadlock in a process that has gRPC, librdkafka and torch threads.
_SHIM = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)\n"  # 1 = PR_SET_PDEATHSIG
    "if os.getppid() != int(sys.argv[1]): sys.exit('the supervisor ended before its child began')\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


class SupervisorError(RuntimeError):
    """Base of this module's errors."""


class FolderInUseError(SupervisorError):
    """Another stack holds the folder's lock."""


class ChildFailedError(SupervisorError):
    """A child ended, or was not ready in time; the message carries the end of its log."""


@dataclass(frozen=True)
class Command:
    """What to start and how to know that it serves.

    `ready` returns the details to publish (at least `endpoint`) or None while the program is not ready; it must answer within about
    a second. Without it the program itself calls `report_ready`. `env` is added to the supervisor's own environment. `cleanup` runs
    after each end of the process, also a crash.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], dict[str, Any] | None] | None = None
    ready_within_s: float = 60.0
    stop_within_s: float = 15.0
    restart: bool = True
    cleanup: Callable[[], None] | None = None


def free_ports(count: int) -> list[int]:
    """`count` different loopback TCP ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [int(held.getsockname()[1]) for held in sockets]
    finally:
        for held in sockets:
            held.close()


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def report_ready(endpoint: str, **details: Any) -> None:
    """Tell the supervisor that this process serves at `endpoint`. Does nothing in a process that no supervisor started."""
    target = os.environ.get(READY_FILE_VARIABLE)
    if target:
        write_atomically(Path(target), json.dumps({"pid": os.getpid(), "endpoint": endpoint, **details}))


class Child:
    """One supervised process in a folder: `run/<name>.json` (ready), `run/<name>.pid`, `logs/<name>.log` (appended).

    One thread forks, watches and restarts it. That thread lives as long as the child: the kernel's parent-death signal follows the
    thread that forked, not the process.
    """

    def __init__(self, command: Command, folder: Path, on_event: Callable[[str, str], None] | None = None) -> None:
        self.command = command
        self.log_path = folder / "logs" / f"{command.name}.log"
        self._ready_path = folder / "run" / f"{command.name}.json"
        self._pid_path = folder / "run" / f"{command.name}.pid"
        self._on_event = on_event or (lambda name, text: log.info("%s: %s", name, text))
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._details: dict[str, Any] | None = None
        self._failure: str | None = None
        self._restarts = 0

    @property
    def pid(self) -> int | None:
        """The running process, None between two."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def statistics(self) -> dict[str, Any]:
        """`pid`, `ready`, `restarts` and the endpoint details."""
        return {"pid": self.pid, "ready": self._details is not None, "restarts": self._restarts, **(self._details or {})}

    def start(self) -> None:
        """Start the process and its watcher; returns at once. A child that was stopped or has ended can be started again."""
        if self._thread is not None and self._thread.is_alive():
            raise SupervisorError(f"{self.command.name} is already running with pid {self.pid}")
        self._stopping.clear()
        self._failure, self._details = None, None
        self._thread = threading.Thread(target=self._watch, name=f"child-{self.command.name}", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Block until the child is ready and return what it published: `pid`, `endpoint` and more.

        Raises:
            ChildFailedError: it ended or was not ready in time; the message has the end of its log.
        """
        limit_s = self.command.ready_within_s if timeout_s is None else timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._details is not None or self._failure is not None, limit_s)
            if self._details is not None:
                return dict(self._details)
            failure = self._failure or f"not ready after {limit_s:g} s"
        raise ChildFailedError(self._explain(failure))

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after `stop_within_s`; returns when the process and the processes of its group are gone."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(self.command.stop_within_s)
            except subprocess.TimeoutExpired:
                self._on_event(self.command.name, f"did not end within {self.command.stop_within_s:g} s of SIGTERM: killed")
        if self._thread is not None:
            self._kill_group()
            self._thread.join()
        for path in (self._ready_path, self._pid_path):
            path.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL the present process and wait until it is gone; the restart policy then applies."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _kill_group(self) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return  # nobody left: the normal case
            self._process.wait()

    def _explain(self, failure: str) -> str:
        try:
            tail = "".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-20:])
        except FileNotFoundError:
            tail = ""
        return f"{self.command.name}: {failure}; its log {self.log_path} ends with:\n{tail or '(nothing)'}"

    def _spawn(self) -> subprocess.Popen[bytes]:
        for path in (self._ready_path, self.log_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._ready_path.unlink(missing_ok=True)
        environment = {**os.environ, **self.command.env, READY_FILE_VARIABLE: str(self._ready_path.absolute())}
        # -I -S: the shim must start the same way whatever PYTHONPATH the program is given.
        argv = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *self.command.argv]
        with self.log_path.open("ab") as output:
            # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which then stops its children in order.
            process = subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        write_atomically(self._pid_path, f"{process.pid}\n")
        return process

    def _watch(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while not self._stopping.is_set():
            self._process = process = self._spawn()
            if self._stopping.is_set():  # stop() came between its look at the old process and this one
                self._kill_group()
            ready_since = time.monotonic() if self._until_ready(process) else None
            code = process.wait()
            self._kill_group()  # helpers that outlived it, such as Triton's stubs
            if self.command.cleanup is not None:
                self.command.cleanup()
            with self._changed:
                self._details = None
                self._failure = f"ended with {_describe(code)}"
                self._changed.notify_all()
            if self._stopping.is_set():
                return
            self._on_event(self.command.name, self._failure)
            if not self.command.restart:
                return
            if ready_since is not None and time.monotonic() - ready_since > _STEADY_S:
                backoff_s = _BACKOFF_FIRST_S
            self._stopping.wait(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)
            with self._changed:
                self._restarts += 1
                self._failure = None

    def _until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + self.command.ready_within_s
        while process.poll() is None:
            details = self._look(process.pid)
            if details is not None:
                with self._changed:
                    self._details, self._failure = details, None
                    self._changed.notify_all()
                self._on_event(self.command.name, f"ready at {details['endpoint']}")
                return True
            if time.monotonic() > deadline:
                self._on_event(self.command.name, f"not ready after {self.command.ready_within_s:g} s: killed")
                self._kill_group()
                return False
            self._stopping.wait(_POLL_S) if not self._stopping.is_set() else process.wait()
        return False

    def _look(self, pid: int) -> dict[str, Any] | None:
        if self.command.ready is not None:
            answer = self.command.ready()
            if answer is None:
                return None
            details = {"pid": pid, **answer}
            write_atomically(self._ready_path, json.dumps(details))
            return details
        try:
            details = json.loads(self._ready_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return details if details.get("pid") == pid else None


class Server:
    """A foreign server in a folder of its own, without a supervisor: `start()` and `stop()`, or `with`. A subclass says what to start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._child: Child | None = None

    def command(self) -> Command:
        """Prepares the folder and returns what starts the server, for a `Supervisor` too."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The server's process.

        Raises:
            RuntimeError: it is not running.
        """
        pid = self._child.pid if self._child else None
        if pid is None:
            raise RuntimeError(f"{type(self).__name__} of {self.folder} is not running")
        return pid

    def start(self) -> Self:
        """Starts and waits until the server answers.

        Raises:
            ChildFailedError: it ended or did not answer; the message has the end of its log. Also what `command` raises.
        """
        self._child = Child(self.command(), self.folder)
        self._child.start()
        try:
            self._child.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM, wait, SIGKILL if needed; returns when it and its own children are gone."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL and wait until it is gone; `start()` may follow."""
        if self._child is not None:
            self._child.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


class Supervisor:
    """The children of one folder, as a context manager: they start in the order given and stop in reverse.

    Inside the context SIGTERM acts as Ctrl-C: both raise KeyboardInterrupt in the main thread, so that leaving the context stops
    everything. If the supervisor itself is killed, the kernel kills its children.
    """

    def __init__(self, folder: Path, on_event: Callable[[str, str], None] | None = None) -> None:
        self.folder = folder
        self.children: dict[str, Child] = {}
        self._on_event = on_event
        self._lock_file: Any = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Lock the folder.

        Raises:
            FolderInUseError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.folder / "stack.lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            holder = self._lock_file.read().strip() or "unknown"
            self._lock_file.close()
            raise FolderInUseError(
                f"{self.folder} is used by another stack (pid {holder}): stop that one or choose another folder"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"{os.getpid()}\n")
        self._lock_file.flush()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, _interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them running
        try:
            for child in reversed(self.children.values()):
                child.stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._lock_file.close()

    def start(self, command: Command) -> Child:
        """Start a child; returns at once (`wait_ready` waits).

        Raises:
            SupervisorError: the name is taken.
        """
        if command.name in self.children:
            raise SupervisorError(f"{command.name} is already a child of {self.folder}")
        child = Child(command, self.folder, self._on_event)
        self.children[command.name] = child
        child.start()
        return child

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Each child's statistics by name."""
        return {name: child.statistics() for name, child in self.children.items()}

    def wait_for_signal(self) -> None:
        """Block until Ctrl-C or SIGTERM, then return; the context's end stops the children."""
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

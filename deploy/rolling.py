"""A server of several processes, kept up while it is replaced: SIGHUP restarts them one after the other.

Each stops as `RankingServer.stop` says, and the next one follows when it is ready again: at least all but one take calls. A process that
was started anew has the settings of this one, what is announced now and the newest tables, and the program that is on disk.
"""

import logging
import queue
import signal

from deploy.supervisor import ChildFailedError, Supervisor, report_ready

log = logging.getLogger(__name__)


def restart_on_hangup(supervisor: Supervisor) -> None:
    """Says that the children are ready, once they are, and again after each SIGHUP; returns on SIGTERM or Ctrl-C.

    Raises:
        ChildFailedError: one of them does not come up at the start. After a SIGHUP that is logged, and the others stay as they are.
    """
    hangups: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one that a signal's handler may put into
    before = signal.signal(signal.SIGHUP, lambda number, _: hangups.put(number))
    try:
        _report(supervisor)
        while True:
            hangups.get()
            while not hangups.empty():  # asked twice before it began: once is enough
                hangups.get()
            _restart(supervisor)
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGHUP, before)


def _restart(supervisor: Supervisor) -> None:
    try:
        for name, child in supervisor.children.items():
            child.stop()
            child.start()
            log.info("%s is restarted: pid %d", name, child.wait_ready()["pid"])
        _report(supervisor)
    except ChildFailedError as error:
        log.error("the restart ends here, the other processes stay as they are: %s", error)  # noqa: TRY400 - it says all


def _report(supervisor: Supervisor) -> None:
    found = [child.wait_ready() for child in supervisor.children.values()]
    report_ready(found[0]["endpoint"], pids=[details["pid"] for details in found])

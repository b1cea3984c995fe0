"""Time slices: how long what answers requests waits for a core that the worker or the broker uses.

Linux (EEVDF, 6.12 and later) lets a waking thread interrupt a running one at once if its own slice is the shorter; otherwise it waits until
the running one's slice is over, which is noticed only at the next tick (4 ms at 250 Hz). So what answers takes slices that are shorter than
the kernel's own (1.4 ms on two cores) and longer than a read. Shares of CPU time stay as they are, and no privilege is needed.

Python has a slice of its own: a thread that waits for the interpreter's lock gets it from a busy one after 5 ms. In a process that answers
requests, what prepares the next tables must not hold them up for so long.
"""

import ctypes
import logging
import os
import platform
import struct
import sys

log = logging.getLogger(__name__)

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("<IIQiIQQQII")
"""struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max."""


def set_slice(slice_ms: float) -> bool:
    """Sets the slice of this thread, and of the threads and processes that it starts from now on: 0.1 to 100 ms, 0 for the kernel's own.

    Returns False where this is not possible (another policy was chosen for the process, a sandbox forbids it): then everything works as
    before, only reads wait longer. A kernel older than 6.12 takes the value and does nothing with it. The interpreter's own slice, for
    all threads of the process, becomes the same if that is shorter.
    """
    if slice_ms:
        sys.setswitchinterval(min(slice_ms / 1e3, sys.getswitchinterval()))
    number, policy = _SCHED_SETATTR.get(platform.machine()), os.sched_getscheduler(0)
    if number is None or policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, int(slice_ms * 1e6), 0, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), 0, attributes, 0) == 0:
        return True
    log.info("the time slice stays the kernel's: sched_setattr: %s", os.strerror(ctypes.get_errno()))
    return False

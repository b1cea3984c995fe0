"""Says whether this machine can run freshrank, before anything is downloaded. Standard library only: no environment exists yet.

It must start under any Python 3, old ones included, to say that the Python is the wrong one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

DISK_GB = 8
GLIBC = (2, 35)
PYTHON = (3, 11)
LIBRARY = "libpython3.11.so.1.0"
OTHER_PYTHON = " Or name another Python: make setup PYTHON=/path/to/python3.11"


def problems(folder: Path) -> list[str]:
    """What is missing to set freshrank up in `folder`, one sentence each; empty when nothing is."""
    found = []
    here = f"{platform.system()} on {platform.machine()}"
    python = f"{sys.executable} (Python {platform.python_version()})"
    if here != "Linux on x86_64":
        found.append(f"freshrank needs Linux on x86-64, for which Triton's wheel is built; this is {here}.")
    elif glibc() < GLIBC:
        found.append(
            f"freshrank needs glibc {_dotted(GLIBC)} or newer (Debian 12, Ubuntu 22.04); here is {_dotted(glibc()) or 'another libc'}."
        )
    if sys.version_info[:2] != PYTHON:
        found.append(f"freshrank's packages are locked for Python {_dotted(PYTHON)}, and this is {python}.{OTHER_PYTHON}")
    elif not _has_shared_library():
        found.append(
            f"Triton loads models with {LIBRARY}, which {python} lacks. Debian, Ubuntu: apt-get install libpython3.11.{OTHER_PYTHON}"
        )
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        found.append(f"{python} cannot create environments with pip. Debian, Ubuntu: apt-get install python3.11-venv.{OTHER_PYTHON}")
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < DISK_GB and not (folder / ".venv").exists():
        found.append(f"freshrank needs about {DISK_GB} GB of disk for its environment; {folder} has {free_gb:.1f} GB free.")
    return found


def glibc() -> tuple[int, ...]:
    """The version of the C library, empty where it is not glibc."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except ValueError:
        return ()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()


def _has_shared_library() -> bool:
    beside = Path(str(sysconfig.get_config_var("LIBDIR"))) / LIBRARY
    try:
        ctypes.CDLL(str(beside) if beside.exists() else LIBRARY)
    except OSError:
        return False
    return True


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def main() -> int:
    """Print every problem; 1 when there is one."""
    found = problems(Path.cwd())
    for problem in found:
        print(f"setup: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Every test in two runs side by side: those that wait for servers, and those that compute. `make test` calls it.

Servers start, sleep and are killed most of the time; the other tests take one core for a third of it. Chaos comes last, when that is over:
it starves its processes itself. Prints the first run as it goes, then the second; returns 1 where either failed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
COMPUTING = ("contract", "golden", "parity", "property", "simulation", "unit")
WAITING = ("fuzz", "integration", "chaos")


def main() -> int:
    """Returns the exit code."""
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    if folders != {*COMPUTING, *WAITING}:
        raise SystemExit(f"tests/parts.py: folders {sorted(folders ^ {*COMPUTING, *WAITING})} are in neither run, or not there: correct it")
    command = (sys.executable, "-m", "pytest", *sys.argv[1:])
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        computing = subprocess.Popen([*command, *(f"tests/{name}" for name in COMPUTING)], stdout=output, stderr=subprocess.STDOUT)
        try:
            waiting = subprocess.run([*command, *(f"tests/{name}" for name in WAITING)], check=False).returncode
            computed = computing.wait()
        finally:
            computing.kill()
            computing.wait()
        output.seek(0)
        print(output.read(), flush=True)
    return 0 if waiting == computed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

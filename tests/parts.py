"""Every test in two runs side by side: those that wait for processes, and the others. `make test` calls it.

Worker, stack and chaos tests start, stop and kill processes and wait most of the time; the others take one core for a third of that time.
Chaos comes last, when they are over: it starves its processes itself. Prints the first run as it goes, then the second; returns 1 where
either failed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
OTHERS = ("contract", "fuzz", "golden", "parity", "property", "simulation", "unit")
WAITING = ("integration", "chaos")
SERVING = (
    "ablate",
    "baseline",
    "call_watch",
    "compatibility",
    "continue",
    "cycle",
    "door",
    "draft",
    "experiments",
    "forms_training",
    "gate",
    "http_door",
    "import_globo",
    "leakage",
    "rank_clients",
    "refresh_command",
    "refreshed",
    "releases",
    "tiers",
    "training",
    "training_runs",
)
"""Integration tests that go with the others: they start a server of their own at most, or train, and kill nothing of the stack."""


def main() -> int:
    """Returns the exit code."""
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    files = [TESTS / "integration" / f"test_{name}.py" for name in SERVING]
    strange = {str(path) for path in files if not path.is_file()} | (folders ^ {*OTHERS, *WAITING})
    if strange:
        raise SystemExit(f"tests/parts.py: {', '.join(sorted(strange))}: in neither run, or not there; correct the lists")
    command = (sys.executable, "-m", "pytest", *sys.argv[1:])
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        others = [*command, *(str(TESTS / name) for name in OTHERS), *map(str, files)]
        side = subprocess.Popen(others, stdout=output, stderr=subprocess.STDOUT)
        try:
            waiting = [*command, *(str(TESTS / name) for name in WAITING), *(f"--ignore={path}" for path in files)]
            first = subprocess.run(waiting, check=False).returncode
            second = side.wait()
        finally:
            side.kill()
            side.wait()
        output.seek(0)
        print(output.read(), flush=True)
    return 0 if first == second == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""An environment of its own for a peer whose pins and ours exclude each other, made from its lock once."""

import hashlib
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from deploy.bench_ingest import BenchError

CACHE = Path(sys.prefix) / "share" / "freshrank"


def locked_environment(title: str, lock: Path, console: Console) -> Path:
    """Interpreter of the environment that `lock` (requirements with hashes) describes. Raises BenchError: it cannot be made."""
    if not lock.is_file():
        raise BenchError(f"{lock} is missing: {title}'s part belongs to the checkout, not to the package")
    environment = CACHE / lock.parent.name / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    python, complete = environment / "bin" / "python", environment / ".complete"
    if not complete.exists():
        console.print(f"installs {title} into an environment of its own")
        uv = str(Path(sys.executable).parent / "uv")
        for argv in (
            (uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)),
            (uv, "pip", "sync", "--quiet", "--python", str(python), "--require-hashes", str(lock)),
        ):
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            if done.returncode:
                raise BenchError(f"{title} cannot be installed, is the package index reachable?\n{done.stderr}")
        complete.touch()
    return python

"""Constant open-loop load by `ghz`, a generator that is not ours and not Python.

The project's own (`deploy.load`) also sends Poisson arrivals and bursts, and takes requests in turn; ghz sends one request again and again.
Its latencies count from when a call was sent, not from when it was due.
"""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "github.com/bojand/ghz/cmd/ghz@v0.120.0"
METHOD = "freshrank.v1.Ranking.Rank"
_CHECKOUT = Path(__file__).parents[1]
_FIRST_RUN_S = 600.0
"""For `go run`, which compiles it once."""


class GhzError(RuntimeError):
    """ghz is not there or did not run; the message says what to install or what it said."""


@dataclass(frozen=True)
class GhzOutcome:
    """count by gRPC status, such as "OK"; latencies of all calls in milliseconds."""

    count: dict[str, int]
    p50_ms: float
    p99_ms: float
    calls_per_s: float


def ghz_command() -> tuple[str, ...]:
    """ghz on the PATH, else compiled by go from its module. Raises GhzError: there is neither."""
    found = shutil.which("ghz")
    if found:
        return (found,)
    go = shutil.which("go")
    if go:
        return (go, "run", MODULE)
    raise GhzError("ghz is not on the PATH, and neither is go, which would run it: install ghz, or Go 1.20 or newer")


def run_ghz(
    address: str,
    request: bytes,
    *,
    calls_per_s: int,
    seconds: float,
    connections: int = 4,
    timeout_s: float = 1.0,
    root_certificate: Path | None = None,
    token: str | None = None,
) -> GhzOutcome:
    """Sends one serialized RankRequest at a constant rate, whatever the answers do.

    Raises:
        GhzError: see `ghz_command`; or ghz failed, with what it said.
    """
    count = round(calls_per_s * seconds)
    argv = [*ghz_command(), "--proto", str(_CHECKOUT / "protos" / "v1" / "ranking.proto"), "--import-paths", str(_CHECKOUT)]
    argv += ["--call", METHOD, "--async", "--rps", str(calls_per_s), "--total", str(count), "--connections", str(connections)]
    argv += ["--concurrency", str(connections), "--timeout", f"{round(timeout_s * 1e3)}ms"]
    argv += ["--cacert", str(root_certificate)] if root_certificate else ["--insecure"]
    with tempfile.TemporaryDirectory(prefix="freshrank-ghz-") as folder:
        data = Path(folder) / "request.bin"
        data.write_bytes(request)
        if token:  # in a file: every user of a machine can read arguments
            metadata = Path(folder) / "metadata.json"
            metadata.write_text(json.dumps({"authorization": f"Bearer {token}"}), "utf-8")
            argv += ["--metadata-file", str(metadata)]
        argv += ["--binary-file", str(data), "--format", "json", address]
        try:
            done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=seconds + timeout_s + _FIRST_RUN_S)
        except subprocess.TimeoutExpired as error:
            raise GhzError(f"ghz did not end within {error.timeout:.0f} s") from error
    if done.returncode:
        raise GhzError(f"ghz ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return _outcome(json.loads(done.stdout))


def _outcome(report: dict[str, Any]) -> GhzOutcome:
    latency_ms = {int(entry["percentage"]): entry["latency"] / 1e6 for entry in report.get("latencyDistribution") or ()}
    return GhzOutcome(
        count=dict(report["statusCodeDistribution"]),
        p50_ms=latency_ms.get(50, 0.0),
        p99_ms=latency_ms.get(99, 0.0),
        calls_per_s=float(report["rps"]),
    )

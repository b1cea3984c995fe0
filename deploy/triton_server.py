"""A real Triton inference server from packages alone: the server inside the nvidia-pytriton wheel, with its Python backend.

Loopback only, models loaded on request (EXPLICIT control). Its folder holds the backend directory and the logs.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.supervisor import Command, Server, free_ports

_SHARED_MEMORY = Path("/dev/shm")


class TritonMissingError(RuntimeError):
    """The nvidia-pytriton wheel is not installed or has no stub for this Python; `make setup` installs it."""


class TritonServer(Server):
    """Triton over one model repository, as a context manager or with `start()` and `stop()`.

    `command()` is the same server for a `Supervisor`. The ports are chosen once and stay, so that a restart after a crash serves at
    the same `grpc_url`. No model is loaded unless named in `load`; whoever owns a release loads it over gRPC, also after a restart.
    `threads` bounds the OpenMP (torch) threads of each model instance: PyTorch's default is every core. With `otlp_endpoint` (a URL for
    OTLP/HTTP) Triton sends spans of the requests that carry a sampled trace context.
    """

    def __init__(
        self,
        folder: Path,
        repository: Path,
        *,
        load: Sequence[str] = (),
        threads: int = 1,
        restart: bool = False,
        otlp_endpoint: str = "",
    ) -> None:
        super().__init__(folder)
        self.repository = repository.absolute()
        self._load = tuple(load)
        self._threads = threads
        self._otlp_endpoint = otlp_endpoint
        self._restart = restart
        self._ports = free_ports(3)
        # The region names carry the folder, so that what a killed server left in /dev/shm is known to be ours and can be removed.
        self._regions = f"freshrank-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of the gRPC service."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def http_url(self) -> str:
        """`http://host:port` of the HTTP service."""
        return f"http://127.0.0.1:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return f"http://127.0.0.1:{self._ports[2]}/metrics"

    def command(self) -> Command:
        """Prepare the backend folder and return what starts the server.

        Raises:
            TritonMissingError: the wheel is absent or does not know this Python version.
        """
        home = _wheel_folder()
        backends = self._build_backends(home)
        self.repository.mkdir(parents=True, exist_ok=True)
        self._remove_regions()
        argv = [str(home / "bin" / "tritonserver"), f"--model-repository={self.repository}", f"--backend-directory={backends}"]
        argv += [f"--cache-directory={home / 'caches'}", "--model-control-mode=explicit", "--log-info=false"]
        for service, port in zip(("grpc", "http", "metrics"), self._ports, strict=True):
            argv += [f"--{service}-address=127.0.0.1", f"--{service}-port={port}"]
        argv += [f"--backend-config=python,shm-region-prefix-name={self._regions}", *(f"--load-model={name}" for name in self._load)]
        if self._otlp_endpoint:
            # The rate is for requests without a context: as good as none of them.
            argv += ["--trace-config=mode=opentelemetry", "--trace-config=level=TIMESTAMPS", "--trace-config=rate=1000000000"]
            argv += [f"--trace-config=opentelemetry,url={self._otlp_endpoint}", "--trace-config=opentelemetry,resource=service.name=triton"]
        ready = functools.partial(_answers, self.http_url, self.grpc_url)
        environment = self._environment(home)
        return Command("triton", tuple(argv), environment, ready, restart=self._restart, cleanup=self._remove_regions)

    def _build_backends(self, home: Path) -> Path:
        stub = home / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / "triton_python_backend_stub"
        if not stub.is_file():
            raise TritonMissingError(f"nvidia-pytriton has no stub for Python {sys.version_info.major}.{sys.version_info.minor} ({stub})")
        target = self.folder / "backends"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(home / "backends" / "python", target / "python")
        shutil.copy(stub, target / "python")
        (target / "python" / stub.name).chmod(0o755)
        return target

    def _environment(self, home: Path) -> dict[str, str]:
        # The stub embeds an isolated interpreter, which reads no PYTHONPATH: it finds this environment (its packages and, through the
        # editable install, the checkout that holds deploy.triton_shim) by the first python3 on PATH. Its libpython must be this
        # interpreter's own: another patch level fails.
        libraries = [str(sysconfig.get_config_var("LIBDIR")), str(home.parents[1] / "nvidia_pytriton.libs")]
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
        }

    def _remove_regions(self) -> None:
        for region in _SHARED_MEMORY.glob(f"{self._regions}*"):
            region.unlink(missing_ok=True)


def _wheel_folder() -> Path:
    found = importlib.util.find_spec("pytriton")  # found, not imported: importing it would start its own machinery
    if found is None or not found.submodule_search_locations:
        raise TritonMissingError("the package nvidia-pytriton, which carries the Triton server, is not installed: run `make setup`")
    return Path(found.submodule_search_locations[0]) / "tritonserver"


def _answers(http_url: str, grpc_url: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"{http_url}/v2/health/ready", timeout=1.0):
            return {"endpoint": grpc_url, "http": http_url}
    except OSError:  # URLError and HTTPError are OSErrors: refused, or not ready yet
        return None

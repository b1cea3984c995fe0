"""A release: one trained ranker with everything that says how it is fed, under one manifest.

`<releases>/<release id>/` holds model.safetensors (weights), perhaps small.safetensors (the small model), domain.toml (what the tensors
mean) and manifest.json (tensors, embedding
spaces, sequence, metrics, checksums). The folder never changes once it is there. The Triton model repository is generated from it.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from features.domain import Domain, DomainError, load_domain, parse_domain
from features.tensors import DYNAMIC, Tensor, output_table, tensor_fingerprint, tensor_table
from inference.formula import Formula, FormulaError
from inference.small import SMALL_FILE, SmallModel, read_small

if TYPE_CHECKING:
    from inference.transact import NoopRanker, TransActRanker

FORMAT_VERSION = 1
TRANSACT, NOOP = "transact", "noop"
"""Models that a release may hold, by the name in its manifest."""
_ID = re.compile(r"(?P<ranker>[a-z][a-z0-9_]{0,39})-(?P<time>\d{8}T\d{6}Z)-(?P<content>[0-9a-f]{8})")
_FILES = ("domain.toml", "model.safetensors")
_OPTIONAL_FILES = (SMALL_FILE,)
_TRITON_TYPES = {"float32": "FP32", "float16": "FP16", "int32": "INT32", "int64": "INT64"}


class ReleaseError(ValueError):
    """A release that cannot be served; the message names both sides of what does not agree."""


@dataclass(frozen=True)
class Release:
    """An opened and verified release."""

    folder: Path
    release_id: str
    ranker: str
    created_ms: int
    domain: Domain
    generations: Mapping[str, str]
    """Table generations that it was trained with, by space."""
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def sequence_fingerprint(self) -> int:
        """Identity of the sequence whose rows this release reads."""
        return self.domain.sequence_fingerprint(self.domain.ranker[self.ranker].sequence)


def write_release(
    releases: Path,
    *,
    model: "TransActRanker | NoopRanker",
    domain_toml: str,
    ranker: str,
    created_ms: int,
    generations: Mapping[str, str],
    metrics: Mapping[str, Any],
    trained: Mapping[str, Any] | None = None,
    only: bool = False,
    small: bytes | None = None,
) -> Release:
    """Writes a release folder and opens it.

    Args:
        releases: folder of all releases; made where it is missing.
        model: the trained ranker, built from `domain_toml`.
        domain_toml: text of the domain file.
        ranker: name of its [ranker.NAME].
        created_ms: time of the release, milliseconds; part of its id.
        generations: table generations that it was trained with, by space.
        metrics: what was measured, JSON values; NaN becomes null.
        trained: where the weights come from: before_ms, from which on no request had a part in them; gate, what let it be published. None:
            not known.
        only: nobody serves it before it is announced: for experiments.
        small: contents of small.safetensors, the small model; None: the release has none.

    Raises:
        ReleaseError: the domain file and the model or generations do not agree.
    """
    # Only here and in load_model: the ranking server reads releases too, and need not hold PyTorch in memory.
    from safetensors.torch import save

    domain = _domain_with(parse_domain(domain_toml, source="domain.toml"), ranker)
    settings = domain.ranker[ranker]
    _verify_score("release", domain, ranker)
    missing = {space for space in (settings.item_space, settings.user_space) if space} - set(generations)
    if missing:
        raise ReleaseError(f"generations: the ranker {ranker!r} needs space {min(missing)!r}, given: {', '.join(sorted(generations))}")
    contents = {
        "domain.toml": domain_toml.encode(),
        "model.safetensors": save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}),
        **({} if small is None else {SMALL_FILE: small}),
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "ranker": ranker,
        "created_ms": created_ms,
        "model": {"name": model.name, "use_sequence": model.use_sequence},
        **_interface(domain, ranker),
        "generations": dict(sorted(generations.items())),
        "metrics": _without_nan(metrics),
        **({} if trained is None else {"trained": _without_nan(trained)}),
        **({"only": True} if only else {}),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())},
    }
    release_id = f"{ranker}-{datetime.fromtimestamp(created_ms / 1000, UTC):%Y%m%dT%H%M%SZ}-{_content(manifest)}"
    releases.mkdir(parents=True, exist_ok=True)
    folder = releases / release_id
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=releases))
        try:
            for name, data in (*contents.items(), ("manifest.json", _json({"release_id": release_id, **manifest}))):
                _write_synced(temporary / name, data)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return open_release(folder)


def open_release(folder: Path) -> Release:
    """Opens a release folder and verifies all of it.

    Raises:
        ReleaseError: a file is missing or damaged, or the manifest and the domain file do not agree. Publish the release again.
    """
    folder = Path(folder)
    found = _ID.fullmatch(folder.name)
    if not found:
        raise ReleaseError(f"{folder.name!r} is not a release id: RANKER-YYYYMMDDTHHMMSSZ-8 hexadecimal digits")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if not isinstance(manifest, dict):
            raise ReleaseError(f"{folder.name}/manifest.json: not a JSON object")
        if manifest.get("format_version") != FORMAT_VERSION:
            version = manifest.get("format_version")
            raise ReleaseError(f"{folder.name}/manifest.json: format_version {version} is not {FORMAT_VERSION}: upgrade this program")
        _verify_contents(folder, manifest, found["content"])
        domain = _domain_with(load_domain(folder / "domain.toml"), manifest["ranker"])
    except OSError as error:
        raise ReleaseError(f"{folder.name}: {Path(error.filename or folder).name} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, DomainError) as error:
        raise ReleaseError(f"{folder.name}: {error}") from error
    _verify_interface(folder.name, manifest, _interface(domain, manifest["ranker"]))
    _verify_score(folder.name, domain, manifest["ranker"])
    if found["ranker"] != manifest["ranker"]:
        raise ReleaseError(f"{folder.name}: the folder says ranker {found['ranker']!r}, manifest.json says {manifest['ranker']!r}")
    return Release(
        folder.resolve(),
        folder.name,
        manifest["ranker"],
        manifest["created_ms"],
        domain,
        manifest["generations"],
        manifest["metrics"],
        manifest,
    )


def release_folder(releases: Path, release_id: str) -> Path:
    """Folder of a release by its id, which may come from outside: anything that is not an id, a path say, is refused."""
    if not _ID.fullmatch(release_id):
        raise ReleaseError(f"release_id: {release_id!r} is not RANKER-YYYYMMDDTHHMMSSZ-8 hexadecimal digits")
    return Path(releases) / release_id


def newest_releases(releases: Path) -> dict[str, str]:
    """Id of the newest release of each ranker, by its time; of the same second, the greater id; none for experiments only."""
    newest: dict[str, str] = {}
    folders = Path(releases).glob("*/manifest.json")
    for release_id in sorted((path.parent.name for path in folders), reverse=True):  # of one ranker, newest first
        found = _ID.fullmatch(release_id)
        if found and found["ranker"] not in newest and not _is_only(Path(releases) / release_id):
            newest[found["ranker"]] = release_id
    return newest


def _is_only(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_bytes()).get("only", False))
    except (OSError, ValueError, AttributeError):
        return False  # whoever opens it says what is wrong


def load_small(release: Release) -> SmallModel | None:
    """The release's small model; None: it has none. Raises ReleaseError: it is not of the ranker that domain.toml describes."""
    if SMALL_FILE not in release.manifest["files"]:
        return None
    try:
        return read_small(release.domain, release.ranker, release.folder / SMALL_FILE)
    except ValueError as error:
        raise ReleaseError(f"{release.release_id}: {error}") from error


def load_model(release: Release, *, device: str = "cpu") -> "TransActRanker | NoopRanker":
    """The release's model in eval mode, with its weights, on `device`.

    Raises:
        ReleaseError: the weights are not those of the model that domain.toml describes.
    """
    from safetensors.torch import load_file

    from inference.transact import NoopRanker, TransActRanker

    name = release.manifest["model"]["name"]
    if name == NOOP:
        return NoopRanker(release.domain, release.ranker)
    if name != TRANSACT:
        raise ReleaseError(f"{release.release_id}: model {name!r} is not known; known: {TRANSACT}, {NOOP}")
    model = TransActRanker(release.domain, release.ranker, use_sequence=release.manifest["model"]["use_sequence"])
    try:
        model.load_state_dict(load_file(release.folder / "model.safetensors"))
    except RuntimeError as error:
        raise ReleaseError(f"{release.release_id}: model.safetensors and domain.toml do not agree: {error}") from error
    return model.to(device).eval()


def write_triton_model(
    release: Release,
    repository: Path,
    *,
    threads: int = 2,
    instances: int = 1,
    device: str = "auto",
    batch_requests_max: int = 8,
    batch_delay_us: int = 0,
) -> str:
    """Generates `<repository>/<release id>` for Triton's Python backend and returns the model's name, which is the release id.

    Args:
        release: what it serves.
        repository: Triton's model repository, a folder that Triton sees under the same path.
        threads: PyTorch threads of each instance; PyTorch's own default is every core.
        instances: processes that serve the model.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        batch_requests_max: most requests that the model answers at once.
        batch_delay_us: how long Triton waits for more of them, microseconds.
    """
    folder = Path(repository) / release.release_id
    (folder / "1").mkdir(parents=True, exist_ok=True)
    _replace(folder / "1" / "model.py", MODEL_PY)
    parameters = {"release_folder": str(release.folder), "threads": str(threads), "device": device}
    batching = {"batch_requests_max": batch_requests_max, "batch_delay_us": batch_delay_us}
    _replace(folder / "config.pbtxt", config_pbtxt(release, parameters=parameters, instances=instances, **batching))
    return release.release_id


MODEL_PY = '''"""Serves one release: see deploy/triton_shim.py."""

import os
import sys

# The stub's interpreter does not read PYTHONPATH, which says where freshrank and its packages are.
sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
# Read when PyTorch loads OpenMP. By default its threads wait by spinning: with other work on the cores that made two threads ten times
# slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from deploy.triton_shim import TritonPythonModel  # noqa: E402, F401
'''


def config_pbtxt(
    release: Release, *, parameters: Mapping[str, str], instances: int, batch_requests_max: int = 8, batch_delay_us: int = 0
) -> str:
    """Triton's description of the model: its tensors are the domain file's, with a batch dimension before them, which is the requests.

    Requests have different numbers of candidates: their tensors are ragged, so each comes as its own [1, C, ...], and `execute` joins them.
    """
    # KIND_CPU: a Python-backend model places its own tensors, and KIND_GPU does not load where Triton finds no GPU.
    # No queue policy: with one, bursts stall in Triton 2.51; the ranking server sheds load.
    lines = [f'name: "{release.release_id}"', 'backend: "python"', f"max_batch_size: {batch_requests_max}"]
    for side, tensors in (
        ("input", tensor_table(release.domain, release.ranker)),
        ("output", output_table(release.domain, release.ranker)),
    ):
        for tensor in tensors:
            dims = ", ".join(str(size) for size in tensor.shape)
            ragged = " allow_ragged_batch: true" if side == "input" and tensor.per_candidate else ""
            kind = _TRITON_TYPES[tensor.dtype.name]
            lines.append(f'{side} {{ name: "{tensor.name}" data_type: TYPE_{kind} dims: [ {dims} ]{ragged} }}')
    lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {batch_delay_us} }}")
    lines.append(f"instance_group {{ count: {instances} kind: KIND_CPU }}")
    for key, value in sorted(parameters.items()):
        lines.append(f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}")
    return "\n".join(lines) + "\n"


def blank_request(domain: Domain, ranker: str, candidates: int) -> dict[str, npt.NDArray[np.generic]]:
    """Input tensors of a request with a full sequence and no content: what a model is warmed with."""
    tensors: dict[str, npt.NDArray[np.generic]] = {
        tensor.name: np.zeros([candidates if size == DYNAMIC else size for size in tensor.shape], tensor.dtype)
        for tensor in tensor_table(domain, ranker)
    }
    tensors["sequence_count"][:] = domain.ranker[ranker].sequence_length
    return tensors


def _domain_with(domain: Domain, ranker: str) -> Domain:
    if ranker not in domain.ranker:
        raise ReleaseError(f"ranker: {ranker!r} is not in the domain file; allowed: {', '.join(sorted(domain.ranker))}")
    return domain


def _interface(domain: Domain, ranker: str) -> dict[str, Any]:
    """What must agree between a manifest and its domain file."""

    def rows(tensors: tuple[Tensor, ...]) -> list[dict[str, Any]]:
        return [{"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)} for tensor in tensors]

    settings = domain.ranker[ranker]
    spaces = [settings.item_space, *([settings.user_space] if settings.user_space else [])]
    return {
        "inputs": rows(tensor_table(domain, ranker)),
        "outputs": rows(output_table(domain, ranker)),
        "tensor_fingerprint": tensor_fingerprint(domain, ranker),
        "spaces": [{"name": name, "dimension": settings.embedding_dimension, "dtype": "float16"} for name in dict.fromkeys(spaces)],
        "sequence": {"name": settings.sequence, "fingerprint": f"{domain.sequence_fingerprint(settings.sequence):016x}"},
    }


def _verify_contents(folder: Path, manifest: dict[str, Any], content: str) -> None:
    listed = set(manifest["files"])
    if not set(_FILES) <= listed <= {*_FILES, *_OPTIONAL_FILES}:
        raise ReleaseError(
            f"{folder.name}/manifest.json: files {sorted(listed)}, a release has {list(_FILES)} and may have {list(_OPTIONAL_FILES)}"
        )
    for name in sorted(listed):
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest["files"][name]:
            raise ReleaseError(f"{folder.name}/{name}: sha256 {found[:16]}..., manifest.json says {manifest['files'][name][:16]}...")
    if manifest.get("release_id") != folder.name:
        raise ReleaseError(f"{folder.name}: manifest.json says release {manifest.get('release_id')!r}")
    found = _content({key: value for key, value in manifest.items() if key != "release_id"})
    if found != content:
        raise ReleaseError(f"{folder.name}/manifest.json: its content gives {found}, its release id says {content}")


def _verify_interface(release_id: str, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in ("inputs", "outputs"):
        ours = {row["name"]: row for row in expected[key]}
        theirs = {row["name"]: row for row in manifest[key]}
        for name in dict.fromkeys((*theirs, *ours)):
            if ours.get(name) != theirs.get(name):
                raise ReleaseError(
                    f"{release_id}: tensor {name}: manifest.json has {_shown(theirs.get(name))}, domain.toml gives {_shown(ours.get(name))}"
                )
    for key in expected:
        if manifest.get(key) != expected[key]:
            raise ReleaseError(f"{release_id}: {key}: manifest.json has {manifest.get(key)}, domain.toml gives {expected[key]}")


def _verify_score(release_id: str, domain: Domain, ranker: str) -> None:
    score = domain.ranker[ranker].score
    if score is not None:
        try:
            Formula(domain, ranker, score)
        except FormulaError as error:
            raise ReleaseError(f"{release_id}: domain.toml: ranker.{ranker}.score: {error}") from error


def _shown(row: Mapping[str, Any] | None) -> str:
    return "no such tensor" if row is None else f"{row['dtype']} {row['shape']}"


def _content(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(manifest)).hexdigest()[:8]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step, and leaves it alone where it is the same: Triton reloads a model whose files are newer."""
    if path.is_file() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)

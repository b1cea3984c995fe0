"""Embedding and feature tables: immutable generation folders, memory mapped, looked up for whole requests at once.

A *space* is a named family of generations: an embedding space, `features` (raw features of items and users) or `takedowns` (ids of items
taken down). Generations of one *lineage* may replace each other at any time: their vectors come from one training and are comparable by dot
product. A model is served with the lineage that it was trained with, whatever else its space holds. A generation is the folder
`<root>/<space>/<generation>/`; `meta.json` says what is in it, with the checksum of every file, and the folder gets its name last, so that
a reader sees all of it or nothing. A generation has *members*: `item.<entity kind>` and `user`. Each has sorted ids and columns; row 0 of
every column is what an unknown id gets.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from features.domain import Domain, Feature
from features.erasures import NOBODY, Erased, erased_before_ms
from features.id_index import IdIndex
from features.ids import U64
from features.tensors import stored_columns

FORMAT_VERSION = 1
USER = "user"
FEATURES_SPACE = "features"
TAKEDOWNS_SPACE = "takedowns"
NONE = "none"
"""Instead of a generation's name: this space was not used (a replay must not find one that came later)."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MEMBER = re.compile(r"user|item\.[a-z][a-z0-9_]{0,39}")
_GENERATION = re.compile(r"\d{8}T\d{9}Z-[0-9a-f]{8}")
_MOMENT = len("20231114T221320007Z")
_FILE_NAME = re.compile(rf"(?:{_MEMBER.pattern})\.[a-z][a-z0-9_]{{0,39}}\.npy")
_LINEAGE = re.compile(r"[0-9A-Za-z._-]{0,64}")
_VECTORS = "vectors"
_CHUNK_ROWS = 1 << 18
_TIME_MS_MAX = 253_402_300_800_000  # year 10000

Array = npt.NDArray[Any]


class TableError(ValueError):
    """A generation that cannot be written or used; the message names the folder and both sides of a mismatch."""


@dataclass(frozen=True)
class Member:
    """What `write_generation` gets of one member.

    ids uint64 [n], distinct, in any order; vectors float16 [n, D] or None, finite; missing_vector float16 [D]: what unknown ids get (zeros
    where None); features by name: number float32 [n] (NaN: missing), vector float32 [n, dimension], category uint64 [n] (xxh3-64 of the
    text, 0: missing), list uint64 [n, length_max] (values first, 0 behind them), weighted_list the same and beside it float32
    [n, length_max] under NAME__weights.
    """

    ids: U64
    vectors: npt.NDArray[np.float16] | None = None
    missing_vector: npt.NDArray[np.float16] | None = None
    features: Mapping[str, Array] = field(default_factory=dict)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]


class _Meta(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    space: str
    generation: str
    created_ms: int
    dimension: int | None
    lineage: str = ""
    rows: dict[str, int]
    """Ids of each member, the row of unknown ids not counted."""
    files: dict[str, _File]
    users_dropped: int = 0
    """Users erased since it was written, whose rows were taken out (`drop_users`)."""
    files_written: dict[str, str] = {}
    """Where users were dropped: checksum of each file as it was first written, from which the generation's name comes."""
    revision: int = 0
    """Of several generations of one moment the one written last has the greatest."""

    @property
    def checksums(self) -> dict[str, str]:
        """What the name says: the checksum of each file as it was first written."""
        return self.files_written or {name: file.sha256 for name, file in self.files.items()}


def item_member(kind_name: str) -> str:
    """Member of the items of an entity kind."""
    return f"item.{kind_name}"


def write_generation(
    root: str | Path, space: str, created_ms: int, members: Mapping[str, Member], *, lineage: str = "", erased: Erased = NOBODY
) -> Path:
    """Writes a generation and returns its folder, `<root>/<space>/YYYYMMDDTHHMMSSmmmZ-<8 hex digits of its content>`.

    `created_ms` (milliseconds since 1970-01-01 UTC) makes the name, so that the newest generation has the greatest one. It is the time of
    the data, when the log was read, not of its writing: a user erased at or after it is not looked up. Writing the same content with the
    same time and lineage again gives the same folder; of several generations of one time the one written last is the newest. `lineage` (up
    to 64 letters, digits and `._-`) names the training whose vectors are comparable with these; generations without one are of the lineage
    "". Users of `erased` whose erasure came at `created_ms` or later are left out: what is written may know their erased past.

    Raises:
        TableError: naming the member and column that cannot be written.
    """
    if not _NAME.fullmatch(space):
        raise TableError(f"space {space!r}: must match {_NAME.pattern}")
    if not _LINEAGE.fullmatch(lineage):
        raise TableError(f"lineage {lineage!r}: must match {_LINEAGE.pattern}")
    dimensions = {m.vectors.shape[-1] for m in members.values() if m.vectors is not None}
    if len(dimensions) > 1:
        raise TableError(f"space {space}: its members have vectors of several dimensions: {sorted(dimensions)}")
    if USER in members:
        members = {**members, USER: _without(members[USER], erased_before_ms(erased, members[USER].ids) >= created_ms)}
    parent = Path(root) / space
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    try:
        files: dict[str, _File] = {}
        for name, member in sorted(members.items()):
            files |= _write_member(folder, name, member)
        generation = f"{_moment(created_ms)}-{_content({name: file.sha256 for name, file in files.items()}, lineage)}"
        target = parent / generation
        same_moment = (path.parent for path in parent.glob(f"{generation[:_MOMENT]}-*/meta.json"))
        revision = 1 + max((_revision(other) for other in same_moment if other != target), default=-1)
        if target.exists():
            if _revision(target) < revision:
                _write_meta(target, read_meta(target).model_copy(update={"revision": revision}))
            return target
        meta = _Meta(
            format_version=FORMAT_VERSION,
            space=space,
            generation=generation,
            created_ms=created_ms,
            dimension=next(iter(dimensions), None),
            lineage=lineage,
            rows={name: len(member.ids) for name, member in sorted(members.items())},
            files=files,
            revision=revision,
        )
        seal(folder, meta)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():  # another writer of the same was faster
                raise
        sync_path(parent)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone after a rename


def _without(member: Member, gone: npt.NDArray[np.bool_]) -> Member:
    if not gone.any():
        return member
    vectors = None if member.vectors is None else member.vectors[~gone]
    features = {name: values[~gone] for name, values in member.features.items()}
    return Member(member.ids[~gone], vectors, member.missing_vector, features)


def _write_meta(folder: Path, meta: _Meta) -> None:
    """Replaces meta.json. A key that earlier programs do not know is left out where it says nothing."""
    partial = folder / ".meta.json"
    partial.write_text(meta.model_dump_json(indent=1, exclude=None if meta.revision else {"revision"}) + "\n", "utf-8")
    sync_path(partial)
    partial.replace(folder / "meta.json")
    sync_path(folder)


def seal(folder: Path, meta: _Meta) -> None:
    """Writes meta.json, and all of the folder to disk."""
    _write_meta(folder, meta)
    folder.chmod(0o755)  # mkdtemp's folder is private; the server may be another user
    for path in (*folder.iterdir(), folder):
        sync_path(path)


def _moment(time_ms: int) -> str:
    if not 0 <= time_ms < _TIME_MS_MAX:
        raise TableError(f"created_ms: {time_ms} is not a time in milliseconds since 1970-01-01 UTC")
    text = np.datetime_as_string(np.datetime64(time_ms, "ms"))
    return re.sub(r"[-:.]", "", str(text)) + "Z"


def _content(checksums: Mapping[str, str], lineage: str) -> str:
    """8 hexadecimal digits of the checksums of all files and the lineage."""
    lines = "".join(f"{name}:{sha256}\n" for name, sha256 in sorted(checksums.items()))
    if lineage:
        lines += f"lineage:{lineage}\n"
    return hashlib.sha256(lines.encode()).hexdigest()[:8]


def _write_member(folder: Path, name: str, member: Member) -> dict[str, _File]:
    if not _MEMBER.fullmatch(name):
        raise TableError(f"member {name!r}: must match {_MEMBER.pattern}")
    ids = np.asarray(member.ids)
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise TableError(f"{name}.ids: must be uint64 [n], not {ids.dtype} {list(ids.shape)}")
    order = np.argsort(ids, kind="stable") if (ids[1:] <= ids[:-1]).any() else None
    ordered = ids if order is None else ids[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise TableError(f"{name}.ids: {ordered[twice[0]]} stands there twice")
    np.save(folder / f"{name}.ids.npy", ordered)
    columns: dict[str, tuple[Array, Array]] = {}
    if member.vectors is not None:
        missing = member.missing_vector
        missing = np.zeros(member.vectors.shape[-1], np.float16) if missing is None else np.asarray(missing)
        if member.vectors.dtype != np.float16 or member.vectors.ndim != 2 or missing.dtype != np.float16:
            raise TableError(f"{name}.{_VECTORS}: must be float16 [n, D], not {member.vectors.dtype} {list(member.vectors.shape)}")
        columns[_VECTORS] = member.vectors, missing
    for feature, values in member.features.items():
        if not _NAME.fullmatch(feature) or feature in (_VECTORS, "ids"):
            raise TableError(f"{name}: {feature!r} cannot be the name of a feature")
        columns[feature] = values, _missing_row(name, feature, values)
    for column, (values, missing) in columns.items():
        if len(values) != len(ids):
            raise TableError(f"{name}.{column}: {len(values)} rows for {len(ids)} ids")
        _write_column(folder / f"{name}.{column}.npy", values, missing, order)
    return {f"{name}.{column}.npy": describe(folder / f"{name}.{column}.npy") for column in ("ids", *columns)}


def _missing_row(name: str, feature: str, values: Array) -> Array:
    if values.dtype == np.float32 and values.ndim in (1, 2):
        return np.full(values.shape[1:], np.nan, np.float32)
    if values.dtype == np.uint64 and values.ndim in (1, 2):
        return np.zeros(values.shape[1:], np.uint64)
    raise TableError(f"{name}.{feature}: must be float32 or uint64, [n] or [n, length], not {values.dtype} {list(values.shape)}")


def _write_column(path: Path, values: Array, missing: Array, order: npt.NDArray[np.int64] | None) -> None:
    out = np.lib.format.open_memmap(path, "w+", values.dtype, (len(values) + 1, *values.shape[1:]))
    out[0] = missing
    for start in range(0, len(values), _CHUNK_ROWS):
        stop = start + _CHUNK_ROWS
        out[1 + start : 1 + stop] = values[start:stop] if order is None else values[order[start:stop]]
    if values.dtype == np.float16 and not np.isfinite(out).all():
        raise TableError(f"{path.name}: vectors must be finite (float16 ends at 65504)")
    if values.dtype == np.float32 and np.isinf(out).any():
        raise TableError(f"{path.name}: numbers must be finite, or NaN for missing")
    out.flush()


def describe(path: Path) -> _File:
    """What meta.json says of a file."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _File(sha256=_sha256(path), bytes=path.stat().st_size, dtype=array.dtype.str, shape=array.shape)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Makes a file's contents, or a folder's names, outlast a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def generation_names(root: str | Path, space: str) -> list[str]:
    """Names of a space's complete generations, oldest first; those of one moment in the order in which they were written."""
    parent = Path(root) / space
    names = sorted(path.parent.name for path in parent.glob("*/meta.json") if _GENERATION.fullmatch(path.parent.name))
    if any(one[:_MOMENT] == two[:_MOMENT] for one, two in pairwise(names)):
        names.sort(key=lambda name: (name[:_MOMENT], _revision(parent / name), name))
    return names


def _revision(folder: Path) -> int:
    """Of a generation; 0 where its meta.json cannot be read, which is for who opens it to say."""
    try:
        return int(json.loads((folder / "meta.json").read_bytes()).get("revision", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0


def time_of(generation: str) -> int:
    """The time in a generation's name: of its data, milliseconds since 1970-01-01 UTC."""
    text = re.sub(r"(....)(..)(..T..)(..)(..)(...).*", r"\1-\2-\3:\4:\5.\6", generation)
    return int(np.datetime64(text, "ms").astype(np.int64))


def generations_of(root: str | Path, space: str, lineage: str) -> Iterator[str]:
    """Names of a space's complete generations of one lineage, newest first.

    Raises:
        TableError: the meta.json of one that is come across cannot be read.
    """
    names = generation_names(root, space)
    return (name for name in reversed(names) if read_meta(Path(root) / space / name).lineage == lineage)


def lineage_of(root: str | Path, space: str, generation: str) -> str:
    """The lineage of a generation. Raises TableError: it is not there, or its meta.json cannot be read."""
    return read_meta(_folder_of(root, space, generation)).lineage


def open_generation(root: str | Path, space: str, generation: str | None = None, *, verify: bool = False) -> "Generation":
    """Maps a generation, the newest where `generation` is None. `verify` reads all of it and compares checksums.

    Raises:
        TableError: there is none, or what stands there is not what meta.json says, with both sides named.
    """
    folder = _folder_of(root, space, generation)
    meta = read_meta(folder)
    columns: dict[str, dict[str, Array]] = {}
    for file_name, file in meta.files.items():
        member, _, column = file_name.removesuffix(".npy").rpartition(".")
        columns.setdefault(member, {})[column] = _map(folder / file_name, file, verify)
    for member, arrays in columns.items():
        rows = meta.rows.get(member)
        for column, array in arrays.items():
            if rows is None or len(array) != rows + (column != "ids"):
                raise TableError(f"{folder}: {member}.{column} has {len(array)} rows; meta.json says {rows} ids")
    found = Generation(folder, meta.created_ms, meta.dimension, meta.lineage, columns)
    for member in columns if verify else ():  # who verifies is going to serve it
        found.index(member)
    return found


def _folder_of(root: str | Path, space: str, generation: str | None) -> Path:
    """Folder of a generation (None: the newest), whose name may come from outside: only one that stands in the space is accepted."""
    parent = Path(root) / space
    if generation is not None and _GENERATION.fullmatch(generation) and (parent / generation / "meta.json").is_file():
        return parent / generation
    names = generation_names(root, space)
    if not names:
        raise TableError(f"{parent}: no generation there; publish one first")
    if generation is not None:
        raise TableError(f"{parent}: generation {generation!r} is not there; space {space} has {', '.join(names[-5:])}")
    return parent / names[-1]


def read_meta(folder: Path) -> _Meta:
    """A generation's meta.json, checked against the folder's name."""
    try:
        meta = _Meta.model_validate_json((folder / "meta.json").read_bytes())
    except OSError as error:
        raise TableError(f"{folder}/meta.json: {error.strerror}") from error
    except ValidationError as error:
        raise TableError(f"{folder}/meta.json: not of format {FORMAT_VERSION}: {error}") from error
    for key, said, wanted in (
        ("format_version", meta.format_version, FORMAT_VERSION),
        ("space", meta.space, folder.parent.name),
        ("generation", meta.generation, folder.name),
        ("content", _content(meta.checksums, meta.lineage), folder.name[-8:]),
    ):
        if said != wanted:
            raise TableError(f"{folder}/meta.json: {key} is {said!r}, expected {wanted!r}")
    for file_name in meta.files:
        if not _FILE_NAME.fullmatch(file_name):
            raise TableError(f"{folder}/meta.json: files: {file_name!r} is not MEMBER.COLUMN.npy")
    return meta


def _map(path: Path, file: _File, verify: bool) -> Array:
    try:
        size = path.stat().st_size
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read: {error}; publish the generation again") from error
    if size != file.bytes or array.dtype.str != file.dtype or array.shape != file.shape:
        found = f"{size} bytes, {array.dtype.str} {list(array.shape)}"
        raise TableError(f"{path}: {found}; meta.json says {file.bytes} bytes, {file.dtype} {list(file.shape)}")
    if verify:
        sha256 = _sha256(path)
        if sha256 != file.sha256:
            raise TableError(f"{path}: its sha256 is {sha256}; meta.json says {file.sha256}")
    return np.asarray(array)  # a plain view: np.take on a memmap object copies all of it


class Generation:
    """A mapped generation. Read-only and safe to share between threads; its files stay mapped as long as it is referenced."""

    def __init__(self, folder: Path, created_ms: int, dimension: int | None, lineage: str, columns: dict[str, dict[str, Array]]) -> None:
        self.folder = folder
        self.space = folder.parent.name
        self.name = folder.name
        self.created_ms = created_ms
        """Time of its data, milliseconds since 1970-01-01 UTC."""
        self.dimension = dimension
        """Width of the vectors; None: a generation without vectors."""
        self.lineage = lineage
        """Identity of the training whose vectors are comparable with these; "": none was named."""
        self._columns = columns
        self._indices: dict[str, IdIndex] = {}

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members, sorted."""
        return tuple(sorted(self._columns))

    def ids(self, member: str) -> U64:
        """Ids of a member, ascending: uint64 [n]. Row i + 1 of each column belongs to ids[i]. Empty for a member that is not there."""
        return self._columns[member]["ids"] if member in self._columns else np.zeros(0, np.uint64)

    def rows(self, member: str, ids: U64) -> npt.NDArray[np.int64]:
        """Row of each id: int64 [n]; 0: unknown, or no such member."""
        return self.index(member).rows(ids)

    def index(self, member: str) -> IdIndex:
        """What finds the rows of a member's ids; made at its first use, which takes a tenth of a second for 10 million."""
        index = self._indices.get(member)
        if index is None:
            index = self._indices[member] = IdIndex(self.ids(member))
        return index

    def column(self, member: str, name: str) -> Array | None:
        """A feature's column [n + 1, ...] (row 0: the missing value), or None."""
        return self._columns.get(member, {}).get(name)

    def vector_table(self, member: str) -> npt.NDArray[np.float16] | None:
        """Vectors of a member: float16 [n + 1, D] (row 0: of unknown ids), or None."""
        return self.column(member, _VECTORS)

    def vectors(self, member: str, ids: U64) -> npt.NDArray[np.float16]:
        """Vector of each id, the defined one for unknown ids: float16 [n, D].

        Raises:
            TableError: the member has no vectors.
        """
        table = self.vector_table(member)
        if table is None:
            raise TableError(f"{self.folder}: {member} has no vectors; it has members {', '.join(self.members)}")
        return table.take(self.rows(member, ids), axis=0, mode="clip")


class Found:
    """Rows of a batch of ids in one generation. `TableSet.find` and `find_user` make it.

    missing bool [n]: no such id. `fill` copies a column's values into a prepared array.
    """

    def __init__(
        self,
        generation: Generation,
        parts: Seq[tuple[str, npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]],
        missing: npt.NDArray[np.bool_],
    ) -> None:
        """`parts`: member, places in the batch (None: all of them), rows."""
        self._generation, self._parts, self.missing = generation, parts, missing

    def fill(self, name: str, out: Array) -> None:
        """Writes the column's value of each item into `out` [n, ...]; places whose member has no such column stay as they are."""
        for member, where, rows in self._parts:
            table = self._generation.column(member, name)
            if table is None:
                continue
            if where is None and out.flags.c_contiguous:
                table.take(rows, axis=0, out=out, mode="clip")
            else:
                out[slice(None) if where is None else where] = table.take(rows, axis=0, mode="clip")

    def fill_vectors(self, out: npt.NDArray[np.float16]) -> None:
        """`fill` with the vectors: float16 [n, D]."""
        self.fill(_VECTORS, out)


@dataclass(frozen=True)
class TableSet:
    """The generations that one ranker needs, opened and checked against the domain file. Swapped as a whole."""

    items: Generation
    users: Generation | None
    features: Generation | None
    takedowns: Generation | None
    member_of_kind: Mapping[int, str]
    generations: dict[str, str]
    """Generation by space, as an answer and the ranking log say it; `NONE` for a space that was not there."""

    @classmethod
    def open(
        cls,
        root: str | Path,
        domain: Domain,
        ranker_name: str,
        generations: Mapping[str, str] | None = None,
        *,
        verify: bool = False,
    ) -> Self:
        """Opens every space that the ranker needs: in the generation that `generations` names, else in the newest.

        Spaces are the ranker's item_space and user_space, `features` if it has item or user features, and `takedowns` if there is one.
        `TableSet.open(..., generations=earlier.generations)` opens exactly what `earlier` did.

        Raises:
            TableError: a space, dimension, member or column is not what the domain file needs, with both sides named.
        """
        ranker = domain.ranker[ranker_name]
        pinned = dict(generations or {})
        opened: dict[str, Generation] = {}

        def take(space: str) -> Generation:
            if space not in opened:
                opened[space] = open_generation(root, space, pinned.get(space), verify=verify)
            return opened[space]

        member_of_kind = {number: item_member(name) for name, number in domain.entities.items()}
        items = take(ranker.item_space)
        _check_vectors(items, ranker_name, ranker.embedding_dimension, list(member_of_kind.values()))
        users = take(ranker.user_space) if ranker.user_space is not None else None
        if users is not None:
            _check_vectors(users, ranker_name, ranker.embedding_dimension, [USER])
        stored = {name: domain.features[name] for name in ranker.features if domain.features[name].side in ("user", "item")}
        features = take(FEATURES_SPACE) if stored else None
        if features is not None:
            _check_features(features, stored, list(member_of_kind.values()))
        used = {space: generation.name for space, generation in opened.items()}
        takedowns = None
        if pinned.get(TAKEDOWNS_SPACE, "") != NONE and (TAKEDOWNS_SPACE in pinned or generation_names(root, TAKEDOWNS_SPACE)):
            takedowns = take(TAKEDOWNS_SPACE)
        used[TAKEDOWNS_SPACE] = takedowns.name if takedowns is not None else NONE
        return cls(items, users, features, takedowns, member_of_kind, used)

    def find(self, generation: Generation, kinds: npt.NDArray[np.uint8], ids: U64) -> Found:
        """Looks items up: kinds uint8 [n], ids uint64 [n]. A kind that has no member is missing."""
        if len(self.member_of_kind) == 1:
            ((kind, member),) = self.member_of_kind.items()
            if bool((kinds == kind).all()):
                rows = generation.rows(member, ids)
                return Found(generation, [(member, None, rows)], rows == 0)
        parts, missing = [], np.ones(len(ids), bool)
        for kind, member in self.member_of_kind.items():
            where = np.flatnonzero(kinds == kind)
            if len(where):
                rows = generation.rows(member, ids[where])
                parts.append((member, where, rows))
                missing[where] = rows == 0
        return Found(generation, parts, missing)

    @staticmethod
    def find_user(generation: Generation, user_id: int, erased_before_ms: int) -> Found:
        """Looks one user up: n = 1. A user erased when or after the generation's data was read is missing: it may know the erased past."""
        rows = np.zeros(1, np.int64) if generation.created_ms <= erased_before_ms else generation.rows(USER, np.array([user_id], np.uint64))
        return Found(generation, [(USER, None, rows)], rows == 0)

    def taken_down(self, kinds: npt.NDArray[np.uint8], ids: U64) -> npt.NDArray[np.bool_]:
        """Which items are taken down: bool [n]."""
        if self.takedowns is None:
            return np.zeros(len(ids), bool)
        return ~self.find(self.takedowns, kinds, ids).missing


def _check_vectors(generation: Generation, ranker_name: str, dimension: int, members: Seq[str]) -> None:
    if generation.dimension != dimension:
        asked = f"ranker.{ranker_name}.embedding_dimension is {dimension}"
        raise TableError(f"{generation.folder}: its vectors have dimension {generation.dimension}; {asked}")
    present = [member for member in members if member in generation.members]
    if not present or any(generation.vector_table(member) is None for member in present):
        found = ", ".join(member for member in generation.members if generation.vector_table(member) is not None)
        raise TableError(f"{generation.folder}: has vectors of {found}; ranker.{ranker_name} needs {' or '.join(members)}")


def _check_features(generation: Generation, stored: Mapping[str, Feature], item_members: Seq[str]) -> None:
    needed = [(of, *column) for feature, of in stored.items() for column in stored_columns(feature, of)]
    for feature, name, dtype, shape in needed:
        members = [USER] if feature.side == "user" else item_members
        columns = {member: generation.column(member, name) for member in members}
        if all(column is None for column in columns.values()):
            raise TableError(
                f"{generation.folder}: no column {name} in {' or '.join(members)}; features.{name} of the domain file needs it"
            )
        for member, column in columns.items():
            if column is not None and (column.dtype != dtype or column.shape[1:] != shape):
                found, asked = f"{column.dtype} {['n', *column.shape[1:]]}", f"{dtype} {['n', *shape]}"
                raise TableError(f"{generation.folder}: {member}.{name} is {found}; features.{name} of the domain file needs {asked}")

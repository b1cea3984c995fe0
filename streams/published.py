"""Published logs as they are: CSV (plain or gzipped) and Parquet files, read by the [log] part of a domain file.

Rows come out as Arrow tables of one shape (`row_schema`), a bounded batch at a time; a row that cannot be read is left out and counted
under its reason with examples. Nothing here decides about requests, labels or order: that is the importer's.
"""

import csv
import gzip
import itertools
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import xxhash

from features.actions import TIME_MS_MAX
from features.domain import Domain, Feature, Log, Source
from features.ids import Collisions
from features.logs import feature_type, logged_features
from features.tensors import stored_columns
from streams.columns import U64, Bools, as_text, ids_of, is_in, no_lists, nulls, numbers_of, parts_ms, split_lists, times_ms
from streams.feature_columns import WHAT, feature_column, feature_matrices

BLOCK_BYTES = 4 << 20
EXAMPLES_MAX = 5
YEAR_2000_MS, YEAR_2100_MS = 946_684_800_000, 4_102_444_800_000
UNTIMED_FROM_MS = YEAR_2000_MS + 86_400_000
"""Time of the first row of a log without times, milliseconds."""
EMPTY_TEXTS = ["", "NULL", "null", "NaN", "nan", "\\N"]
"""Texts of a CSV field that mean: nothing there."""
_TRUE_TEXTS = ("1", "1.0", "true", "True")
_FALSE_TEXTS = ("0", "0.0", "false", "False")


class PublishedError(ValueError):
    """A published log that the domain file does not fit; names file, key and what is there."""


@dataclass
class Findings:
    """Counts by reason, each with its first examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, count: int, examples: Iterable[str] = ()) -> None:
        """Counts `count` more under `reason`; examples beyond the first few are not even made."""
        if not count:
            return
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_MAX:
            kept += [example for example, _ in zip(examples, range(EXAMPLES_MAX - len(kept)), strict=False)]

    def as_json(self) -> dict[str, dict[str, Any]]:
        """By reason, most frequent first: count and examples."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {reason: {"rows": count, "examples": self.examples.get(reason, [])} for reason, count in ordered}


@dataclass
class Reading:
    """What reading has found so far: rows read, rejected rows, remarks on rows that were kept, ids whose texts collide."""

    rows: int = 0
    rejected: Findings = field(default_factory=Findings)
    noted: Findings = field(default_factory=Findings)
    collisions: Collisions = field(default_factory=Collisions)
    unread_lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Batch:
    """Columns of consecutive records of one file, which would start at line `first` if every line of it were read."""

    path: Path
    first: int
    columns: dict[str, pa.Array]
    rows: int
    unread_lines: list[int]

    def lines(self) -> npt.NDArray[np.int64]:
        """Line of each record in a CSV file (where no field holds a line break); its number from 1 in a Parquet file."""
        lines = np.arange(self.first, self.first + self.rows, dtype=np.int64)
        unread = np.sort(np.array(self.unread_lines, np.int64))
        return lines + np.searchsorted(unread - np.arange(len(unread)), lines, side="right")


class _WholeLines:
    """A CSV stream, for Arrow, without the lines that end inside a quoted field: there the parser would go on through all that follow."""

    closed = False

    def __init__(self, stream: pa.NativeFile, separator: str) -> None:
        self._stream, self._rest, self._line = stream, b"", 0
        self._shifts: list[int] = []
        self.dropped: deque[tuple[int, bytes]] = deque()
        """(line, its text) of what was left out. Arrow's reading thread appends."""
        # One way only to match, so a line takes linear time; possessive quantifiers would say so, but Python before 3.11.5 gets them wrong.
        quoted = rb'"[^"]*(?:""[^"]*)*'
        self._open = re.compile(rb'(?:(?:%b"(?!")[^%b]*|[^"%b][^%b]*)?%b)*%b' % (quoted, *[re.escape(separator.encode())] * 4, quoted))

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of whole lines; nothing at the end."""
        while True:
            more = self._stream.read(size - len(self._rest))
            data = self._rest + more
            cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, max(len(data) - 1, 0))) + 1
            if not more or not cut:  # the end, or a line longer than Arrow reads: it says so
                cut = len(data)
            self._rest = data[cut:]
            kept = self._without_open(data[:cut])
            if kept or not more:
                return kept

    def line_of(self, number: int) -> int:
        """Line of the file that is line `number` of what was passed on."""
        return number + bisect_right(self._shifts, number)

    def close(self) -> None:
        """Leaves the file to its owner."""

    def _without_open(self, data: bytes) -> bytes:
        if b'"' not in data:
            self._line += data.count(b"\n") or data.count(b"\r")
            return data
        kept = []
        for line in data.splitlines(keepends=True):
            self._line += 1
            if b'"' in line and self._open.fullmatch(line.rstrip(b"\r\n")):
                self.dropped.append((self._line, line))
                self._shifts.append(self._line - len(self._shifts))
            else:
                kept.append(line)
        return b"".join(kept)


def row_schema(domain: Domain) -> pa.Schema:
    """One row of a published log: ids hashed, times in ms, `rules` a bit for each rule of [log] that the row matches.

    event_id and request are 0 where the row has none; candidates is empty unless the log has a column of candidates.
    """
    fixed = [
        ("user_id", pa.uint64()),
        ("time_ms", pa.int64()),
        ("entity_kind", pa.uint8()),
        ("entity_id", pa.uint64()),
        ("rules", pa.uint64()),
        ("append_time_ms", pa.int64()),
        ("event_id", pa.uint64()),
        ("request", pa.uint64()),
        ("position", pa.int32()),
        ("surface", pa.uint16()),
        ("value", pa.float32()),
        ("shown", pa.uint64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("candidates", pa.list_(pa.uint64())),
    ]
    log = domain.log
    per_candidate = log is not None and log.candidates is not None
    features = [
        (f"feature.{name}", pa.list_(kind) if per_candidate and domain.features[name].side == "candidate" else kind)
        for name, kind in ((name, feature_type(domain.features[name])) for name in _given_features(domain))
    ]
    return pa.schema(fixed + features)


def _given_features(domain: Domain) -> tuple[str, ...]:
    """Features that are columns of the log: those of the impressions, counters apart."""
    return tuple(name for name in logged_features(domain) if domain.features[name].counter is None)


def log_files(log: Log | Source, data: Path) -> list[Path]:
    """Files of a log or source inside the data folder, sorted; where a file is there plain and gzipped, the plain one.

    Raises:
        PublishedError: a pattern that finds nothing.
    """
    found: dict[str, Path] = {}
    for pattern in log.files:
        paths = [path for name in (f"{pattern}.gz", pattern) for path in sorted(data.glob(name)) if path.is_file()]
        if not paths:
            there = ", ".join(sorted(path.name for path in data.iterdir())[:20]) if data.is_dir() else "no such folder"
            raise PublishedError(f"{data}: no file matches {pattern!r}, nor {pattern + '.gz'!r}; there: {there}")
        for path in paths:
            found[str(path).removesuffix(".gz")] = path
    return [found[name] for name in sorted(found)]


def read_rows(domain: Domain, data: Path, reading: Reading, on_bytes: Callable[[int], None] | None = None) -> Iterator[pa.Table]:
    """Rows of the published log (`row_schema`), in the files' order. `on_bytes` is told how many more bytes of the files were read.

    Raises:
        PublishedError: no such file or column, or a file that is not what its format says.
    """
    log = domain.log
    if log is None:
        raise PublishedError(f"domain {domain.name}: has no [log] part, which says how to read a published log")
    for number, path in enumerate(log_files(log, data)):
        for batch in _batches(path, log.format, log.separator, log.columns, _log_columns(domain), reading, on_bytes, quoted_newlines=False):
            reading.rows += batch.rows
            yield _LogBatch(domain, log, batch, number, reading).table()


def read_source(domain: Domain, source: Source, side: str, data: Path, reading: Reading) -> tuple[U64, dict[str, npt.NDArray[Any]]]:
    """Ids uint64 [n] and the features of `side` of one item or user file set, in the files' order.

    By the names and shapes of the tables' columns (`features.tensors.stored_columns`): NaN is a missing number, 0 a missing category.
    """
    log = domain.log
    assert log is not None
    features = {name: feature for name, feature in domain.features.items() if feature.side == side}
    wanted = {source.id: f"log.{side}s id"} | {feature.column or name: f"features.{name}" for name, feature in features.items()}
    ids: list[U64] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {column: [] for name, of in features.items() for column, *_ in stored_columns(name, of)}
    arguments = (source.format or log.format, source.separator or log.separator, source.columns, wanted)
    for path in log_files(source, data):
        for batch in _batches(path, *arguments, reading, None, quoted_newlines=True):
            hashed, bad = ids_of(batch.columns[source.id], source.ids, reading.collisions)
            _reject(reading.rejected, f"{source.id}: empty or not an unsigned 64-bit integer", bad, batch, source.id)
            ids.append(hashed[~bad])
            for name, feature in features.items():
                arrays, unusable = feature_matrices(name, batch.columns[feature.column or name], feature)
                _note_feature(reading, name, feature, unusable, batch)
                for column, array in arrays.items():
                    parts[column].append(array[~bad])
    return np.concatenate(ids), {name: np.concatenate(part) for name, part in parts.items()}


def _log_columns(domain: Domain) -> dict[str, str]:
    """Columns of the log that are read, with the key of the domain file that asks for each."""
    log = domain.log
    assert log is not None
    keys = (
        "user",
        "entity",
        "entity_kind_column",
        "time",
        "append_time",
        "event_id",
        "request",
        "position",
        "candidates",
        "surface",
        "value",
    )
    wanted = {getattr(log, key): f"log.{key}" for key in keys if getattr(log, key) is not None}
    wanted |= dict.fromkeys(log.time_parts, "log.time_parts")
    wanted |= {rule.column: f"log.actions[{n}].column" for n, rule in enumerate(log.actions) if rule.column is not None}
    wanted |= {domain.features[name].column or name: f"features.{name}" for name in _given_features(domain)}
    return wanted


def _batches(
    path: Path,
    file_format: str,
    separator: str,
    names: tuple[str, ...] | None,
    wanted: dict[str, str],
    reading: Reading,
    on_bytes: Callable[[int], None] | None,
    *,
    quoted_newlines: bool,
) -> Iterator[_Batch]:
    reading.unread_lines = []
    try:
        with pa.OSFile(str(path)) as raw:
            if file_format == "parquet":
                file = pq.ParquetFile(raw)
                _check_columns(path, file.schema_arrow.names, wanted)
                batches: Iterator[pa.RecordBatch] = file.iter_batches(batch_size=1 << 16, columns=list(wanted))
            else:
                batches = _csv_batches(path, raw, separator, names, wanted, reading, quoted_newlines=quoted_newlines)
            first, position = 1, 0
            for batch in batches:
                columns = {name: batch.column(name) for name in wanted}
                yield _Batch(path, first + (names is None and file_format == "csv"), columns, batch.num_rows, reading.unread_lines)
                first += batch.num_rows
                if on_bytes is not None:
                    position, before = raw.tell(), position
                    on_bytes(max(position - before, 0))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: cannot be read as {file_format}: {error}") from error


def _csv_batches(
    path: Path,
    raw: pa.OSFile,
    separator: str,
    names: tuple[str, ...] | None,
    wanted: dict[str, str],
    reading: Reading,
    *,
    quoted_newlines: bool,
) -> Iterator[pa.RecordBatch]:
    def reject(reason: str, number: int, text: str) -> None:
        lines = text.count("\n") + 1
        reading.rows += lines
        reading.unread_lines.extend(range(number, number + lines))
        reading.rejected.add(reason, lines, [f"{path.name}:{number}: {text[:80]}"])

    def skip(row: pacsv.InvalidRow) -> str:
        number = row.number or 0
        number = number if whole is None else whole.line_of(number)
        reject(f"row: {row.actual_columns} columns where the header has {row.expected_columns}", number, row.text)
        return "skip"

    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as text:
        header = next(csv.reader(text if quoted_newlines else [text.readline()], delimiter=separator), [])
    if not header:
        raise PublishedError(f"{path}: is empty")
    _check_columns(path, list(names or header), wanted)
    stream = pa.CompressedInputStream(raw, "gzip") if path.suffix == ".gz" else raw
    whole = None if quoted_newlines else _WholeLines(stream, separator)
    reader = pacsv.open_csv(
        stream if whole is None else whole,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
        parse_options=pacsv.ParseOptions(delimiter=separator, invalid_row_handler=skip, newlines_in_values=quoted_newlines),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, pa.string()),
            null_values=EMPTY_TEXTS,
            strings_can_be_null=True,
        ),
    )
    for batch in itertools.chain(reader, [None]):  # once more at the end
        while whole is not None and whole.dropped:
            number, line = whole.dropped.popleft()
            reject("row: a quote that is not closed on its line", number, line.rstrip(b"\r\n").decode(errors="replace"))
        if batch is not None:
            yield batch


def _check_columns(path: Path, there: list[str], wanted: dict[str, str]) -> None:
    for column, key in wanted.items():
        if column not in there:
            raise PublishedError(f"{path}: {key}: no column {column!r}; there: {', '.join(there)}")


class _LogBatch:
    """Turns the columns of one batch into rows. Each step may mark rows as bad; the first reason of a row counts."""

    def __init__(self, domain: Domain, log: Log, batch: _Batch, file: int, reading: Reading) -> None:
        self.domain, self.log, self.batch, self.file, self.reading = domain, log, batch, file, reading
        self.bad = np.zeros(batch.rows, bool)
        self.texts: dict[str, pa.Array] = {}

    def table(self) -> pa.Table:
        """The good rows."""
        log, n = self.log, self.batch.rows
        user = self._id("user", log.user, log.user_ids)
        listed, shown = self._candidates()
        empty = nulls(self._column(log.entity)) if log.candidates is not None else np.zeros(n, bool)
        entity = self._id("entity", log.entity, log.entity_ids, optional=empty)
        kind = self._kind()
        time_ms = self._event_time()
        append_ms = time_ms if log.append_time is None else self._time("append_time", log.append_time)
        if log.append_time is not None:
            early = time_ms - self.domain.future_tolerance_ms > append_ms
            self._reject("append_time: the event time is further ahead than future_tolerance_ms", early, log.append_time)
            self._note("append_time: before the event time, within future_tolerance_ms", time_ms > append_ms, log.append_time)
        event = np.zeros(n, np.uint64) if log.event_id is None else self._id("event_id", log.event_id, log.event_ids)
        rules = self._rules(empty)
        columns = {
            "user_id": user,
            "time_ms": time_ms,
            "entity_kind": kind,
            "entity_id": entity,
            "rules": rules,
            "append_time_ms": append_ms,
            "event_id": event,
            "request": self._request(user),
            "position": self._position(),
            "surface": self._surface(),
            "value": self._value(),
            "shown": shown,
            "file": np.full(n, self.file, np.int32),
            "row": self.batch.lines(),
            "candidates": listed,
        }
        for name in _given_features(self.domain):
            feature = self.domain.features[name]
            columns[f"feature.{name}"] = self._feature(name, feature, listed)
        table = pa.table([columns[name] for name in row_schema(self.domain).names], schema=row_schema(self.domain))
        return table.filter(pa.array(~self.bad)) if self.bad.any() else table

    def _column(self, name: str) -> pa.Array:
        return self.batch.columns[name]

    def _text(self, name: str) -> pa.Array:
        if name not in self.texts:
            self.texts[name] = as_text(self._column(name))
        return self.texts[name]

    def _reject(self, reason: str, rows: Bools, column: str) -> None:
        _reject(self.reading.rejected, reason, rows & ~self.bad, self.batch, column)
        self.bad |= rows

    def _note(self, reason: str, rows: Bools, column: str) -> None:
        _reject(self.reading.noted, reason, rows & ~self.bad, self.batch, column)

    def _id(self, key: str, column: str, ids: str, optional: Bools | None = None) -> U64:
        hashed, bad = ids_of(self._column(column), ids, self.reading.collisions)
        what = "empty" if ids == "string" else "empty or not an unsigned 64-bit integer"
        self._reject(f"{key}: {what}", bad if optional is None else bad & ~optional, column)
        return hashed

    def _event_time(self) -> npt.NDArray[np.int64]:
        log, n = self.log, self.batch.rows
        if log.time is not None:
            return self._time("time", log.time)
        if log.time_parts:
            time_ms, bad = parts_ms([self._column(name) for name in log.time_parts])
            self._reject(f"time_parts: not a date of {', '.join(log.time_parts)}", bad, log.time_parts[0])
            return self._plausible("time_parts", time_ms, bad, log.time_parts[0])
        self._note("time: the log has none; each row counts as a second after the one before it", np.ones(n, bool), log.user)
        return UNTIMED_FROM_MS + 1000 * (self.reading.rows - n + np.arange(n, dtype=np.int64))

    def _time(self, key: str, column: str) -> npt.NDArray[np.int64]:
        time_ms, bad = times_ms(self._column(column), self.log.time_unit)
        self._reject(f"{key}: empty or not a time in {self.log.time_unit}", bad, column)
        return self._plausible(key, time_ms, bad, column)

    def _plausible(self, key: str, time_ms: npt.NDArray[np.int64], bad: Bools, column: str) -> npt.NDArray[np.int64]:
        self._reject(f"{key}: must be above 0", (time_ms <= 0) & ~bad, column)
        self._reject(f"{key}: must be below 2^62 ms", time_ms >= TIME_MS_MAX, column)
        self._note(f"{key}: before the year 2000; is time_unit right?", time_ms < YEAR_2000_MS, column)
        self._note(f"{key}: after the year 2100; is time_unit right?", time_ms > YEAR_2100_MS, column)
        return time_ms

    def _kind(self) -> npt.NDArray[np.uint8]:
        numbers = self.domain.entities
        kind = np.full(self.batch.rows, numbers[self.log.entity_kind], np.uint8)
        if self.log.entity_kind_column is None:
            return kind
        text = self._text(self.log.entity_kind_column)
        given = ~nulls(text)
        kind[given] = 0
        for name, number in numbers.items():
            kind[is_in(text, (name,))] = number
        self._reject(f"entity_kind: not one of {', '.join(sorted(numbers))}", kind == 0, self.log.entity_kind_column)
        return kind

    def _rules(self, without_entity: Bools) -> U64:
        rules = np.zeros(self.batch.rows, np.uint64)
        named = {rule.column: np.zeros(self.batch.rows, bool) for rule in self.log.actions if rule.column is not None}
        for n, rule in enumerate(self.log.actions):
            matches = np.ones(self.batch.rows, bool)
            if rule.column is not None and rule.at_least is not None:
                matches = np.nan_to_num(numbers_of(self._column(rule.column))[0], nan=-np.inf) >= rule.at_least
                named[rule.column][:] = True
            elif rule.column is not None:
                matches = is_in(self._text(rule.column), rule.equals or _TRUE_TEXTS)
                named[rule.column] |= matches
            if self.domain.actions[rule.action].kind != "impression":
                matches = matches & ~without_entity
            rules |= matches.astype(np.uint64) << np.uint64(n)
        if self.log.candidates is None and named:
            self._reject(f"actions: unknown, no rule matches ({', '.join(named)})", rules == 0, next(iter(named)))
        for column, known in named.items():
            unknown = ~known & ~nulls(self._column(column)) & ~is_in(self._text(column), _FALSE_TEXTS)
            self._note(f"actions: {column} has a value that no rule names", unknown, column)
        return rules

    def _request(self, user: U64) -> U64:
        request = np.zeros(self.batch.rows, np.uint64)
        if self.log.request is not None:
            text = self._text(self.log.request)
            given = np.flatnonzero(~nulls(text))
            heads = user[given].astype("<u8").tobytes()
            texts = text.take(pa.array(given)).to_pylist()
            request[given] = np.fromiter(
                (xxhash.xxh3_64_intdigest(heads[8 * i : 8 * i + 8] + value.encode()) or 1 for i, value in enumerate(texts)),
                np.uint64,
                len(given),
            )
        return request

    def _position(self) -> npt.NDArray[np.int32]:
        if self.log.position is None:
            return np.full(self.batch.rows, -1, np.int32)
        numbers, bad = numbers_of(self._column(self.log.position))
        self._note("position: not a number; taken as unknown", bad, self.log.position)
        inside = (numbers >= 0) & (numbers < 2**31)
        return np.where(inside, np.nan_to_num(numbers), -1).astype(np.int32)

    def _surface(self) -> npt.NDArray[np.uint16]:
        surface = np.zeros(self.batch.rows, np.uint16)
        if self.log.surface is None:
            return surface
        text = self._text(self.log.surface)
        known = {name: number for called, number in self.domain.surfaces.items() for name in (called, str(number))}
        if self.log.surfaces:
            known = {called: self.domain.surfaces[name] for called, name in self.log.surfaces.items()}
        for name, number in known.items():
            surface[is_in(text, (name,))] = number
        self._note("surface: unknown; taken as none", (surface == 0) & ~nulls(text), self.log.surface)
        return surface

    def _value(self) -> npt.NDArray[np.float32]:
        if self.log.value is None:
            return np.full(self.batch.rows, np.nan, np.float32)
        numbers, bad = numbers_of(self._column(self.log.value))
        self._note("value: not a finite number; taken as none", bad, self.log.value)
        return numbers.astype(np.float32)

    def _candidates(self) -> tuple[pa.Array, U64]:
        """Lists of candidate ids, and a hash of each list's text, which tells two rows apart."""
        n = self.batch.rows
        if self.log.candidates is None:
            return no_lists(n), np.zeros(n, np.uint64)
        lists = split_lists(self._column(self.log.candidates), self.log.candidates_separator)
        hashed, bad = ids_of(lists.values, self.log.entity_ids, self.reading.collisions)
        lengths = np.diff(lists.offsets.to_numpy())
        rows_bad = np.zeros(n, bool)
        rows_bad[np.repeat(np.arange(n), lengths)[bad]] = True
        self._reject("candidates: an id that is empty or not an unsigned 64-bit integer", rows_bad, self.log.candidates)
        data, ends = hashed.astype("<u8").tobytes(), lists.offsets.to_numpy() * 8
        shown = np.fromiter((xxhash.xxh3_64_intdigest(data[a:b]) for a, b in itertools.pairwise(ends)), np.uint64, n)
        return pa.ListArray.from_arrays(lists.offsets, pa.array(hashed)), shown

    def _feature(self, name: str, feature: Feature, listed: pa.Array) -> pa.Array:
        column, key = self._column(feature.column or name), f"features.{name}"
        if self.log.candidates is None or feature.side == "request":
            array, unusable = feature_column(column, feature)
            _note_feature(self.reading, name, feature, unusable, self.batch)
            return array
        if feature.kind not in ("number", "category"):
            what = "vector" if feature.kind == "vector" else "list"
            raise PublishedError(f"{key}: a {what} for each candidate of a list cannot be read; use a log with one row a candidate")
        lists = split_lists(column, self.log.candidates_separator)
        differs = np.diff(lists.offsets.to_numpy()) != np.diff(listed.offsets.to_numpy())
        self._reject(f"{key}: not as many values as candidates", differs, feature.column or name)
        values = numbers_of(lists.values)[0].astype(np.float32) if feature.kind == "number" else ids_of(lists.values, "string", None)[0]
        return pa.ListArray.from_arrays(lists.offsets, pa.array(values))


def _reject(findings: Findings, reason: str, rows: Bools, batch: _Batch, column: str) -> None:
    index = np.flatnonzero(rows)
    if len(index):
        lines, values = batch.lines(), batch.columns[column]
        findings.add(reason, len(index), (f"{batch.path.name}:{lines[i]}: {column}={_value_text(values[int(i)])}" for i in index))


def _note_feature(reading: Reading, name: str, feature: Feature, rows: Bools, batch: _Batch) -> None:
    _reject(reading.noted, f"features.{name}: {WHAT.get(feature.kind, '')}", rows, batch, feature.column or name)


def _value_text(value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())
    except (OverflowError, ValueError):  # a time that Python's datetime cannot hold
        return str(value.value)

"""The first rows of a published file, column by column, as a person would look at them: what `streams.draft` guesses from."""

import csv
import gzip
import io
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from streams.columns import Bools, as_text, nulls
from streams.published import EMPTY_TEXTS, PublishedError

SAMPLE_ROWS = 200_000
SEPARATORS = (",", "\t", ";", "|")
LIST_SEPARATORS = ("|", ",", ";", " ")

_YEARS_S = (631_152_000, 4_102_444_800)
"""1990 to 2100, seconds: numbers in between may be times."""
_ISO = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?)?(Z|[+-]\d\d:?\d\d)?")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """A file's first rows. format, separator, header: how it is read; rows: of the sample; rows_about: of the file, estimated."""

    path: Path
    format: str
    separator: str
    columns: dict[str, "Sampled"]
    rows: int
    rows_about: int


class Sampled:
    """One column of a sample. Facts are worked out when asked for."""

    def __init__(self, name: str, array: pa.Array) -> None:
        self.name = name
        self.array = array
        self.words = frozenset(_words(name))

    @cached_property
    def is_list(self) -> bool:
        """A list column of a Parquet file."""
        return bool(
            pa.types.is_list(self.array.type) or pa.types.is_large_list(self.array.type) or pa.types.is_fixed_size_list(self.array.type)
        )

    @cached_property
    def is_temporal(self) -> bool:
        """A date or timestamp column of a Parquet file."""
        return bool(pa.types.is_timestamp(self.array.type) or pa.types.is_date(self.array.type))

    @cached_property
    def text(self) -> pa.Array:
        """The column as texts, null where there is nothing."""
        if self.is_list:
            return pa.array([None if value is None else str(value) for value in self.array.to_pylist()], pa.string())
        return as_text(self.array)

    @cached_property
    def coded(self) -> tuple[I64, list[str]]:
        """Code of each row's text (-1: none) and the distinct texts."""
        encoded = self.text.dictionary_encode()
        return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()

    @cached_property
    def given(self) -> Bools:
        """Rows that hold something: bool [n]."""
        return ~nulls(self.array)

    @property
    def distinct(self) -> int:
        """Number of distinct texts."""
        return len(self.coded[1])

    @property
    def texts(self) -> list[str]:
        """Distinct texts, most frequent first."""
        codes, texts = self.coded
        counts = np.bincount(codes[codes >= 0], minlength=len(texts))
        return [texts[n] for n in np.argsort(-counts, kind="stable")]

    @cached_property
    def numbers(self) -> npt.NDArray[np.float64] | None:
        """The rows as numbers (NaN: none), or None where some are no numbers."""
        codes, texts = self.coded
        try:
            values = np.array([float(text) for text in texts])
        except ValueError:
            return None
        if not len(values) or not np.isfinite(values).all():
            return None
        return np.where(codes >= 0, values[codes], np.nan)

    @cached_property
    def is_integer(self) -> bool:
        """Whole numbers, written so."""
        return all(text.isascii() and text.removeprefix("-").isdigit() for text in self.coded[1]) and bool(self.coded[1])

    @cached_property
    def is_id(self) -> bool:
        """Unsigned 64-bit integers, which an import can keep as they are."""
        return self.is_integer and all(not text.startswith("-") and int(text) < 1 << 64 for text in self.coded[1])

    @cached_property
    def is_binary(self) -> bool:
        """Nothing but 0 and 1, or false and true."""
        return bool(self.distinct) and {text.lower() for text in self.coded[1]} <= {"0", "1", "0.0", "1.0", "true", "false"}

    @cached_property
    def time_unit(self) -> str | None:
        """The unit in which the column may be a time."""
        if self.is_temporal:
            return "ms"
        if self.is_list or not self.distinct:
            return None
        if self.numbers is None:
            texts = self.coded[1]
            return "iso8601" if all(_ISO.fullmatch(text) for text in texts[:1000]) else None
        low, high = np.nanmin(self.numbers), np.nanmax(self.numbers)
        for unit, scale in (("s", 1), ("ms", 1_000), ("us", 1_000_000)):
            if _YEARS_S[0] * scale <= low and high <= _YEARS_S[1] * scale:
                return unit
        return None

    def list_separator(self) -> str | None:
        """What stands between the values of a text that is a list; None: it is none."""
        if self.is_list or self.is_temporal or self.numbers is not None or self.time_unit is not None:
            return None
        texts = self.coded[1][:2000]
        for separator in LIST_SEPARATORS:
            parts = [[part.strip() for part in text.split(separator)] for text in texts]
            several = sum(len(part) > 1 for part in parts)
            distinct = {value for part in parts for value in part}
            whole = all(" " not in value for value in distinct) if separator == " " else True
            if several > 0.3 * len(texts) and whole and len(distinct) < 0.8 * sum(map(len, parts)):
                return separator
        return None

    @property
    def vector_dimension(self) -> int | None:
        """How many numbers each row has, where all have as many; None: not a vector."""
        if not self.is_list or not pa.types.is_floating(self.array.type.value_type):
            return None
        lengths = set(pc.list_value_length(self.array).drop_null().to_pylist())
        return lengths.pop() if len(lengths) == 1 else None

    def lists(self, rows: Seq[int], separator: str) -> list[list[str]]:
        """The values of some rows, where the column holds lists."""
        if self.is_list:
            return [[str(value) for value in self.array[row].as_py() or ()] for row in rows]
        return [[part.strip() for part in (self.text[row].as_py() or "").split(separator) if part.strip()] for row in rows]

    def share_constant_in(self, other: "Sampled") -> tuple[float, int]:
        """Of the other column's values with two rows or more the share that have one value here, and how many there are."""
        keys, codes = other.coded[0], self.coded[0]
        both = (keys >= 0) & (codes >= 0)
        keys, codes = keys[both], codes[both]
        _, count = np.unique(keys, return_counts=True)
        _, values = np.unique(np.unique(keys * (self.distinct + 1) + codes) // (self.distinct + 1), return_counts=True)
        repeated = count > 1
        return (float((values[repeated] == 1).mean()) if repeated.any() else 0.0), int(repeated.sum())


def _words(name: str) -> list[str]:
    """Lower-case words of a column's name; `userid` is also `user`."""
    words = [word.lower() for word in _CAMEL.split(name) if word]
    return words + [part for word in words if word.endswith("id") and len(word) > 3 for part in (word[:-2], "id")]


def read_sample(path: Path, rows_max: int = SAMPLE_ROWS) -> Sample:
    """The first rows of a CSV file (plain or gzipped, any usual separator, with a header line) or a Parquet file.

    Raises:
        PublishedError: no such file, nothing in it, or none of these formats.
    """
    try:
        if path.name.endswith((".parquet", ".pq")):
            return _parquet(path, rows_max)
        return _csv(path, rows_max)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: cannot be read: {error}") from error


def _parquet(path: Path, rows_max: int) -> Sample:
    with pq.ParquetFile(path) as file:
        batches, rows = [], 0
        for batch in file.iter_batches(batch_size=min(rows_max, 1 << 16)):
            batches.append(batch)
            rows += batch.num_rows
            if rows >= rows_max:
                break
        table = pa.Table.from_batches(batches, file.schema_arrow).slice(0, rows_max)
        return _sample(path, "parquet", ",", table, file.metadata.num_rows)


def _csv(path: Path, rows_max: int) -> Sample:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as raw:
        head = raw.read(1 << 16)
        lines = head.decode("utf-8-sig", "replace").splitlines()[:200]
        if len(head) == 1 << 16:
            lines = lines[:-1]
        if len(lines) < 2:
            raise PublishedError(f"{path}: needs a header line and rows")
        separator = _separator(lines)
        header = next(csv.reader([lines[0]], delimiter=separator))
        if any(_is_number(name) for name in header) or len(set(header)) < len(header) or "" in header:
            raise PublishedError(f"{path}: its first line is no header ({lines[0][:80]!r}); name the columns in a first line")
        wanted = int(rows_max * 1.2 * max(len(head) / max(head.count(b"\n"), 1), 1)) + (1 << 16)
        data = head + raw.read(max(wanted - len(head), 0))
    table = pacsv.read_csv(
        io.BytesIO(data[: data.rfind(b"\n") + 1]),
        read_options=pacsv.ReadOptions(use_threads=False),
        parse_options=pacsv.ParseOptions(delimiter=separator, invalid_row_handler=lambda _: "skip"),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()), null_values=EMPTY_TEXTS, strings_can_be_null=True
        ),
    ).slice(0, rows_max)
    size = path.stat().st_size * (6 if path.suffix == ".gz" else 1)
    all_of_it = len(data) < wanted
    about = table.num_rows if all_of_it else int(size / max(len(data), 1) * table.num_rows)
    return _sample(path, "csv", separator, table, max(about, table.num_rows))


def _sample(path: Path, form: str, separator: str, table: pa.Table, rows_about: int) -> Sample:
    if not table.num_rows:
        raise PublishedError(f"{path}: has no rows")
    columns = {name: Sampled(name, table[name].combine_chunks()) for name in table.column_names}
    readable = {name: column for name, column in columns.items() if not pa.types.is_nested(column.array.type) or column.is_list}
    for name, column in list(readable.items()):
        if not column.is_list and not column.is_temporal:
            readable[name] = Sampled(name, _trimmed(column.array))
    return Sample(path, form, separator, readable, table.num_rows, rows_about)


def _trimmed(array: pa.Array) -> pa.Array:
    """Texts, null where a file would say that there is nothing."""
    text = array.cast(pa.string())
    return pc.if_else(pc.is_in(text, value_set=pa.array(EMPTY_TEXTS)), None, text)


def _separator(lines: list[str]) -> str:
    """The separator that cuts every line into the same number of fields, two or more."""
    best, found = 1, ","
    for separator in SEPARATORS:
        widths = [len(fields) for fields in csv.reader(lines, delimiter=separator)]
        if widths[0] > best and sum(width == widths[0] for width in widths) > 0.9 * len(widths):
            best, found = widths[0], separator
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

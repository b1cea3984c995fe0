"""One column of a published file as an array: ids, numbers, times, lists.

Each function takes an Arrow array of any type that CSV or Parquet files give and says which rows hold nothing it can use.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.actions import TIME_MS_MAX
from features.ids import ID_MAX, Collisions

Bools = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


def nulls(array: pa.Array) -> Bools:
    """Rows that hold nothing: bool [n]."""
    nulls: Bools = array.is_null().to_numpy(zero_copy_only=False)
    return nulls


def as_text(array: pa.Array) -> pa.Array:
    """The column as strings."""
    return array if array.type == pa.string() else array.cast(pa.string())


def is_in(text: pa.Array, values: Iterable[str]) -> Bools:
    """Rows whose text is one of the values: bool [n]."""
    found: Bools = pc.is_in(text, value_set=pa.array(list(values), pa.string())).to_numpy(zero_copy_only=False)
    return found


def no_lists(n: int) -> pa.Array:
    """n empty lists of ids."""
    return pa.ListArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), pa.array(np.zeros(0, np.uint64)))


def ids_of(array: pa.Array, kind: str, collisions: Collisions | None) -> tuple[U64, Bools]:
    """Ids and which rows have none. Texts are hashed once a distinct text; collisions None: no watch (categories)."""
    empty = nulls(array)
    if kind == "string":
        watch = collisions if collisions is not None else Collisions()
        coded = as_text(array).dictionary_encode()
        hashes = np.fromiter((watch.add(text) for text in coded.dictionary.to_pylist()), np.uint64, len(coded.dictionary))
        codes = coded.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(empty, np.uint64(0), hashes[codes] if len(hashes) else np.uint64(0)), empty
    try:
        numbers: U64 = array.cast(pa.uint64()).fill_null(0).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        numbers = np.zeros(len(array), np.uint64)
        for i, value in enumerate(array.to_pylist()):
            text = "" if value is None else str(value).strip().removesuffix(".0")
            if text.isascii() and text.isdigit() and int(text) <= ID_MAX:
                numbers[i] = int(text)
            else:
                empty[i] = True
    return numbers, empty


def numbers_of(array: pa.Array) -> tuple[npt.NDArray[np.float64], Bools]:
    """Numbers, NaN where there is none, and which rows hold something that is not a finite number."""
    given = ~nulls(array)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    try:
        numbers = array.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except pa.ArrowInvalid:
        numbers = np.full(len(array), np.nan)
        for i, value in enumerate(array.to_pylist()):
            try:
                numbers[i] = float(value) if value is not None else np.nan
            except ValueError:
                continue  # stays NaN, and is reported below with the rows that say NaN
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(np.float32))
    bad = given & ~finite
    numbers = np.where(finite, numbers, np.nan)
    return numbers, bad


def times_ms(array: pa.Array, unit: str) -> tuple[npt.NDArray[np.int64], Bools]:
    """Times as int64 ms [n] since 1970-01-01 UTC (0 where there is none), and which rows have none; `unit` as in [log].time_unit."""
    bad = nulls(array)
    if pa.types.is_temporal(array.type):
        return array.cast(pa.timestamp("ms", getattr(array.type, "tz", None)), safe=False).cast(pa.int64()).fill_null(0).to_numpy(), bad
    if unit == "iso8601":
        return _iso_times_ms(array, bad), bad
    try:
        ticks = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        overflow = np.abs(ticks) > TIME_MS_MAX // 1000
        time_ms = np.where(overflow, 0, ticks) * 1000 // _PER_SECOND[unit]
    except pa.ArrowInvalid:
        numbers, wrong = numbers_of(array)
        time_ms = np.round(np.nan_to_num(numbers) * (1000 / _PER_SECOND[unit]))
        overflow = wrong | (np.abs(time_ms) >= TIME_MS_MAX)
        time_ms = np.where(overflow, 0, time_ms).astype(np.int64)
    return time_ms, bad | overflow


def _iso_times_ms(array: pa.Array, bad: Bools) -> npt.NDArray[np.int64]:
    """Milliseconds of ISO 8601 texts; without an offset they are UTC. Marks what cannot be read in `bad`."""
    text = as_text(array)
    for kind in (pa.timestamp("ms"), pa.timestamp("ms", "UTC")):
        try:
            return text.cast(kind).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
        except pa.ArrowInvalid:
            continue
    time_ms = np.zeros(len(text), np.int64)
    for i, value in enumerate(text.to_pylist()):
        try:
            moment = datetime.fromisoformat(value or "")
        except ValueError:
            bad[i] = True
            continue
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        time_ms[i] = round(moment.timestamp() * 1000)
    return time_ms


def split_lists(array: pa.Array, separator: str) -> pa.ListArray:
    """Lists of trimmed texts (or of the column's own items, where it is a list column); no text gives an empty list."""
    lists = array if pa.types.is_list(array.type) else pc.split_pattern(pc.utf8_trim_whitespace(as_text(array)), separator)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    if pa.types.is_string(flat.type):
        flat = pc.utf8_trim_whitespace(flat)
        rows, keep = np.repeat(np.arange(len(lengths)), lengths), ~is_in(flat, [""])
        flat, lengths = flat.filter(pa.array(keep)), np.bincount(rows[keep], minlength=len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def parts_ms(parts: list[pa.Array]) -> tuple[npt.NDArray[np.int64], Bools]:
    """Times as int64 ms [n] from columns of year, month, day and maybe hour, minute, second (UTC), and which rows have none."""
    numbers = [np.nan_to_num(numbers_of(part)[0], nan=-1).astype(np.int64) for part in parts]
    numbers += [np.zeros(len(parts[0]), np.int64)] * (6 - len(numbers))
    year, month, day, hour, minute, second = numbers
    bad = (year < 1) | (year > 9999) | (month < 1) | (month > 12) | (day < 1) | (day > 31)
    bad |= (hour < 0) | (hour > 23) | (minute < 0) | (minute > 59) | (second < 0) | (second > 60)
    months = np.where(bad, 0, (year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + np.where(bad, 0, day - 1).astype("timedelta64[D]")
    bad |= days.astype("datetime64[M]") != months
    ms = days.astype("datetime64[ms]").astype(np.int64) + 1000 * (60 * (60 * hour + minute) + second)
    return np.where(bad, 0, ms), bad

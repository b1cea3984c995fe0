"""Feature columns of published files: numbers, categories, vectors and lists as the canonical log and the feature tables have them.

Each function also says which rows held something that it cannot use; these are as if nothing stood there.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.domain import WEIGHTS_SUFFIX, Feature
from features.logs import WEIGHTED, feature_type
from streams.columns import U64, Bools, as_text, ids_of, numbers_of, split_lists

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

WHAT = {
    "number": "not a finite number; taken as missing",
    "vector": "not as many finite numbers as its dimension; taken as missing, whole or in the places that are none",
    "weighted_list": "a weight that is no number of 0 or more; taken as 0",
}
"""What is wrong with a row that the functions below mark, by the feature's kind."""


def feature_column(column: pa.Array, feature: Feature) -> tuple[pa.Array, Bools]:
    """A feature as the canonical log has it (`features.logs.feature_type`), lists cut to length_max; and bad rows: bool [n]."""
    n = len(column)
    if feature.kind == "number":
        numbers, bad = numbers_of(column)
        return pa.array(numbers.astype(np.float32)), bad
    if feature.kind == "category":
        return pa.array(ids_of(column, "string", None)[0]), np.zeros(n, bool)
    if feature.kind == "vector":
        vectors, bad = _vectors(column, feature)
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=feature_type(feature)), bad
    if feature.kind == "weighted_list":
        offsets, ids, weights, bad = _weighted(column, feature)
        values = pa.StructArray.from_arrays([pa.array(ids), pa.array(weights)], fields=list(WEIGHTED))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values), bad
    lists = split_lists(column, feature.separator)
    hashed = pa.ListArray.from_arrays(lists.offsets, pa.array(ids_of(lists.values, "string", None)[0]))
    return pc.list_slice(hashed, 0, feature.length_max, return_fixed_size_list=False), np.zeros(n, bool)


def feature_matrices(name: str, column: pa.Array, feature: Feature) -> tuple[dict[str, npt.NDArray[Any]], Bools]:
    """A feature's columns in the tables by their names (`features.tensors.stored_columns`), and bad rows: bool [n]."""
    if feature.kind == "vector":
        vectors, bad = _vectors(column, feature)
        return {name: vectors}, bad
    if feature.kind == "weighted_list":
        offsets, ids, weights, bad = _weighted(column, feature)
        return {name: _padded(offsets, ids, feature), name + WEIGHTS_SUFFIX: _padded(offsets, weights, feature)}, bad
    array, bad = feature_column(column, feature)
    if feature.kind != "list":
        return {name: array.to_numpy(zero_copy_only=False)}, bad
    offsets = array.offsets.to_numpy()
    return {name: _padded(offsets - offsets[0], array.flatten().to_numpy(zero_copy_only=False), feature)}, bad


def _padded(offsets: npt.NDArray[Any], values: npt.NDArray[Any], feature: Feature) -> npt.NDArray[Any]:
    """Lists as rows [n, length_max], 0 behind the end."""
    lengths = np.diff(offsets)
    matrix = np.zeros((len(lengths), feature.length_max), values.dtype)
    matrix[np.arange(feature.length_max) < lengths[:, None]] = values
    return matrix


def _vectors(column: pa.Array, feature: Feature) -> tuple[F32, Bools]:
    """float32 [n, dimension], NaN where a row has no vector of that dimension, and in the places of one that hold no finite number; and
    rows that have something unusable: bool [n]."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    lists = split_lists(column, feature.separator)
    numbers = numbers_of(lists.values)[0].astype(np.float32)
    lengths = np.diff(lists.offsets.to_numpy())
    whole = lengths == feature.dimension
    vectors = np.full((len(lengths), feature.dimension), np.nan, np.float32)
    vectors[whole] = numbers[np.repeat(whole, lengths)].reshape(-1, feature.dimension)
    return vectors, np.isnan(vectors).any(1) & (lengths > 0)


def _weighted(column: pa.Array, feature: Feature) -> tuple[I64, U64, F32, Bools]:
    """Offsets [n + 1], values' hashes and weights of each list, cut to length_max; and rows with a weight that is none.

    Texts are `value:weight` (a value alone weighs 1); Parquet has lists of two fields each, or maps.
    """
    if pa.types.is_map(column.type):
        offsets, values, raw = column.offsets.to_numpy().astype(np.int64), column.keys, column.items
    elif pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
        offsets = column.offsets.to_numpy().astype(np.int64)
        values, raw = column.values.flatten()
    else:
        lists = split_lists(column, feature.separator)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        values, raw = _split_weights(as_text(lists.values), feature.weight_separator)
    start, lengths = offsets[0], np.diff(offsets)
    values, raw = values.slice(start, lengths.sum()), raw.slice(start, lengths.sum())
    rows = np.repeat(np.arange(len(lengths)), lengths)
    kept = np.arange(len(rows)) - np.repeat(offsets[:-1] - start, lengths) < feature.length_max
    numbers = numbers_of(raw)[0].astype(np.float32)
    usable = np.isfinite(numbers) & (numbers >= 0)
    bad = np.zeros(len(lengths), bool)
    bad[rows[~usable]] = True
    cut = np.append(0, np.cumsum(np.minimum(lengths, feature.length_max)))
    return cut, ids_of(values, "string", None)[0][kept], np.where(usable, numbers, np.float32(0))[kept], bad


def _split_weights(texts: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """Value and weight of each text; "1" where it has no separator."""
    parts = pc.split_pattern(texts, separator, max_splits=1, reverse=True)
    starts = parts.offsets.to_numpy()[:-1]
    two = np.diff(parts.offsets.to_numpy()) == 2
    flat = parts.flatten()
    weights = pc.if_else(pa.array(two), flat.take(pa.array(np.where(two, starts + 1, starts))), "1")
    return flat.take(pa.array(starts)), weights

"""Makes the Feast repository that `freshrank bench feast` serves: run by Feast's own interpreter.

`python prepare.py FOLDER STORE`: FOLDER has item.parquet and user.parquet, the rows of the two feature views; STORE is Feast's
configuration of the online store as JSON. Writes feature_store.yaml and the registry, and every row into the online store.
"""

import json
import sys
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32, Int64

SCALARS = {pa.int64(): Int64, pa.float32(): Float32}
ROWS_AT_ONCE = 1_000


def feast_type(kind: pa.DataType) -> object:
    return Array(SCALARS[kind.value_type]) if pa.types.is_list(kind) else SCALARS[kind]


def main(folder: Path, online_store: dict[str, str]) -> None:
    config = {
        "project": "freshrank_bench",
        "provider": "local",
        "registry": str(folder / "registry.db"),
        "online_store": online_store,
        "offline_store": {"type": "file"},
        "entity_key_serialization_version": 3,
    }
    (folder / "feature_store.yaml").write_text(yaml.safe_dump(config), "utf-8")
    store = FeatureStore(repo_path=str(folder))
    for name in ("item", "user"):
        path = folder / f"{name}.parquet"
        schema = pq.read_schema(path)
        fields = [Field(name=field.name, dtype=feast_type(field.type)) for field in schema if field.name not in (name, "event_timestamp")]
        entity = Entity(name=name, join_keys=[name], value_type=ValueType.INT64)
        view = FeatureView(
            name=f"{name}_features",
            entities=[entity],
            schema=[Field(name=name, dtype=Int64), *fields],
            source=FileSource(path=str(path), timestamp_field="event_timestamp"),
        )
        store.apply([entity, view])
        rows = pandas.read_parquet(path)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            store.write_to_online_store(view.name, rows[start : start + ROWS_AT_ONCE])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""What an erasure finds beside the rows that logs name: training arrays, and parts that no summary names."""

import json

from features.erasures import Erasure, erased_users, ledger_fingerprint
from features.log_erasure import drop_packed
from features.logs import PACKED, unnamed_parts, write_summary

ERASURES = [Erasure(7, 1, 1, 0, 5, 1_000)]


def test_arrays_of_another_ledger_go_and_those_that_do_not_say(tmp_path):
    packed = tmp_path / PACKED
    for name, meta in (
        ("now", json.dumps({"ledger": ledger_fingerprint(erased_users(ERASURES))})),
        ("before", json.dumps({"ledger": ledger_fingerprint({})})),
        ("cut-off", None),
        ("damaged", "{"),
    ):
        (packed / name).mkdir(parents=True)
        (packed / name / "user_id.npy").write_bytes(b"x")
        if meta is not None:
            (packed / name / "meta.json").write_text(meta)
    drop_packed(tmp_path, ERASURES)
    assert [path.name for path in packed.iterdir()] == ["now"]
    drop_packed(tmp_path / "no-log", ERASURES)


def test_parts_that_no_summary_names_are_found(tmp_path):
    """Process logs lie beside the logs' folders; a pass that never committed has no summary."""
    (tmp_path / "kafka.log").touch()
    for folder in ("shop.served", "given-up.served"):
        for name in ("actions", "impressions", "served"):
            (tmp_path / folder / name).mkdir(parents=True)
            for part in ("1.parquet", "2.parquet"):
                (tmp_path / folder / name / part).touch()
    parts = {f"{name}.parquet": [f"{name}/2.parquet"] for name in ("actions", "impressions", "served")}
    write_summary(tmp_path / "shop.served", {"parts": parts})
    found = {str(path.relative_to(tmp_path)) for path in unnamed_parts(tmp_path)}
    named = {f"shop.served/{part}" for (part,) in parts.values()}
    everything = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*.parquet")}
    assert found == everything - named
    assert len(found) == 9

"""`freshrank inspect`: reads any state as a person, with times, ages and the names of the domain file."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, Json, parse_id, position_text, settings_for
from deploy.wording import as_json, bytes_text, event_fields, iso, now_ms, time_text

FromStore = Annotated[bool, typer.Option("--store", help="From RocksDB instead of the view; no worker may hold it.")]
Folder = Annotated[Path | None, typer.Option(help="Another view or state folder than the home's, such as a standby's.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    inspect = typer.Typer(
        help="Read state as a person: a user, a partition, a snapshot.\n\nExample: `freshrank inspect user 42`", no_args_is_help=True
    )
    inspect.command("user")(inspect_user)
    inspect.command("partition")(inspect_partition)
    inspect.command("snapshot")(inspect_snapshot)
    app.add_typer(inspect, name="inspect")


def inspect_user(
    user: Annotated[str, typer.Argument(help="User id: a number, or text that is hashed.")],
    sequence: Annotated[str | None, typer.Option(help="Only this [sequence.NAME]; all where absent.")] = None,
    newest: Annotated[int, typer.Option(min=0, help="How many of the newest events are shown.")] = 100,
    store: FromStore = False,
    folder: Folder = None,
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Show a user's rows: header, watermark, and each event with its age and names, newest first. The worker may run or not.

    Example: `freshrank inspect user 42 --newest 10`
    """
    from features.domain import load_domain
    from streams.inspection import find_user, partitions_below

    settings = settings_for(home, domain)
    product = load_domain(settings.domain)
    if sequence is not None and sequence not in product.sequence:
        raise typer.BadParameter(f"allowed: {', '.join(product.sequence)}", param_hint="--sequence")
    names = [sequence] if sequence else list(product.sequence)
    ids = [product.sequence[name].id for name in names]
    where, path = _where(settings, store, folder)
    user_id, now = parse_id(user), now_ms()
    rows = find_user(where, path, user_id, ids)
    if not rows:
        looked = ", ".join(map(str, partitions_below(path))) or "none"
        raise typer.BadParameter(f"{user_id} has no row in {path} (partitions there: {looked})", param_hint="USER")
    if as_json_lines:
        found = {name: _row_json(product, row, now) for name, row in zip(names, rows, strict=True)}
        print(json.dumps({"user_id": user_id, "from": where, "sequences": found}, default=as_json))
        return
    console = Console()
    for name, row in zip(names, rows, strict=True):
        console.print(_header_table(product, name, row, user_id, now))
        if row.row is not None and len(row.row.events) and newest:
            table = Table(*event_fields(product, row.row.events[0], now))
            for event in row.row.events[::-1][:newest]:
                table.add_row(*event_fields(product, event, now).values())
            console.print(table)


def inspect_partition(
    number: Annotated[int | None, typer.Argument(min=0, help="Partition; all of them, without counting, where absent.")] = None,
    rows_max: Annotated[int, typer.Option(min=0, help="Most rows that are counted; they stand in the order of user ids.")] = 1_000_000,
    store: FromStore = False,
    folder: Folder = None,
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Show what a partition holds: position, clock, definitions, rows, sizes, and how long its sequences are.

    Example: `freshrank inspect partition 2 --store`
    """
    from features.domain import load_domain
    from streams.inspection import partitions_below, summarise

    settings = settings_for(home, domain)
    product = load_domain(settings.domain)
    where, path = _where(settings, store, folder)
    numbers = partitions_below(path) if number is None else [number]
    if not numbers:
        raise typer.BadParameter(f"{path} has no partition: has a worker run with this home?", param_hint="--home")
    now = now_ms()
    found = {n: summarise(where, path, n, rows_max=rows_max if number is not None else 0) for n in numbers}
    if as_json_lines:
        print(json.dumps({str(n): _partition_json(product, summary, now) for n, summary in found.items()}, default=as_json))
    elif number is None:
        Console().print(_partitions_table(product, found, path, now))
    else:
        for table in _partition_tables(product, found[number], path, now):
            Console().print(table)


def inspect_snapshot(
    partition: Annotated[int, typer.Argument(min=0, help="The partition.")],
    offset: Annotated[int | None, typer.Option(help="Offset, as `snapshot list` prints it; the newest where absent.")] = None,
    epoch: Annotated[str | None, typer.Option(help="Log epoch in hexadecimal; the newest snapshot's where absent.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the snapshots are; the setting snapshot_url where absent.")] = None,
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Show one snapshot's manifest: the moment of its state, when it was taken, its definitions, its files.

    Example: `freshrank inspect snapshot 3`
    """
    from deploy.commands_snapshots import open_snapshots
    from deploy.wording import manifest_table
    from features.domain import load_domain

    settings = settings_for(home, domain)
    snapshots = open_snapshots(settings, url)
    try:
        number = int(epoch, 16) if epoch is not None else None
    except ValueError:
        raise typer.BadParameter(f"{epoch!r} is not hexadecimal, as `snapshot list` prints it", param_hint="--epoch") from None
    found = [manifest for manifest in snapshots.manifests(number, partition) if offset in (None, manifest.applied_offset)]
    if not found:
        raise typer.BadParameter(f"partition {partition}: no such snapshot below {snapshots.where}; `freshrank snapshot list` prints them")
    manifest = max(found, key=lambda one: one.created_ms)
    if as_json_lines:
        print(manifest.encode().decode(), end="")
        return
    now = now_ms()
    table = Table(show_header=False, title=f"snapshot of partition {partition}", title_justify="left")
    for name, text in _meta_fields(load_domain(settings.domain), manifest, manifest.size, now).items():
        table.add_row("size" if name == "on disk" else name, text)
    table.add_row("taken", time_text(manifest.created_ms, now))
    Console().print(table)
    Console().print(manifest_table(manifest))


def _where(settings: Any, store: bool, folder: Path | None) -> tuple[Any, Path]:
    own = settings.home / "state" / settings.worker_instance if store else settings.home / "view"
    return "store" if store else "view", folder or own


def _header_table(product: Any, name: str, found: Any, user_id: int, now: int) -> Table:
    table = Table(show_header=False, title=f"user {user_id}, sequence {name}", title_justify="left")
    for what, text in _header(product, name, found, now).items():
        table.add_row(what, text)
    return table


def _header(product: Any, name: str, found: Any, now: int) -> dict[str, str]:
    from features.ports import Position

    meta, row = found.meta, found.row
    fields = {
        "watermark": position_text(Position(meta.log_epoch, meta.partition, meta.applied_offset)),
        "log clock": time_text(meta.log_clock_ms, now),
    }
    if row is None:
        return {**fields, "row": "none"}
    own = product.sequence_fingerprint(name)
    return {
        **fields,
        "last record": f"offset {row.offset}",
        "erased up to": time_text(row.erased_before_ms, now) if row.erased_before_ms >= 0 else "never erased",
        "definition": "the domain file's" if row.fingerprint == own else f"{row.fingerprint:016x}, NOT the domain file's {own:016x}",
        "row": f"{len(row.events)} of at most {product.sequence[name].length} events, {found.row_bytes} bytes",
    }


def _row_json(product: Any, found: Any, now: int) -> dict[str, Any]:
    events = [] if found.row is None else [event_fields(product, event, now) for event in found.row.events[::-1]]
    row = None if found.row is None else {k: getattr(found.row, k) for k in ("fingerprint", "partition", "offset", "erased_before_ms")}
    meta = {k: getattr(found.meta, k) for k in ("log_epoch", "partition", "applied_offset", "log_clock_ms")}
    return {"meta": meta, "row": row, "row_bytes": found.row_bytes, "events": events}


def _definition_text(product: Any, meta: Any) -> str:
    from streams.state import definitions, fingerprints

    return "the domain file's" if meta.fingerprints == fingerprints(definitions(product)) else "NOT the domain file's"


def _meta_fields(product: Any, meta: Any, disk_bytes: int, now: int) -> dict[str, str]:
    from features.ports import Position

    return {
        "position": position_text(Position(meta.log_epoch, meta.partition, meta.applied_offset)),
        "log clock": time_text(meta.log_clock_ms, now),
        "definitions": _definition_text(product, meta),
        "on disk": bytes_text(disk_bytes),
    }


def _partitions_table(product: Any, found: dict[int, Any], path: Path, now: int) -> Table:
    table = Table("partition", "position", "log clock", "definitions", "on disk", title=str(path), title_justify="left")
    for number, summary in found.items():
        table.add_row(str(number), *_meta_fields(product, summary.meta, summary.disk_bytes, now).values())
    return table


def _partition_tables(product: Any, summary: Any, path: Path, now: int) -> list[Table]:
    from streams.inspection import LENGTH_BOUNDS

    meta = Table(show_header=False, title=f"partition {summary.meta.partition} of {path}", title_justify="left")
    for name, text in _meta_fields(product, summary.meta, summary.disk_bytes, now).items():
        meta.add_row(name, text)
    names = {sequence.id: name for name, sequence in product.sequence.items()}
    counts = Table("sequence", "rows", "events", "bytes", "erased once", "newest offset", title="rows", title_justify="left")
    if not summary.complete:
        counts.caption = "only the first rows were counted: raise --rows-max"
    lengths = Table("events in a row", title="lengths", title_justify="left")
    columns = []
    for number, sequence in summary.sequences.items():
        name = names.get(number, f"unknown ({number})")
        events = f"{sequence.events} ({sequence.events / max(sequence.rows, 1):.1f} a row)"
        counts.add_row(name, str(sequence.rows), events, bytes_text(sequence.row_bytes), str(sequence.erased), str(sequence.newest_offset))
        lengths.add_column(name, justify="right")
        columns.append(sequence.lengths.tolist())
    for i, cells in enumerate(zip(*columns, strict=True)):
        low = LENGTH_BOUNDS[i - 1] + 1 if i else 0
        high = LENGTH_BOUNDS[i] if i < len(LENGTH_BOUNDS) else None
        if any(cells):
            lengths.add_row(f"{low}" if low == high else f"{low} to {high}" if high else f"{low} or more", *map(str, cells))
    return [meta, counts, lengths]


def _partition_json(product: Any, summary: Any, now: int) -> dict[str, Any]:
    from streams.inspection import LENGTH_BOUNDS

    meta, names = summary.meta, {sequence.id: name for name, sequence in product.sequence.items()}
    bounds = [*map(str, LENGTH_BOUNDS), "more"]
    return {
        "log_epoch": f"{meta.log_epoch:016x}",
        "applied_offset": meta.applied_offset,
        "log_clock": iso(meta.log_clock_ms),
        "log_clock_age_s": (now - meta.log_clock_ms) / 1000 if meta.log_clock_ms > 0 else None,
        "definitions_agree": _definition_text(product, meta) == "the domain file's",
        "disk_bytes": summary.disk_bytes,
        "complete": summary.complete,
        "sequences": {
            names.get(number, str(number)): {
                "rows": sequence.rows,
                "events": sequence.events,
                "row_bytes": sequence.row_bytes,
                "erased": sequence.erased,
                "newest_offset": sequence.newest_offset,
                "lengths_up_to": dict(zip(bounds, sequence.lengths.tolist(), strict=True)),
            }
            for number, sequence in summary.sequences.items()
        },
    }

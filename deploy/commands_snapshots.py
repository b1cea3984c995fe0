"""`freshrank snapshot`: what is below snapshot_url, whether it is good, and back into a folder. A worker takes and restores by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from deploy.options import Home, Json, console, settings_for

if TYPE_CHECKING:
    from deploy.settings import Settings
    from streams.snapshots import Manifest, Snapshots
    from streams.snapshots import Progress as Told

app = typer.Typer(help="List, verify, restore and expire snapshots of the state.", no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="Where the snapshots are; the setting snapshot_url where absent.")]
Epoch = Annotated[str | None, typer.Option(help="Log epoch in hexadecimal; the one of the newest snapshot where absent.")]
Partition = Annotated[int | None, typer.Option(min=0, help="Only this partition.")]


def register(cli: typer.Typer) -> None:
    """Adds the commands."""
    cli.add_typer(app, name="snapshot")


@app.command("list")
def list_command(url: Url = None, epoch: Epoch = None, partition: Partition = None, as_json: Json = False, home: Home = None) -> None:
    """List the snapshots, newest first within each partition.

    Example: `freshrank snapshot list --url s3://bucket/freshrank`
    """
    snapshots = open_snapshots(settings_for(home), url)
    found = snapshots.manifests(_epoch(epoch), partition)
    if as_json:
        print("[" + ",\n".join(manifest.encode().decode() for manifest in found) + "]")
        return
    print_snapshots(found, Console())


@app.command()
def verify(
    url: Url = None,
    epoch: Epoch = None,
    partition: Partition = None,
    remove_damaged: Annotated[
        bool, typer.Option("--remove-damaged", help="Remove damaged files, so that the owner's next snapshot uploads them again.")
    ] = False,
    home: Home = None,
) -> None:
    """Read every file of the snapshots and compare its hash. Exits with 1 where one is damaged or missing.

    Example: `freshrank snapshot verify --partition 3`
    """
    snapshots = open_snapshots(settings_for(home), url)
    found = snapshots.manifests(_epoch(epoch), partition)
    with _bar("verify") as progress:
        wrong = snapshots.verify(found, remove_damaged=remove_damaged, progress=progress)
    bad = [manifest for manifest in found if wrong.keys() & {file.hash for file in manifest.files}]
    for text in wrong.values():
        console.print(f"[red]damaged[/red]  {text}", soft_wrap=True)
    print(f"{len(found) - len(bad)} of {len(found)} snapshots are good")
    if bad:
        print_snapshots(bad, Console(), title="damaged: a restore passes these over")
    raise typer.Exit(1 if bad else 0)


@app.command()
def restore(
    partition: Annotated[int, typer.Option(min=0, help="The partition.")],
    url: Url = None,
    epoch: Epoch = None,
    offset: Annotated[int | None, typer.Option(help="Offset of the snapshot, as list prints it; the newest good one where absent.")] = None,
    into: Annotated[Path | None, typer.Option(help="Folder to restore into; the stopped worker's own where absent.")] = None,
    home: Home = None,
) -> None:
    """Restore a partition's state into a folder, every file checked. A worker that finds no state, or a damaged one, does this by itself.

    What was in the folder stays beside it as <folder>.aside-<n>. The worker goes on from there by the log.

    Example: `freshrank snapshot restore --partition 3 --offset 120000`
    """
    from features.domain import load_domain
    from streams.errors import StateError
    from streams.state import definitions, fingerprints
    from streams.store import is_held

    settings = settings_for(home)
    snapshots = open_snapshots(settings, url)
    into = into or settings.home / "state" / settings.worker_instance / str(partition)
    if is_held(into):
        raise StateError(f"{into}: a worker holds it: stop the worker, or give another folder with --into")
    number = _epoch(epoch) or _newest_epoch(snapshots, partition)
    kept = fingerprints(definitions(load_domain(settings.domain)))
    with _bar(f"partition {partition}") as progress:
        done = snapshots.restore(partition, number, into.absolute(), kept=kept, offset=offset, progress=progress)
    for reason in done.passed_over:
        console.print(f"[yellow]passed over[/yellow]  {reason}", soft_wrap=True)
    mb = done.manifest.size / 1e6
    print(
        f"{into}: at offset {done.manifest.applied_offset}, {mb:.1f} MB in {done.seconds:.1f} s ({mb / max(done.seconds, 1e-9):.0f} MB/s)"
    )


@app.command()
def expire(
    keep: Annotated[
        int | None, typer.Option(min=1, help="Snapshots of a partition that stay; the setting snapshot_keep where absent.")
    ] = None,
    older_than_days: Annotated[
        float | None, typer.Option(min=0, help="Also remove every older one, the last one included: an erasure's deadline.")
    ] = None,
    url: Url = None,
    home: Home = None,
) -> None:
    """Remove old snapshots, and the files that none names any more; what is younger than an hour stays. Workers do this by themselves.

    Example: `freshrank snapshot expire --keep 3`
    """
    from deploy.learn import now_ms

    settings = settings_for(home)
    before_ms = None if older_than_days is None else now_ms() - int(older_than_days * 86_400_000)
    done = open_snapshots(settings, url).expire(keep or settings.snapshot_keep, created_before_ms=before_ms)
    print(f"{done.manifests} snapshots and {done.objects} files removed, {done.bytes / 1e6:.1f} MB")


def open_snapshots(settings: "Settings", url: str | None = None) -> "Snapshots":
    """The snapshots that the settings name. Raises ValueError: they name none."""
    import json

    from streams.snapshots import Snapshots

    place = url or settings.snapshot_url
    if not place:
        raise ValueError("no snapshots: give --url or the setting snapshot_url, such as s3://bucket/freshrank or a folder")
    return Snapshots(place, options=json.loads(settings.snapshot_options.get_secret_value()))


def print_snapshots(manifests: "list[Manifest]", out: Console, title: str | None = None) -> None:
    """A table of snapshots, one a line."""
    from deploy.learn import now_ms

    table = Table("epoch", "partition", "offset", "age", "MB", "files", title=title)
    now = now_ms()
    for manifest in manifests:
        age = timedelta(seconds=max(0, now - manifest.created_ms) // 1000)
        figures = (str(manifest.applied_offset), str(age), f"{manifest.size / 1e6:.1f}", str(len(manifest.files)))
        table.add_row(f"{manifest.log_epoch:016x}", str(manifest.partition), *figures)
    out.print(table)


@contextmanager
def _bar(what: str) -> "Iterator[Told]":
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _epoch(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text, 16)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not hexadecimal, as list prints it", param_hint="--epoch") from None


def _newest_epoch(snapshots: "Snapshots", partition: int) -> int:
    found = snapshots.manifests(partition=partition)
    if not found:
        raise ValueError(f"partition {partition} has no snapshot below {snapshots.where}")
    return max(found, key=lambda manifest: manifest.created_ms).log_epoch

"""`freshrank bootstrap`: a state from offline history, before its log's first record."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.options import DomainFile, Home, console, quiet, settings_for
from deploy.settings import Settings

if TYPE_CHECKING:  # importing them takes longer than --help should
    from features.base import Base
    from streams.archive import KafkaLog


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(bootstrap)


def bootstrap(
    log: Annotated[str, typer.Option(help="Folder or URL: a canonical log, Parquet files of actions, or one file.")],
    allow_gap: Annotated[bool, typer.Option("--allow-gap", help="Accept that actions between history and log are missing.")] = False,
    gap_s: Annotated[float, typer.Option(min=0, help="How much later than the history's end the log may begin.")] = 600.0,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Build the state of every partition from offline history, in bulk; workers then go on with the log from its first record.

    The history may reach into the log: records in both count once. It gives the log a new epoch, which every process must know: the local
    home keeps it, other machines set FRESHRANK_LOG_BASE to the id that is printed. Run it before the first worker, with none running.

    Example: `freshrank bootstrap --log exports/actions --domain shop.toml`
    """
    from deploy.base_file import write_base_file
    from deploy.processes import kafka_config, topics
    from deploy.stack import keep_domain
    from features.domain import load_domain
    from streams.archive import KafkaLog
    from streams.bootstrap import bootstrap as build
    from streams.kafka import ensure_topics, log_identity

    quiet()
    settings = settings_for(home, domain)
    with _kafka(settings) as settings:
        kafka, names = kafka_config(settings), topics(settings)
        identity = ensure_topics(
            kafka,
            names,
            partition_count=settings.partitions,
            replication_factor=settings.replication_factor,
            retention_ms=settings.retention_ms,
        )
        columns = TextColumn("{task.description:>5}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        started_s = time.monotonic()
        with contextlib.closing(KafkaLog(kafka, names.actions)) as actions, Progress(*columns, console=console) as bar:
            tasks = {step: bar.add_task(step, total=None, start=False) for step in ("read", "fold")}

            def progress(step: str, done: int, total: int) -> None:
                bar.start_task(tasks[step])
                bar.update(tasks[step], completed=done, total=total)

            base = build(
                log,
                load_domain(settings.domain),
                settings.home / "state" / settings.worker_instance,
                identity.partition_count,
                lambda base_id: log_identity(kafka, names.actions, base_id).epoch,
                starts={partition: span.start for partition, span in actions.partitions.items()},
                check=lambda base: _check(base, log, actions, round(gap_s * 1000), allow_gap=allow_gap),
                progress=progress,
            )
        keep_domain(settings.domain, settings.home)
        write_base_file(settings.home, base, _absolute(log))
    seconds = time.monotonic() - started_s
    records = base.events + base.erasures + base.rejected
    console.print(
        f"{base.events:,} actions, {base.erasures:,} erasures, {base.rejected:,} rejected records of {len(base.files)} files became "
        f"{identity.partition_count} partitions in {seconds:.1f} s ({records / seconds:,.0f}/s)"
    )
    print(base.id)


def _check(base: "Base", log: str, actions: "KafkaLog", gap_ms: int, *, allow_gap: bool) -> None:
    """Before anything is built: the history ends before now, and the log continues it."""
    from features.base import BaseError
    from streams.bootstrap import check_continues

    now_ms = time.time_ns() // 1_000_000
    if base.clock_ms > now_ms + base.future_tolerance_ms:
        raise BaseError(f"{log}: append times reach to {base.clock_ms} ms, which is after now, {now_ms}: correct them first")
    gap = check_continues(base, actions, gap_ms)
    if gap and not allow_gap:
        raise BaseError(f"{gap}. Add the history up to there, or accept the loss with --allow-gap")
    if gap:
        console.print(f"[yellow]gap accepted[/]  {gap}")


@contextlib.contextmanager
def _kafka(settings: Settings) -> Iterator[Settings]:
    """Settings that reach Kafka: the one that they name, else the home's own, which runs as long as this does."""
    from deploy.kafka_server import KafkaServer
    from deploy.stack import endpoint
    from features.base import BaseError

    if settings.kafka_bootstrap:
        yield settings
        return
    if endpoint(settings.home, "kafka"):
        raise BaseError(f"{settings.home}: a stack runs there; stop it, bootstrap, then start it again: its processes must learn the base")
    with KafkaServer(settings.home / "kafka") as server:
        yield settings.model_copy(update={"kafka_bootstrap": server.bootstrap})


def _absolute(log: str) -> str:
    """A path that means the same from any working directory; URLs as they are."""
    return log if "://" in log else str(Path(log).absolute())

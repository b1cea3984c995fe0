"""`freshrank move`: more partitions, or another cluster."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from deploy.options import DomainFile, Home, console, quiet, settings_for


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(move)


def move(
    to_home: Annotated[Path, typer.Option(help="New home folder: the state of the new log, and the history that it stands on.")],
    to_topic: Annotated[str, typer.Option(help="Topic of actions to create; another one, or one of another cluster.")],
    to_partitions: Annotated[int | None, typer.Option(min=1, help="Its partitions; as many as now where absent.")] = None,
    to_bootstrap: Annotated[str, typer.Option(help="host:port of the other cluster; the same where absent.")] = "",
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Move the state to a new log: with more partitions, or on another cluster. Nothing is lost, and no answer changes.

    Stop what produces, let the workers reach the log's end, stop them, then run this on the machine of a worker that owned every partition
    (or that stood by). Afterwards start everything with FRESHRANK_HOME, FRESHRANK_TOPIC_ACTIONS, FRESHRANK_KAFKA_BOOTSTRAP and
    FRESHRANK_LOG_BASE as printed. The old topic and home stay as they are, for replays of older rankings and for going back.

    Example: `freshrank move --to-home .freshrank-8 --to-topic freshrank.actions.v2 --to-partitions 8`
    """
    from deploy.stack import running

    quiet()
    settings = running(settings_for(home, domain), needs="kafka")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("state")
        moved = move_state(
            settings,
            to_home,
            to_topic,
            to_partitions,
            to_bootstrap or settings.kafka_bootstrap,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(f"{moved['actions']:,} actions and {moved['erasures']:,} erasures moved to log {moved['log_epoch']:016x}")
    for name in ("home", "topic_actions", "kafka_bootstrap", "log_base"):
        print(f"FRESHRANK_{name.upper()}={moved[name]}")


def move_state(
    settings: Any, to_home: Path, to_topic: str, to_partitions: int | None, to_bootstrap: str, *, progress: Any = lambda *_: None
) -> dict[str, Any]:
    """What `freshrank move` does; returns the settings of the new log. Raises StateError, BaseError, TopicError: nothing was moved."""
    from dataclasses import replace

    from deploy.base_file import write_base_file
    from deploy.processes import MOVE_KEY, kafka_config, topics
    from deploy.stack import keep_domain
    from features.domain import load_domain
    from features.lineage import Predecessor
    from streams.bootstrap import bootstrap
    from streams.broadcast import announce
    from streams.errors import StateError
    from streams.kafka import KafkaConfig, end_offsets, ensure_topics, log_identity
    from streams.move import export_state

    if (to_home / "state").exists():
        raise StateError(f"{to_home}: holds a state already; name a new folder")
    product, kafka, names = load_domain(settings.domain), kafka_config(settings), topics(settings)
    old = log_identity(kafka, names.actions, names.base)
    to_kafka = KafkaConfig(to_bootstrap, settings.kafka_properties)
    to_names = replace(names, actions=to_topic, base="")
    partition_count = to_partitions or old.partition_count
    ends = end_offsets(kafka, names.actions, range(old.partition_count))
    history = to_home / "history"
    last = export_state(settings.home / "state" / settings.worker_instance, product, old, ends, history, progress=progress)
    new = ensure_topics(
        to_kafka,
        to_names,
        partition_count=partition_count,
        replication_factor=settings.replication_factor,
        retention_ms=settings.retention_ms,
    )
    if new.epoch == old.epoch or any(end_offsets(to_kafka, to_topic, range(new.partition_count)).values()):
        raise StateError(f"topic {to_topic}: has records already; name a new one")
    if new.partition_count != partition_count:
        raise StateError(f"topic {to_topic}: has {new.partition_count} partitions, not {partition_count}; name a new one")
    base = bootstrap(
        str(history),
        product,
        to_home / "state" / settings.worker_instance,
        new.partition_count,
        lambda base_id: log_identity(to_kafka, to_topic, base_id).epoch,
    )
    epoch = log_identity(to_kafka, to_topic, base.id).epoch
    keep_domain(settings.domain, to_home)
    write_base_file(to_home, base, str(history.absolute()))
    announce(to_kafka, to_names.announcements, f"{MOVE_KEY}{old.epoch:016x}", Predecessor(old.epoch, epoch, last).encode())
    with contextlib.suppress(FileNotFoundError):
        (to_home / "releases").symlink_to((settings.home / "releases").resolve(strict=True))
        (to_home / "tables").symlink_to((settings.home / "tables").resolve(strict=True))
    return {
        "home": to_home,
        "topic_actions": to_topic,
        "kafka_bootstrap": to_bootstrap,
        "log_base": base.id,
        "log_epoch": epoch,
        "actions": base.events,
        "erasures": base.erasures,
    }

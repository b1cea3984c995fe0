"""What the commands share: their common options, and how a person writes ids, positions and kinds."""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from deploy.base_file import read_base_file
from deploy.settings import Settings, load_settings

console = Console(stderr=True)

Home = Annotated[Path | None, typer.Option(help="Folder of state, releases and tables.", show_default="./.freshrank")]
DomainFile = Annotated[Path | None, typer.Option("--domain", help="Domain file; the home folder's own copy where absent.")]
RankerName = Annotated[str | None, typer.Option("--ranker", help="A [ranker.NAME] of the domain file; the first one where absent.")]
ServedOn = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where the models ran: a GPU's scores may be further apart. auto: as model_device says, or as this machine has it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def settings_for(home: Path | None, domain: Path | None = None) -> Settings:
    """Settings from file and environment, with what the command line says on top."""
    settings = load_settings(home=home, domain=domain)
    kept = settings.home / "domain.toml"
    if "domain" not in settings.model_fields_set and kept.exists():
        settings = settings.model_copy(update={"domain": kept})
    if "log_base" not in settings.model_fields_set and (found := read_base_file(settings.home)) is not None:
        settings = settings.model_copy(update={"log_base": found[0].id})
    return settings


def workspace(settings: Settings, *, served: bool = False) -> Any:
    """The folders of a domain's data; `served`: with the log of what was served."""
    from deploy.learn import Workspace

    return Workspace(settings.domain, settings.home, served=served)


def quiet() -> None:
    """Keeps librdkafka's warnings about brokers that are still starting off the terminal; errors stay."""
    logging.getLogger("streams.kafka").setLevel(logging.ERROR)


def parse_id(text: str) -> int:
    """An id as a person types it: digits are the number itself, anything else is hashed as importers do."""
    from features.ids import ID_MAX, string_id

    text = text.strip()
    if not text:
        raise typer.BadParameter("an id is empty; give numbers or texts, lists separated by single commas")
    if text.isdecimal() and int(text) <= ID_MAX:
        return int(text)
    return string_id(text)


def position_text(position: Any) -> str:
    """A position as commands print and take it: epoch in hexadecimal, partition, offset."""
    return f"{position.log_epoch:016x}:{position.partition}:{position.offset}"


def parse_position(text: str) -> Any:
    """What `position_text` printed; "partition:offset" means the current epoch."""
    from features.ports import Position

    try:
        epoch, partition, offset = ("0", *text.split(":"))[-3:]
        return Position(int(epoch, 16), int(partition), int(offset))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not EPOCH:PARTITION:OFFSET, as produce prints it", param_hint="--after") from None


def entity_kind(entities: dict[str, int], kind: str | None) -> int:
    """Number of an entity kind that a person named; the only one where they named none."""
    if kind is None and len(entities) == 1:
        return next(iter(entities.values()))
    if kind not in entities:
        raise typer.BadParameter(f"allowed: {', '.join(entities)}", param_hint="--kind")
    return entities[kind]

"""`freshrank domain`: a first domain file, drafted from a published log."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Column = Annotated[str | None, typer.Option(help="Column, where the guess would be wrong.")]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("domain")(domain_command)


def domain_command(
    source: Annotated[Path, typer.Option("--from", help="A log: a CSV file with a header line (plain or gzipped), or a Parquet file.")],
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.toml here where absent.")] = None,
    user: Column = None,
    item: Column = None,
    time: Column = None,
    items: Annotated[Path | None, typer.Option(help="File with a row for each item, in the log's folder.")] = None,
    users: Annotated[Path | None, typer.Option(help="File with a row for each user, in the log's folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Draft a domain file from a log: which columns are what, which actions there are, which features; says what it guessed and why.

    Example: `freshrank domain --from clicks.csv.gz --out clicks.toml`
    """
    from features.domain import parse_domain
    from streams.draft import draft_domain
    from streams.importer import print_table

    text, draft = draft_domain(source, user=user, item=item, time=time, items=items, users=users)
    name = parse_domain(text, source=str(source)).name
    out = Path(f"{name}.toml") if out is None else out
    if out.exists() and not force:
        raise FileExistsError(f"{out}: is there; --out names another file, --force replaces it")
    out.write_text(text, "utf-8")
    print_table(Console(), f"guessed from {source.name}", ("what", "guess", "why"), draft.reasons)
    if draft.left_out:
        print_table(Console(), "not taken", ("column", "why"), draft.left_out)
    print(f"{out}: read it and mend it, then: freshrank check {out} {source.parent}")

"""`base.json`: which base a home's state stands on, and where its history is."""

from pathlib import Path

from features.base import Base

NAME = "base.json"


def read_base_file(folder: Path) -> tuple[Base, str] | None:
    """(base, source of its history); None where the folder has no base. Raises BaseError: the file is damaged."""
    path = folder / NAME
    return Base.from_json(path.read_text("utf-8"), str(path)) if path.exists() else None


def write_base_file(folder: Path, base: Base, source: str) -> None:
    """Writes it whole or not at all."""
    temporary = folder / f".{NAME}"
    temporary.write_text(base.to_json(source), "utf-8")
    temporary.replace(folder / NAME)

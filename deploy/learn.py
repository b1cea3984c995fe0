"""From a published log to a release: import, embeddings, training, publishing. What `freshrank import|train|publish` and the demo run.

Folders below home: logs/<domain>/ (canonical log), tables/ (spaces), training/<ranker>/ (weights, curves, checkpoints), releases/.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from features.domain import Domain, load_domain
from inference.dataset import split_times
from inference.embeddings import publish_embeddings
from inference.evaluate import evaluate
from inference.release import Release, write_release
from inference.train import TrainOptions, TrainResult, load_trained, train
from streams.importer import import_log


@dataclass(frozen=True)
class Workspace:
    """A domain file and the folders that its data is kept in."""

    domain_path: Path
    home: Path

    @property
    def domain(self) -> Domain:
        """The validated domain file."""
        return load_domain(self.domain_path)

    @property
    def log(self) -> Path:
        """The canonical log."""
        return self.home / "logs" / self.domain.name

    @property
    def tables(self) -> Path:
        """Embedding and feature spaces."""
        return self.home / "tables"

    @property
    def releases(self) -> Path:
        """Releases."""
        return self.home / "releases"

    def training(self, ranker: str) -> Path:
        """Where a ranker's training writes to."""
        return self.home / "training" / ranker


def import_data(work: Workspace, data: Path, console: Console | None = None) -> dict[str, Any]:
    """Imports a published log; returns the summary. Raises PublishedError, DomainError."""
    return import_log(work.domain, data, work.log, created_ms=now_ms(), tables_root=work.tables, console=console)


def train_ranker(work: Workspace, ranker: str, options: TrainOptions, *, resume: bool = False) -> TrainResult:
    """Embeddings of the training part, then the ranker. Raises TrainError, DatasetError, EmbeddingError, LogError."""
    domain = work.domain
    validation_ms, _ = split_times(domain, work.log, options.fractions)
    publish_embeddings(domain, ranker, work.log, work.tables, until_ms=validation_ms, seed=options.seed)
    return train(domain, ranker, work.log, work.tables, work.training(ranker), options, resume=resume)


def train_without_sequence(work: Workspace, ranker: str, options: TrainOptions) -> TrainResult:
    """The same model without the realtime sequence, beside the one with it."""
    out = work.training(f"{ranker}-without-sequence")
    return train(work.domain, ranker, work.log, work.tables, out, replace(options, use_sequence=False))


def evaluate_ranker(work: Workspace, ranker: str, options: TrainOptions) -> dict[str, Any]:
    """Trains the ranker with and without its realtime sequence; what both reach on the temporal test part (`inference.evaluate`)."""
    train_ranker(work, ranker, options)
    out = work.home / "evaluation" / ranker
    return evaluate(work.domain, ranker, work.log, work.tables, work.training(ranker), out, options=options)


def release(work: Workspace, ranker: str) -> Release:
    """Writes the trained ranker as a release. Raises TrainError, ReleaseError."""
    model, metrics = load_trained(work.domain, ranker, work.training(ranker))
    return write_release(
        work.releases,
        model=model,
        domain_toml=work.domain_path.read_text("utf-8"),
        ranker=ranker,
        created_ms=now_ms(),
        generations=metrics["generations"],
        metrics=metrics["test"],
    )


def now_ms() -> int:
    """This machine's clock, milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000

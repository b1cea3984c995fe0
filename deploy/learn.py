"""From a published log to a release: import, embeddings, training, publishing. What `freshrank import|train|publish` and the demo run.

Folders below home: logs/<domain>/ (canonical log), tables/ (spaces), training/<ranker>/ (weights, curves, checkpoints), releases/,
evaluation/<ranker>/ (what `evaluate` trains and shows, never released).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from features.domain import Domain, load_domain
from features.erasures import LEDGER, erased_users, read_ledger
from inference.dataset import split_times
from inference.embeddings import newest_generations, publish_embeddings
from inference.evaluate import evaluate
from inference.popularity import publish_popularity
from inference.refreshed import publish_refreshed
from inference.release import Release, write_release
from inference.small import SMALL_FILE
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
    def erased(self) -> dict[int, int]:
        """Users erased up to now, by the home folder's ledger: nothing that is built here knows their past."""
        return erased_users(read_ledger(self.home / LEDGER))

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
    return import_log(work.domain, data, work.log, tables_root=work.tables, console=console)


def train_ranker(work: Workspace, ranker: str, options: TrainOptions, *, resume: bool = False, out: Path | None = None) -> TrainResult:
    """Embeddings of the training part, then the ranker with exactly these, into `out` (None: where `release` finds it).

    Raises:
        TrainError, DatasetError, EmbeddingError, LogError: see there.
    """
    domain = work.domain
    validation_ms, _ = split_times(domain, ranker, work.log, options.fractions)
    if domain.ranker[ranker].refresh is None:
        folders = publish_embeddings(domain, ranker, work.log, work.tables, until_ms=validation_ms, seed=options.seed, erased=work.erased)
    else:
        folders = publish_refreshed(domain, ranker, work.log, work.tables, seed=options.seed, erased=work.erased)
    publish_popularity(domain, work.log, work.tables, until_ms=validation_ms, erased=work.erased)
    out = work.training(ranker) if out is None else out
    generations = newest_generations(folders)
    return train(domain, ranker, work.log, work.tables, out, options, resume=resume, generations=generations, erased=work.erased)


def train_without_sequence(work: Workspace, ranker: str, options: TrainOptions) -> TrainResult:
    """The same model without the realtime sequence, with the embeddings of the one with it. Raises TrainError: that is not trained yet."""
    _, about = load_trained(work.domain, ranker, work.training(ranker))
    out = work.training(f"{ranker}-without-sequence")
    options = replace(options, use_sequence=False)
    return train(work.domain, ranker, work.log, work.tables, out, options, generations=about["generations"], erased=work.erased)


def evaluate_ranker(work: Workspace, ranker: str, options: TrainOptions) -> dict[str, Any]:
    """Trains the ranker with and without its realtime sequence; what both reach on the temporal test part (`inference.evaluate`)."""
    out = work.home / "evaluation" / ranker
    trained = train_ranker(work, ranker, options, out=out / "with_sequence")
    return evaluate(work.domain, ranker, work.log, work.tables, trained.folder, out, options=options, erased=work.erased)


def release(work: Workspace, ranker: str) -> Release:
    """Writes the trained ranker as a release. Raises TrainError, ReleaseError."""
    model, metrics = load_trained(work.domain, ranker, work.training(ranker))
    small = work.training(ranker) / SMALL_FILE
    return write_release(
        work.releases,
        model=model,
        domain_toml=work.domain_path.read_text("utf-8"),
        ranker=ranker,
        created_ms=now_ms(),
        generations=metrics["generations"],
        metrics=metrics["test"],
        small=small.read_bytes() if small.is_file() else None,
    )


def now_ms() -> int:
    """This machine's clock, milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000

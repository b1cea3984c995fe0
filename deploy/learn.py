"""From a published log to a release: import, embeddings, training, publishing. What `freshrank import|train|publish` and the demo run.

Folders below home: logs/<domain>/ (canonical log), logs/<domain>.served/ (what was served, made by `freshrank label`), tables/ (spaces),
training/<ranker>/ (weights, curves, checkpoints), releases/, evaluation/<ranker>/ and ablation/<ranker>/ (what `evaluate` and `ablate`
train and show, never released).
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from deploy.labelling import served_folder
from features.domain import DAY_MS, Domain, load_domain
from features.erasures import LEDGER, erased_users, read_ledger
from features.logs import LoggedActions, read_requests
from features.tables import lineage_of
from features.tensors import tensor_fingerprint
from inference.ablate import Results, ablate
from inference.ablations import CELLS, AblationTable, Cell
from inference.checkpoints import TrainError
from inference.dataset import split_times
from inference.decay import decay, half_time_ms, validation_from
from inference.embeddings import newest_generations, publish_embeddings
from inference.evaluate import evaluate
from inference.gate import Contender, Limits, Verdict, judge
from inference.parallel import joined
from inference.popularity import publish_popularity
from inference.refreshed import publish_present, publish_refreshed
from inference.release import Release, load_model, write_release
from inference.served import fitting_generations
from inference.small import SMALL_FILE
from inference.train import TIME_MS_MAX, TrainOptions, TrainResult, load_trained, train
from streams.archive import DecodingRules, KafkaLog, decode_records
from streams.importer import import_log
from streams.log_buckets import logged_actions


@dataclass(frozen=True)
class Workspace:
    """A domain file and the folders that its data is kept in. served: works on what was served, not on what was imported."""

    domain_path: Path
    home: Path
    served: bool = False

    @property
    def domain(self) -> Domain:
        """The validated domain file."""
        return load_domain(self.domain_path)

    @property
    def log(self) -> Path:
        """The canonical log: the imported one, or the one that `freshrank label` makes."""
        return served_folder(self.home, self.domain) if self.served else self.home / "logs" / self.domain.name

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

    @contextmanager
    def alone_with(self, ranker: str, who: str) -> Iterator[None]:
        """Held by the command `who` while it writes a ranker's training, and from judging it to its release: what was judged is released.

        Raises:
            TrainError: another process holds it, and which.
        """
        folder = self.training(ranker)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{ranker}.lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise TrainError(f"{folder} is in use by {lock.read() or 'another process'}: wait for its end, or stop it") from None
            lock.truncate(0)
            lock.write(f"`{who}` (process {os.getpid()})")
            lock.flush()
            yield


def import_data(work: Workspace, data: Path, console: Console | None = None) -> dict[str, Any]:
    """Imports a published log; returns the summary. Raises PublishedError, DomainError."""
    return import_log(work.domain, data, work.log, tables_root=work.tables, console=console)


def make_tables(work: Workspace, ranker: str, *, until_ms: int, seed: int) -> dict[str, str]:
    """Vectors to train a ranker with: generation by space, the newest of each.

    They are one training's on what was before `until_ms`. Of a ranker with `refresh` they are made for the whole log, and each request has
    those of its own hour, which know no more than was before it.

    Raises:
        EmbeddingError, LogError: see `publish_embeddings` and `publish_refreshed`.
    """
    if work.domain.ranker[ranker].refresh is not None:
        return newest_generations(publish_refreshed(work.domain, ranker, work.log, work.tables, seed=seed, erased=work.erased))
    return newest_generations(
        publish_embeddings(work.domain, ranker, work.log, work.tables, until_ms=until_ms, seed=seed, erased=work.erased)
    )


def refresh_tables(work: Workspace, release: Release, log: KafkaLog, now_ms: int) -> dict[str, str]:
    """The vectors of the present hour for what `release` is served with, from a running stack's log of actions; the newest generation of
    each space of its ranker (`inference.refreshed.publish_present`). Raises EmbeddingError, TableError, KafkaUnavailableError.
    """
    domain = work.domain

    def actions(since_ms: int) -> Iterator[LoggedActions]:
        log.begin_at(since_ms)
        rules = DecodingRules.of(domain)
        for partition in sorted(log.partitions):
            yield from (logged_actions(decode_records(log, partition, records, rules)) for records in log.read(partition))

    return publish_present(domain, release.ranker, release, actions, work.tables, now_ms, erased=work.erased)


def train_ranker(
    work: Workspace, ranker: str, options: TrainOptions, *, resume: bool = False, out: Path | None = None, since_ms: int = 0
) -> TrainResult:
    """Embeddings of the training part, then the ranker with exactly these, into `out` (None: where `release` finds it). Under `torchrun`
    the first process makes the tables, and all of them train.

    since_ms: validation and test are of the requests from then on, and everything before them trains: a model that competes with one that
    knows the requests before is as fresh.

    Raises:
        TrainError, DatasetError, EmbeddingError, LogError: see there.
    """
    domain, erased = work.domain, work.erased

    validation_ms, test_ms = split_times(domain, ranker, work.log, options.fractions, since_ms=since_ms)

    def tables() -> dict[str, str]:
        publish_popularity(domain, work.log, work.tables, until_ms=validation_ms, erased=erased)
        return make_tables(work, ranker, until_ms=validation_ms, seed=options.seed)

    out = work.training(ranker) if out is None else out
    with joined() as ranks:
        generations = ranks.from_first(tables)
        parts = (0, validation_ms, test_ms, TIME_MS_MAX)
        given: dict[str, Any] = {"resume": resume, "generations": generations, "erased": erased, "parts": parts}
        return train(domain, ranker, work.log, work.tables, out, options, **given)


def continue_ranker(
    work: Workspace, ranker: str, start: Release, options: TrainOptions, *, days: int = 14, resume: bool = False
) -> TrainResult:
    """Trains a release's weights on with what has come since: the newest requests are validation and test; the rest, and those of `days`
    days before, so that little is forgotten, are the training part. Items, users and normalisation stay as the release has them; of a
    ranker with `refresh` the vectors of the hours since are made, as a server would take them; of what was served those that it was served
    with are there (`refresh_tables`).

    Raises:
        TrainError: the release does not say what it was trained on, or is of another model than the domain file's.
        DatasetError, LogError, ReleaseError: see there.
    """
    domain = work.domain
    before_ms = start.manifest.get("trained", {}).get("before_ms")
    if before_ms is None:
        raise TrainError(f"{start.release_id} does not say which requests it was trained on; train anew")
    if start.manifest["tensor_fingerprint"] != (now := tensor_fingerprint(domain, ranker)):
        raise TrainError(f"{start.release_id}: tensors {start.manifest['tensor_fingerprint']}; the domain file gives {now}: train anew")
    validation_ms, test_ms = split_times(domain, ranker, work.log, options.fractions, since_ms=before_ms)

    def tables() -> dict[str, str]:
        if domain.ranker[ranker].refresh is not None and not work.served:
            made = make_tables(work, ranker, until_ms=validation_ms, seed=options.seed)
            lineages = ((lineage_of(work.tables, space, name), space) for space, name in made.items())
            if any(lineage != lineage_of(work.tables, space, start.generations[space]) for lineage, space in lineages):
                raise TrainError(
                    f"{start.release_id}: the vectors of the hours since are not comparable with its own (another seed, or an "
                    "erasure in the first hour): train anew"
                )
        return _served_generations(work, start)

    with joined() as ranks:
        return train(
            domain,
            ranker,
            work.log,
            work.tables,
            work.training(ranker),
            replace(options, use_sequence=start.manifest["model"]["use_sequence"]),
            resume=resume,
            generations=ranks.from_first(tables),
            erased=work.erased,
            start=load_model(start).state_dict(),
            parts=(max(0, before_ms - days * DAY_MS), validation_ms, test_ms, TIME_MS_MAX),
        )


def _served_generations(work: Workspace, release: Release) -> dict[str, str]:
    """The generations that a release is to be used with: its own, and of a ranker with `refresh` the newest ones comparable with these."""
    if release.domain.ranker[release.ranker].refresh is None:
        return dict(release.generations)
    return {**release.generations, **fitting_generations(release, work.tables, {})}


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


def ablate_ranker(
    work: Workspace,
    ranker: str,
    out: Path,
    tables: Mapping[str, AblationTable],
    *,
    seeds: int,
    options: TrainOptions,
    cells: Mapping[str, Cell] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Results:
    """Runs tables of configurations over embeddings of the training part (`inference.ablate`). Raises what `train_ranker` raises."""
    domain = work.domain
    validation_ms, _ = split_times(domain, ranker, work.log, options.fractions)
    return ablate(
        domain,
        ranker,
        work.log,
        work.tables,
        out,
        tables,
        cells=CELLS if cells is None else cells,
        seeds=seeds,
        options=options,
        generations=make_tables(work, ranker, until_ms=validation_ms, seed=options.seed),
        erased=work.erased,
        report=report,
    )


def decay_of(work: Workspace, ranker: str, options: TrainOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """How the ranker ages on the second half of the log's days, with embeddings of the first half (`inference.decay`)."""
    domain, erased = work.domain, work.erased
    times = np.concatenate([np.zeros(0, np.int64), *(batch.request_time_ms for batch in read_requests(work.log, domain))])
    until_ms = half_time_ms(times)
    validation_ms = validation_from(times[times < until_ms])
    generations = make_tables(work, ranker, until_ms=validation_ms, seed=options.seed)
    out = work.home / "evaluation" / ranker / "decay"
    return decay(
        domain, ranker, work.log, work.tables, out, options, generations=generations, until_ms=until_ms, erased=erased, report=report
    )


def judge_trained(work: Workspace, ranker: str, incumbent: Release | None, limits: Limits | None = None) -> Verdict:
    """Whether the trained ranker is worse than `incumbent` (None: nothing is served) on requests that neither was trained on.

    Raises TrainError, ReleaseError, DatasetError.
    """
    model, about = load_trained(work.domain, ranker, work.training(ranker))
    candidate = Contender("candidate", model, work.domain, about["generations"], about["parts"]["test"]["from_ms"])
    served = None if incumbent is None else replace(Contender.of(incumbent), generations=_served_generations(work, incumbent))
    work = replace(work, served=about.get("served", False))  # the log that it was trained on
    return judge(ranker, candidate, served, work.log, work.tables, limits=limits, erased=work.erased)


def release(work: Workspace, ranker: str, gate: Mapping[str, Any] | None = None, *, only: bool = False) -> Release:
    """Writes the trained ranker as a release. gate: what the manifest says of the verdict; only: for experiments. Raises TrainError,
    ReleaseError.
    """
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
        trained={"before_ms": metrics["parts"]["test"]["from_ms"], **({} if gate is None else {"gate": gate})},
        only=only,
        small=small.read_bytes() if small.is_file() else None,
    )


def now_ms() -> int:
    """This machine's clock, milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000

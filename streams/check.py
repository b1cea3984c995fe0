"""What `freshrank check DOMAIN DATA` says of a published log: does the domain file fit it, and is it fit to learn from?

The log is imported to a temporary folder (in bounded memory, as any import) and the result is looked at, which takes 16 bytes of memory
for each action more.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from features.domain import Domain, Feature
from features.ids import string_ids
from features.logs import LoggedActions, LoggedRequests, logged_features, read_actions, read_requests
from features.tables import Generation, item_member, open_generation
from streams.importer import import_log, print_table
from streams.published import EXAMPLES_MAX, Findings

PERCENTILES = (50, 90, 99, 100)
OUTLIER_DAYS = 365
_DAY_MS = 86_400_000

U64 = npt.NDArray[np.uint64]
Counts = tuple[U64, npt.NDArray[np.int64]]


@dataclass
class Report:
    """What was found. `problems`: reason to count, share of the rows that it is about and examples; empty where there is nothing to say.

    actions: how many of each; labels: share of impressions with it, by action and by ranker.head; distributions: percentiles by name.
    """

    domain: str
    summary: dict[str, Any]
    problems: dict[str, dict[str, Any]] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    labels: dict[str, float] = field(default_factory=dict)
    distributions: dict[str, dict[str, float]] = field(default_factory=dict)
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    first_time: str = ""
    last_time: str = ""

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """The report as text."""
        rows, rejected = self.summary["rows"], sum(entry["rows"] for entry in self.summary["rejected"].values())
        share = rejected / max(rows, 1)
        line = f"{self.domain}: {rows:,} rows, {rejected:,} rejected ({share:.2%}), {self.first_time} to {self.last_time}"
        console.print(line, markup=False, soft_wrap=True)
        console.print(", ".join(f"{self.summary[name]:,} {name}" for name in ("actions", "impressions", "requests")))
        for title, head, values in (
            ("actions", ("action", "events"), [(name, f"{count:,}") for name, count in self.actions.items()]),
            ("labels", ("label", "share of impressions"), [(name, f"{share:.3%}") for name, share in self.labels.items()]),
            ("features", ("feature", "missing", "outside vocabulary"), [_shares(name, shares) for name, shares in self.features.items()]),
        ):
            if values:
                print_table(console, title, head, values)
        figures = [(name, *(f"{value:g}" for value in values.values())) for name, values in self.distributions.items()]
        print_table(console, "per user and request", ("", "mean", *(f"p{percentile}" for percentile in PERCENTILES)), figures)
        problems = [(name, f"{entry['rows']:,}", "\n".join(entry["examples"])) for name, entry in self.problems.items()]
        if problems:
            print_table(console, "to look at", ("what", "rows", "examples"), problems)
        else:
            console.print("nothing to look at")
        for note in self.summary["notes"]:
            console.print(f"note: {note}", markup=False, soft_wrap=True)


def check(domain: Domain, data: str | Path, *, console: Console | None = None) -> Report:
    """Imports the log from the folder `data` into a temporary folder and reports on it. A console gets progress.

    Raises:
        PublishedError: files or columns that are not there, or no row that can be read.
    """
    with tempfile.TemporaryDirectory(prefix="freshrank-check-") as folder:
        summary = import_log(domain, data, folder, console=console)
        report = Report(domain.name, summary)
        has_tables = bool(summary["tables"])
        tables = open_generation(Path(folder) / "tables", summary["tables"]["space"]) if has_tables else None
        found = Findings()
        _look_at_actions(report, domain, read_actions(folder, domain), tables, found)
        _look_at_requests(report, domain, read_requests(folder, domain), tables, found)
        if tables is not None:
            _look_at_tables(report, domain, tables)
        _look_at_domain(report, domain, found)
    for kind in ("rejected", "noted"):
        report.problems |= {f"{kind}: {reason}": entry for reason, entry in summary[kind].items()}
    report.problems |= found.as_json()
    for entry in report.problems.values():
        entry["share"] = entry["rows"] / max(summary["rows"], 1)
    return report


def _look_at_actions(report: Report, domain: Domain, batches: Iterable[LoggedActions], tables: Generation | None, found: Findings) -> None:
    names = {number: f"actions.{name}" for number, name in domain.action_names().items()}
    counts = np.zeros(256, np.int64)
    users: dict[int, list[Counts]] = {number: [] for number in names}
    times: list[npt.NDArray[np.int64]] = []
    unseen_items, unseen_users = _Unseen(domain, tables, found, "item"), _Unseen(domain, tables, found, "user")
    lags: list[npt.NDArray[np.int64]] = []
    for batch in batches:
        events = batch.events
        counts += np.bincount(events["action"], minlength=256)
        for number, part in users.items():
            part.append(np.unique(batch.users[events["action"] == number], return_counts=True))
        times.append(events["event_time_ms"])
        lags.append(batch.append_time_ms - events["event_time_ms"])
        unseen_items.look(events["entity_kind"], events["entity_id"])
        unseen_users.look(None, batch.users)
    report.actions = {name.removeprefix("actions."): int(counts[number]) for number, name in sorted(names.items())}
    for number, name in sorted(names.items()):
        if not counts[number]:
            found.add(f"{name}: no row is this action; is its rule in [[log.actions]] right?", 1, [name])
    time_ms = np.concatenate(times)
    report.first_time, report.last_time = _iso(time_ms.min()), _iso(time_ms.max())
    far = np.abs(time_ms - np.median(time_ms)) > OUTLIER_DAYS * _DAY_MS
    if far.mean() < 0.01:
        found.add(
            f"time: more than {OUTLIER_DAYS} days from the middle of the log", int(far.sum()), (_iso(value) for value in time_ms[far])
        )
    by_action = {number: _total(part) for number, part in users.items()}
    report.distributions["actions of a user"] = _percentiles(_total(list(by_action.values()))[1])
    for name, sequence in domain.sequence.items():
        caps = {domain.actions[action].id: cap for action, cap in sequence.caps.items()}
        kept = [(ids, np.minimum(count, caps.get(number, sequence.length))) for number, (ids, count) in by_action.items()]
        report.distributions[f"length of sequence.{name}"] = _percentiles(np.minimum(_total(kept)[1], sequence.length))
    if any(lag.any() for lag in lags):
        report.distributions["append time behind event time, ms"] = _percentiles(np.concatenate(lags))


def _look_at_requests(
    report: Report, domain: Domain, batches: Iterable[LoggedRequests], tables: Generation | None, found: Findings
) -> None:
    rows = 0
    labelled = np.zeros(256, np.int64)
    heads = {f"{ranker}.{head}": part.actions for ranker, settings in domain.ranker.items() for head, part in settings.heads.items()}
    head_rows = dict.fromkeys(heads, 0)
    users: list[Counts] = []
    sizes: list[npt.NDArray[np.int64]] = []
    unseen = _Unseen(domain, tables, found, "candidate")
    shares = {name: _Shares(domain.features[name]) for name in logged_features(domain)}
    for batch in batches:
        rows += len(batch.entity_id)
        labelled += np.bincount(batch.labels, minlength=256)
        for head, actions in heads.items():
            head_rows[head] += int(np.logical_or.reduce([batch.label(domain.actions[action].id) for action in actions]).sum())
        users.append(np.unique(batch.user_id, return_counts=True))
        sizes.append(np.diff(batch.starts))
        unseen.look(batch.entity_kind, batch.entity_id)
        for name, share in shares.items():
            share.look(batch.features[name].values, batch.features[name].lengths)
    if not rows:
        return
    report.labels = {name: labelled[action.id] / rows for name, action in domain.actions.items() if action.kind != "impression"}
    report.labels |= {f"{head} (head)": count / rows for head, count in head_rows.items()}
    for head, count in head_rows.items():
        if count in (0, rows):
            found.add(f"ranker {head}: {'no' if not count else 'every'} impression has the label; there is nothing to learn", 1, [head])
    report.distributions["requests of a user"] = _percentiles(_total(users)[1])
    report.distributions["candidates of a request"] = _percentiles(np.concatenate(sizes))
    report.features |= {name: share.result() for name, share in shares.items()}


def _look_at_tables(report: Report, domain: Domain, tables: Generation) -> None:
    for member in tables.members:
        for name, feature in domain.features.items():
            column = tables.column(member, name)
            if column is not None:
                share = _Shares(feature)
                values = np.asarray(column[1:])
                lists = feature.kind in ("list", "weighted_list")
                share.look(values, (values != 0).sum(1).astype(np.int32) if lists else None)
                report.features[f"{member}.{name}"] = share.result()


def _look_at_domain(report: Report, domain: Domain, found: Findings) -> None:
    log = domain.log
    assert log is not None
    for ranker, settings in domain.ranker.items():
        for name in settings.features:
            side = domain.features[name].side
            if (side == "user" and log.users is None) or (side == "item" and not log.items):
                part = "log.users" if side == "user" else "log.items"
                found.add(f"features.{name}: ranker {ranker} uses it, but {part} names no file that gives it", 1, [f"{part} is absent"])
    report.features = dict(sorted(report.features.items()))


class _Unseen:
    """Counts rows whose item or user has no row in the feature tables; remembers the first ids."""

    def __init__(self, domain: Domain, tables: Generation | None, found: Findings, what: str) -> None:
        self._tables, self._found, self._what = tables, found, what
        self._members = {"user": "user"} if what == "user" else {number: item_member(name) for name, number in domain.entities.items()}

    def look(self, kinds: npt.NDArray[np.uint8] | None, ids: U64) -> None:
        for kind, member in self._members.items():
            if self._tables is None or member not in self._tables.members:
                continue
            chosen = ids if kinds is None else ids[kinds == kind]
            missing = chosen[self._tables.rows(member, chosen) == 0]
            examples = list(dict.fromkeys(int(number) for number in missing[: 100 * EXAMPLES_MAX]))
            self._found.add(f"unseen: {self._what} without a row in the files of {member}", len(missing), map(str, examples))


class _Shares:
    """Shares of missing values and of values outside of the vocabulary."""

    def __init__(self, feature: Feature) -> None:
        self._kind = feature.kind
        self._vocabulary = None if feature.vocabulary is None else np.sort(string_ids(feature.vocabulary))
        self._rows = self._missing = self._values = self._outside = 0

    def look(self, values: npt.NDArray[Any], lengths: npt.NDArray[np.int32] | None) -> None:
        missing = np.isnan(values) if self._kind in ("number", "vector") else values == 0
        missing = missing.all(1) if self._kind == "vector" else missing
        self._rows += len(values) if lengths is None else len(lengths)
        self._missing += int(missing.sum() if lengths is None else (lengths == 0).sum())
        if self._vocabulary is not None:
            given = values[~missing]
            self._values += len(given)
            self._outside += int((~np.isin(given, self._vocabulary)).sum())

    def result(self) -> dict[str, float]:
        shares = {"missing": self._missing / max(self._rows, 1)}
        if self._vocabulary is not None:
            shares["outside_vocabulary"] = self._outside / max(self._values, 1)
        return shares


def _total(parts: list[Counts]) -> Counts:
    """Ids and the count of each over all parts."""
    ids, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    return ids, np.bincount(inverse, weights=np.concatenate([part[1] for part in parts])).astype(np.int64)


def _percentiles(values: npt.NDArray[np.int64]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {"mean": round(float(values.mean()), 3)} | {f"p{q}": float(value) for q, value in zip(PERCENTILES, found, strict=True)}


def _iso(time_ms: np.integer[Any]) -> str:
    moment = np.datetime64(int(time_ms), "ms")
    return f"{moment}Z"


def _shares(name: str, shares: dict[str, float]) -> tuple[str, ...]:
    outside = shares.get("outside_vocabulary")
    return name, f"{shares['missing']:.2%}", "" if outside is None else f"{outside:.2%}"

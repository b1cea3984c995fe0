"""The text of a drafted domain file, from what `streams.draft` guessed."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from streams.sample import SAMPLE_ROWS, Sample, Sampled

_REQUESTS_MAX = 50_000
"""About so many requests of drawn candidates: a million candidates, which train within hours on a few cores."""


@dataclass(frozen=True)
class Action:
    """One kind of action and the rule that finds it: rows whose `column` is one of `equals`, or reaches `at_least`, or every row."""

    name: str
    kind: str
    share: float
    column: str | None = None
    equals: tuple[str, ...] | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class FeatureGuess:
    """A column as a feature: its side, and the rest of its table in the domain file."""

    name: str
    column: str
    side: str
    keys: dict[str, object]


@dataclass(frozen=True)
class Table:
    """A file with a row for each item or user: its sample, the column of the id, its path below the log's folder."""

    sample: Sample
    identity: str
    file: str


@dataclass
class Draft:
    """What was guessed. roles: part of [log] to column; reasons: (what, guess, why) in the order in which they were made."""

    sample: Sample
    roles: dict[str, str] = field(default_factory=dict)
    time_unit: str = "ms"
    time_parts: tuple[str, ...] = ()
    candidates_separator: str | None = None
    actions: list[Action] = field(default_factory=list)
    features: list[FeatureGuess] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    reasons: list[tuple[str, str, str]] = field(default_factory=list)
    entity: str = "item"
    tables: dict[str, Table] = field(default_factory=dict)

    def say(self, what: str, guess: str, why: str) -> None:
        """Notes a guess."""
        self.reasons.append((what, guess, why))

    def take(self, role: str, column: Sampled, why: str) -> None:
        """Gives a column its part."""
        self.roles[role] = column.name
        self.say(role, column.name, why)

    def free(self) -> list[Sampled]:
        """Columns that have no part yet."""
        used = {*self.roles.values(), *self.time_parts, *(action.column for action in self.actions)}
        return [column for name, column in self.sample.columns.items() if name not in used]

    @property
    def has_shown(self) -> bool:
        """Whether the log says what was shown."""
        return any(action.kind == "impression" for action in self.actions)

    @property
    def positives(self) -> list[Action]:
        """Positive actions, most frequent first."""
        return sorted((action for action in self.actions if action.kind == "positive"), key=lambda action: -action.share)


def draft_toml(draft: Draft) -> str:
    """The domain file, with the reason of each guess beside it."""
    sample = draft.sample
    looked_at = "all" if sample.rows < SAMPLE_ROWS else "the first"
    lines = [
        f"# Drafted by `freshrank domain --from {sample.path.name}` from {looked_at} {sample.rows:,} rows.",
        "# Every line is a guess: read it, mend it, and run `freshrank check` with it. Every key: docs/domain.md.",
        "",
        f"name = {_quoted(free_name(sample.path.name.split('.')[0], set()))}",
        "",
        "[entities]",
        f"{draft.entity} = 1",
    ]
    surfaces = _surfaces(draft)
    if surfaces:
        lines += ["", "[surfaces]", *(f"{name} = {number}" for number, name in enumerate(surfaces.values(), 1))]
    lines += ["", "[actions] # ids are never renumbered: they stand in every stored sequence"]
    lines += [f'{action.name} = {{ id = {number}, kind = "{action.kind}" }}' for number, action in enumerate(draft.actions, 1)]
    shown = next((action.name for action in draft.actions if action.kind == "impression"), None)
    lines += ["", "[sequence.main]", "id = 1", "length = 100", "age_days_max = 3650 # a historic log; a live one forgets sooner"]
    lines += [f"caps = {{ {shown} = 50 }} # so that what was only shown does not push actions out"] if shown else []
    for feature in draft.features:
        column = [f"column = {_quoted(feature.column)}"] if feature.column != feature.name else []
        why = next(why for what, guess, why in draft.reasons if what == "feature" and guess.startswith(f"{feature.name} ("))
        keys = [f"{key} = {_value(value)}" for key, value in feature.keys.items()]
        lines += ["", f"# {why}", f"[features.{feature.name}]", f'side = "{feature.side}"', *keys, *column]
    counters = _counters(draft)
    for name, counter in counters.items():
        lines += ["", f"[features.{name}]", 'side = "candidate"', 'kind = "number"', *counter]
    if draft.left_out:
        lines += ["", "# Not taken:", *(f"# {name}: {why}" for name, why in draft.left_out)]
    lines += _ranker(draft, [*(feature.name for feature in draft.features), *counters])
    lines += _log(draft, surfaces)
    return "\n".join(lines) + "\n"


def _counters(draft: Draft) -> dict[str, list[str]]:
    if "time" not in draft.roles:
        return {}
    main = draft.positives[0].name
    shown = next((action.name for action in draft.actions if action.kind == "impression"), None)
    names = {feature.name for feature in draft.features}
    day = {free_name(f"{main}s_24h", names): ['normalise = "log"', f'counter = {{ action = "{main}", window_ms = 86_400_000 }}']}
    if shown is None:
        return day
    return day | {free_name(f"{main}_rate_7d", names): [f'counter = {{ action = "{main}", rate_of = "{shown}", window_ms = 604_800_000 }}']}


def _ranker(draft: Draft, features: list[str]) -> list[str]:
    lines = [
        "",
        "[ranker.main]",
        'sequence = "main"',
        "sequence_length = 50",
        *(['sequence_attributes = ["value"]'] if "value" in draft.roles else []),
        f"features = {_value(features)}",
        'item_space = "coengagement" # vectors from the log alone',
        'user_space = "coengagement"',
    ]
    heads = draft.positives[: 3 if draft.has_shown else 1]
    heads = [head for head in heads if head.share >= 0.001] or heads[:1]
    negatives = [action for action in draft.actions if action.kind == "negative" and action.share >= 0.001 and draft.has_shown][:1]
    for head in (*heads, *negatives):
        utility = -1.0 if head.kind == "negative" else 1.0
        lines += ["", f"[ranker.main.heads.{head.name}] # {head.share:.2%} of the rows"]
        lines += [f'actions = ["{head.name}"]', f"utility = {utility}"]
    return lines


def _log(draft: Draft, surfaces: dict[str, str]) -> list[str]:
    sample, columns = draft.sample, draft.sample.columns
    lines = ["", "[log]", f"files = [{_quoted(sample.path.name.removesuffix('.gz'))}]", f'format = "{sample.format}"']
    lines += [f"separator = {_quoted(sample.separator)}"] if sample.separator != "," else []
    for role in ("user", "entity"):
        lines.append(f"{role} = {_quoted(draft.roles[role])}")
        is_id = columns[draft.roles[role]].is_id
        lines += [] if is_id else [f'{role}_ids = "string"']
    lines.append(f'entity_kind = "{draft.entity}"')
    if "time" in draft.roles:
        lines += [f"time = {_quoted(draft.roles['time'])}", f'time_unit = "{draft.time_unit}"']
    elif draft.time_parts:
        lines.append(f"time_parts = {_value(list(draft.time_parts))}")
    else:
        lines.append("# no times: each row counts as a second after the one before it")
    lines += [
        f"{role} = {_quoted(draft.roles[role])}"
        for role in ("request", "position", "candidates", "surface", "value")
        if role in draft.roles
    ]
    if draft.candidates_separator is not None:
        lines.append(f"candidates_separator = {_quoted(draft.candidates_separator)}")
    if not draft.has_shown:
        share = min(1.0, round(_REQUESTS_MAX / max(sample.rows_about * draft.positives[0].share, 1), 3)) or 0.001
        lines += [
            "# The log has what was acted on, not what was shown: what else might have been is drawn from what came before each request."
        ]
        drawn = f"uniform = 10, popular = 10, window_ms = {_window_ms(draft)}, share = {share}"
        lines.append(f'negatives = {{ action = "{draft.positives[0].name}", {drawn} }}')
    if surfaces:
        lines += ["", "[log.surfaces]", *(f"{_quoted(text)} = {_quoted(name)}" for text, name in surfaces.items())]
    for action in draft.actions:
        lines += ["", "[[log.actions]]", f'action = "{action.name}"' + (" # every row" if action.column is None else "")]
        lines += [f"column = {_quoted(action.column)}"] if action.column is not None else []
        lines += [f"equals = {_value(list(action.equals))}"] if action.equals is not None else []
        lines += [f"at_least = {action.at_least}"] if action.at_least is not None else []
    for part, side, role in ((f"items.{draft.entity}", "item", "entity"), ("users", "user", "user")):
        if any(feature.side == side for feature in draft.features):
            lines += _source(draft, part, side, role)
    return lines


def _source(draft: Draft, part: str, side: str, role: str) -> list[str]:
    """Where the features of items or users come from: a file of their own, or the log."""
    is_id = draft.sample.columns[draft.roles[role]].is_id
    ids = [] if is_id else ['ids = "string"']
    if side not in draft.tables:
        lines = ["", f"[log.{part}] # the log itself: of each {side} the first row counts"]
        return [*lines, f"files = [{_quoted(draft.sample.path.name.removesuffix('.gz'))}]", f"id = {_quoted(draft.roles[role])}", *ids]
    table = draft.tables[side]
    lines = ["", f"[log.{part}]", f"files = [{_quoted(table.file.removesuffix('.gz'))}]", f"id = {_quoted(table.identity)}", *ids]
    lines += [f'format = "{table.sample.format}"'] if table.sample.format != draft.sample.format else []
    return lines + ([f"separator = {_quoted(table.sample.separator)}"] if table.sample.separator != draft.sample.separator else [])


def _window_ms(draft: Draft) -> int:
    """A day, or without real times about a tenth of the rows, a second each."""
    if "time" in draft.roles:
        return 86_400_000
    return 30 * 86_400_000 if draft.time_parts else max(100_000, 100 * draft.sample.rows_about)


def _surfaces(draft: Draft) -> dict[str, str]:
    """Name of the surface by its text."""
    if "surface" not in draft.roles:
        return {}
    column = draft.sample.columns[draft.roles["surface"]]
    names: set[str] = set()
    texts = sorted(column.texts, key=lambda text: (len(text), text))
    if column.is_id and 0 <= (last := int(texts[-1])) <= 2 * len(texts) + 10:  # numbers of which the sample may lack some
        texts = [str(number) for number in range(min(int(texts[0]), 1), last + 1)]
    return {text: free_name(text if not text[:1].isdigit() else f"{column.name}_{text}", names) for text in texts}


def parts(text: str, without: Iterable[str] = ()) -> list[str]:
    """Lower-case words of a text, in its order."""
    words = [word.lower() for word in re.split(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", text) if word]
    return [word for word in words if word not in without] or words or ["x"]


def free_name(text: str, taken: set[str]) -> str:
    """A name as the domain file allows it, made from a text, that is not taken yet; then it is."""
    name = re.sub(r"[^a-z0-9]+", "_", "_".join(parts(text))).strip("_")[:34] or "x"
    name = name if name[0].isalpha() else f"x_{name}"
    free = next(each for each in (name, *(f"{name}_{n}" for n in range(2, 10_000))) if each not in taken)
    taken.add(free)
    return free


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    return _quoted(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)

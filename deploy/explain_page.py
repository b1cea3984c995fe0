"""An explanation as a page that a person reads: in the terminal, or as one HTML file that needs nothing else."""

import io
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.options import position_text
from deploy.wording import duration, iso
from features.domain import Domain
from features.pack import FIRST, MISSING, OUTSIDE
from protos.v1.ranking_pb2 import ExplainedFeature, Explanation, Tier

PAGE_COLUMNS = 180
_BAR_WIDTH = 24
_LIST_VALUES_MAX = 4


def html_page(parts: Seq[RenderableType], title: str) -> str:
    """The parts as one HTML document with its styles inline."""
    console = Console(record=True, width=PAGE_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for part in parts:
        console.print(part)
    page = console.export_html(inline_styles=True)
    return page.replace("<head>", f"<head>\n<title>{title}</title>", 1)


def page(
    domain: Domain,
    found: Explanation,
    *,
    notes: Seq[str] = (),
    warnings: Seq[str] = (),
    candidates_max: int = 20,
    actions_max: int = 40,
) -> list[RenderableType]:
    """The parts of the page: what answered, candidates, actions with their effects, features. `domain`: the release's."""
    remarks = [*(Text(note, style="dim") for note in notes), *(Text(warning, style="bold red") for warning in warnings)]
    return [*_head(found), *remarks, _candidates(domain, found, candidates_max), _actions(found, actions_max), *_values(domain, found)]


def _head(found: Explanation) -> Iterator[Text]:
    answer = found.response
    experiment = f", experiment {answer.experiment}, arm {answer.arm or '-'}" if answer.experiment else ""
    tier = Tier.Name(answer.tier).removeprefix("TIER_").lower()
    yield Text(f"request {answer.request_id}: {tier} of {answer.release_id}{experiment}", style="bold")
    places = ", ".join(position_text(at) for at in answer.watermark) or "no state answered"
    tables = ", ".join(f"{space} {name}" for space, name in sorted(answer.generations.items()))
    yield Text(f"state at {places}; tables {tables}")


def _candidates(domain: Domain, found: Explanation, count_max: int) -> Table:
    """The answer, best first, with scores of each head and the features of the candidates."""
    answer = found.response
    ids, kinds = np.frombuffer(answer.ranked_ids, "<u8"), np.frombuffer(answer.ranked_kinds, np.uint8)
    scores = np.frombuffer(answer.scores, "<f4")
    heads = {name: np.frombuffer(data, "<f4") for name, data in sorted(answer.head_scores.items())}
    features = [feature for feature in found.features if feature.side in ("item", "candidate")]
    shown = min(len(ids), count_max)
    table = Table("rank", "candidate", "score", *heads, *(feature.name for feature in features))
    table.title = f"the answer: {shown} of {len(ids)} candidates"
    names = {number: name for name, number in domain.entities.items()}
    texts = [_texts(domain, feature) for feature in features]
    for place in range(shown):
        columns = [f"{scores[place]:.4f}", *(f"{of_head[place]:.4f}" for of_head in heads.values())]
        candidate = f"{names.get(int(kinds[place]), kinds[place])} {ids[place]}"
        table.add_row(str(place + 1), candidate, *columns, *(column[place] for column in texts))
    return table


def _actions(found: Explanation, count_max: int) -> Table:
    """The sequence, newest first. A bar is the action's effect on the first candidate's score, and the widest bar the greatest of them."""
    ids = np.frombuffer(found.response.ranked_ids, "<u8")
    effects = [np.frombuffer(action.effect, "<f4") if action.left_out else None for action in found.actions]
    greatest = max((abs(float(effect[0])) for effect in effects if effect is not None), default=0.0)
    shown = min(len(found.actions), count_max)
    table = Table(
        "when (UTC)", "age", "action", "item", "surface", "value", "seen", "effect on the 1st", "", "greatest effect", "Kendall tau"
    )
    table.title = f"what the user did: {shown} of {len(found.actions)} actions, newest first" if found.actions else "the user did nothing"
    for action, effect in zip(found.actions[:shown], effects, strict=False):
        first: tuple[str | Text, ...] = ("", "", "", "")
        if effect is not None:
            most = int(np.abs(effect).argmax())
            tau = "-" if np.isnan(action.kendall_tau) else f"{action.kendall_tau:.3f}"
            first = (f"{effect[0]:+.4f}", bar(float(effect[0]), greatest), f"{effect[most]:+.4f} on {ids[most]}", tau)
        value = "-" if np.isnan(action.value) else f"{action.value:g}"
        age = duration(action.age_ms / 1000)
        what = (
            iso(action.event_time_ms)[:19].replace("T", " "),
            age,
            action.action,
            f"{action.kind} {action.entity_id}",
            action.surface or "-",
            value,
        )
        table.add_row(*what, "yes" if action.seen else "no", *first)
    return table


def bar(value: float, greatest: float) -> Text:
    """A bar to the left (red, lowers the score) or to the right (green, raises it) of a middle line, `greatest` being a whole half."""
    half = _BAR_WIDTH // 2
    length = round(half * abs(value) / greatest) if greatest else 0
    left = " " * half if value >= 0 else ("█" * length).rjust(half)
    right = ("█" * length).ljust(half) if value >= 0 else " " * half
    return Text.assemble((left, "red"), "│", (right, "green"))


def _values(domain: Domain, found: Explanation) -> Iterator[Table]:
    """The features that are the same for all candidates."""
    features = [feature for feature in found.features if feature.side in ("user", "request")]
    if features:
        table = Table("feature", "of", "value", title="features of user and request")
        for feature in features:
            table.add_row(feature.name, feature.side, *_texts(domain, feature))
        yield table


def _texts(domain: Domain, feature: ExplainedFeature) -> list[str]:
    """A feature's values in words: one, or one for each candidate."""
    if not feature.width:
        return ["missing" if np.isnan(value) else f"{value:g}" for value in np.frombuffer(feature.number, "<f4").tolist()]
    if not feature.code:  # a vector
        vectors = np.frombuffer(feature.number, "<f4").reshape(-1, feature.width).tolist()
        return ["missing" if np.isnan(vector).all() else ", ".join(f"{value:.3g}" for value in vector) for vector in vectors]
    rows: npt.NDArray[Any] = np.frombuffer(feature.code, "<i4").reshape(-1, feature.width)
    vocabulary = domain.features[feature.name].vocabulary or ()
    return [_codes_text([int(code) for code in row], vocabulary) for row in rows]


def _codes_text(codes: list[int], vocabulary: Seq[str]) -> str:
    given = [code for code in codes if code != MISSING]
    texts = [_code_text(code, vocabulary) for code in given[:_LIST_VALUES_MAX]]
    more = f" and {len(given) - _LIST_VALUES_MAX} more" if len(given) > _LIST_VALUES_MAX else ""
    return ", ".join(texts) + more or "missing"


def _code_text(code: int, vocabulary: Seq[str]) -> str:
    if code == OUTSIDE:
        return "outside of the vocabulary"
    return str(vocabulary[code - FIRST]) if code - FIRST < len(vocabulary) else f"bucket {code - FIRST}"

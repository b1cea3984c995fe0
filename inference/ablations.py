"""What `freshrank ablate` can run: cells (configurations), and tables of them with the lifts that the TransAct paper reports.

A cell is what it changes of the domain file's ranker. Lifts are those of HIT@3 for repin and hide, per cent (KDD 2023, section 4); they
come from private data of another product, so signs and order are what can be compared.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from features.domain import Domain, Ranker

Lift = tuple[float | None, float | None]
UNKNOWN: Lift = (None, None)


class AblationError(ValueError):
    """A table or cell that cannot be run; says which and why."""


@dataclass(frozen=True)
class Cell:
    """model: keys of [ranker.NAME.model]; ranker: other keys of [ranker.NAME]; positives: only positive actions are seen; baseline:
    `inference.baseline` instead of a model ("lambdamart", "gbdt" or "rates"); vectors: trees get cosines, too, which needs `refresh`.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    ranker: Mapping[str, Any] = field(default_factory=dict)
    positives: bool = False
    baseline: str = ""
    vectors: bool = False


@dataclass(frozen=True)
class AblationTable:
    """rows: the paper's lifts (repin, hide) over the reference by cell. The reference is what every other cell is compared with."""

    title: str
    reference: str
    rows: Mapping[str, Lift]


CELLS: dict[str, Cell] = {
    "transact": Cell(),
    "no_sequence": Cell({"encoder": "none", "fusion": "concatenate", "output": "both"}),
    "average": Cell({"encoder": "average"}),
    "bst_positives": Cell({"encoder": "bst"}, positives=True),
    "bst_all": Cell({"encoder": "bst"}),
    "cnn": Cell({"encoder": "cnn"}),
    "rnn": Cell({"encoder": "rnn"}),
    "lstm": Cell({"encoder": "lstm"}),
    "candidate_token": Cell({"fusion": "token"}),
    "max_pool": Cell({"output": "pool"}),
    "first_k": Cell({"output": "first"}),
    "no_action_types": Cell({"action_types": False}),
    "no_time_window": Cell({"time_window_hours_max": 0.0}),
    "no_user_embedding": Cell({"user_embedding": False}),
    "similarities": Cell({"similarities": True}),
    "average_similarities": Cell({"encoder": "average", "similarities": True}),
    "no_sequence_similarities": Cell({"encoder": "none", "similarities": True}),
    "no_sequence_no_user": Cell({"encoder": "none", "user_embedding": False}),
    "average_no_user": Cell({"encoder": "average", "user_embedding": False}),
    "full_rank": Cell({"cross_rank": 0}),
    "low_rank": Cell({"cross_rank": 64}),
    "end_to_end": Cell({"interaction": "transformer"}),
    "position": Cell({"position_max": 20}),
    "platt": Cell({"calibration": "platt"}),
    "isotonic": Cell({"calibration": "isotonic"}),
    "lambdamart": Cell(baseline="lambdamart"),
    "lambdamart_vectors": Cell(baseline="lambdamart", vectors=True),
    "gbdt": Cell(baseline="gbdt"),
    "rates": Cell(baseline="rates"),
    **{f"length_{length}": Cell(ranker={"sequence_length": length}) for length in (10, 25, 50, 100)},
}

TABLES: dict[str, AblationTable] = {
    "overview": AblationTable(
        "Models and baselines against the model without the sequence",
        "no_sequence",
        {"no_sequence": (0.0, 0.0), "no_sequence_no_user": UNKNOWN, "average": (0.21, -1.61), "average_no_user": UNKNOWN}
        | {"bst_all": (4.41, 2.33), "transact": (9.40, -14.86), "no_user_embedding": UNKNOWN, "rates": UNKNOWN, "gbdt": UNKNOWN},
    ),
    "sequence": AblationTable(
        "How the realtime sequence is read, against none",
        "no_sequence",
        {"no_sequence": (0.0, 0.0), "average": (0.21, -1.61), "bst_positives": (7.34, None), "bst_all": (4.41, 2.33)}
        | {"transact": (9.40, -14.86)},
    ),
    "encoder": AblationTable(
        "Encoders with the same fusion and output, against no sequence",
        "no_sequence",
        {"no_sequence": (0.0, 0.0), "cnn": (0.08, -1.29), "rnn": (-1.05, -2.46), "lstm": (-0.75, -2.98), "transact": (9.40, -14.86)},
    ),
    "output": AblationTable(
        "What is kept of the encoder's tokens, against no sequence",
        "no_sequence",
        {"no_sequence": (0.0, 0.0), "max_pool": (6.38, -14.15), "first_k": (9.38, -14.33), "transact": (9.41, -14.86)},
    ),
    "fusion": AblationTable(
        "The candidate beside every action, against one token (the paper: worse at every length)",
        "candidate_token",
        {"candidate_token": UNKNOWN, "transact": UNKNOWN},
    ),
    "parts": AblationTable(
        "What is taken away, against the whole model",
        "transact",
        {"transact": (0.0, 0.0), "no_user_embedding": (-2.46, 3.61), "no_sequence": (-8.59, 17.45)}
        | {"no_action_types": UNKNOWN, "no_time_window": UNKNOWN},
    ),
    "length": AblationTable("Length of the sequence, against 10", "length_10", {f"length_{n}": UNKNOWN for n in (10, 25, 50, 100)}),
    "interaction": AblationTable(
        "What crosses the features, against a low-rank DCN v2",
        "low_rank",
        {"low_rank": UNKNOWN, "full_rank": UNKNOWN, "end_to_end": UNKNOWN},
    ),
    "position": AblationTable("The place in the list as a feature of training", "transact", {"transact": UNKNOWN, "position": UNKNOWN}),
    "calibration": AblationTable("Calibration of each head", "transact", {"transact": UNKNOWN, "platt": UNKNOWN, "isotonic": UNKNOWN}),
    "baseline": AblationTable(
        "Models against boosted trees with counters",
        "lambdamart",
        dict.fromkeys(("lambdamart", "lambdamart_vectors", "gbdt", "rates", "no_sequence", "transact"), UNKNOWN),
    ),
}


def configured(domain: Domain, ranker_name: str, cell: Cell) -> Domain:
    """The domain file with the cell's changes to the ranker.

    Raises:
        AblationError: the domain file does not allow them (a sequence longer than what the store keeps, say).
    """
    ranker = domain.ranker[ranker_name]
    if cell.vectors and ranker.refresh is None:
        raise AblationError("trees get vectors only where they are refreshed: others know answers of the training part")
    given = ranker.model_dump() | dict(cell.ranker)
    if cell.positives:
        given["sequence_actions"] = tuple(name for name, action in domain.seen_actions(ranker_name).items() if action.kind == "positive")
    given["model"] = ranker.model.model_dump() | dict(cell.model)
    try:
        changed = Ranker.model_validate(given)
        return Domain.model_validate(domain.model_dump() | {"ranker": {**domain.ranker, ranker_name: changed}})
    except ValidationError as error:
        raise AblationError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error


def read_tables(path: str | Path) -> tuple[dict[str, Cell], dict[str, AblationTable]]:
    """Cells and tables of a TOML file, beside the ones above: [cell.NAME] with the keys of `Cell`; [table.NAME]
    with `title`, `reference` and `rows`, a list of cells.

    Raises:
        AblationError: the file does not say that.
    """
    try:
        text = tomllib.loads(Path(path).read_text("utf-8"))
        cells = CELLS | {name: Cell(**given) for name, given in text.get("cell", {}).items()}
        tables = {
            name: AblationTable(given.get("title", name), given["reference"], dict.fromkeys(given["rows"], UNKNOWN))
            for name, given in text.get("table", {}).items()
        }
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise AblationError(f"{path}: {error}") from error
    for name, table in tables.items():
        unknown = {table.reference, *table.rows} - set(cells)
        if unknown or table.reference not in table.rows:
            raise AblationError(f"{path}: table.{name}: {', '.join(sorted(unknown)) or table.reference} is no cell of it")
    return cells, TABLES | tables

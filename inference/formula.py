"""The final score as a formula over heads and features, changed without a deploy: `click + 0.5 * like - 2 * hide + 0.1 * log1p(price)`.

Names are the ranker's heads and its features of kind number (those of the user and of the request have one value for all candidates; a
missing number counts as 0). What is allowed is a list: names, numbers, arithmetic, comparisons, and the functions of `FUNCTIONS`; numexpr
evaluates it on arrays. Nothing else is reachable from it.
"""

import ast
from collections.abc import Mapping
from typing import Any

import numexpr
import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.tensors import SIDES, feature_names

FORMULA_CHARS_MAX = 500
DEPTH_MAX = 20
NUMBER_MAX, POWER_MAX = 1e15, 8
FUNCTIONS = ("where", "abs", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "minimum", "maximum")
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Load, ast.Constant,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
)  # fmt: skip
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


class FormulaError(ValueError):
    """A formula that cannot be used; says what is wrong and what is allowed."""


class Formula:
    """A checked formula of one ranker. Immutable; threads may share it."""

    def __init__(self, domain: Domain, ranker_name: str, text: str) -> None:
        """Raises FormulaError."""
        self.text = text
        heads = list(domain.ranker[ranker_name].heads)
        numbers = {name: (side, i) for side in SIDES for i, name in enumerate(feature_names(domain, ranker_name, side, "number"))}
        for name in sorted(set(heads) & set(numbers)):
            del numbers[name]  # the head is meant
        names = _names(text, [*heads, *numbers])
        self._heads = [(name, heads.index(name)) for name in sorted(names) if name in heads]
        self._numbers = [(name, *numbers[name]) for name in sorted(names) if name in numbers]
        signature = [(name, np.float64) for name in sorted(names)]
        try:
            self._run = numexpr.NumExpr(text, signature)
            self._order = sorted(names)
        except Exception as error:  # numexpr raises whatever its compiler meets
            raise FormulaError(f"{text!r}: {error}") from error

    def scores(self, probability: F32, tensors: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.int64] | None = None) -> F32:
        """Final scores float32 [K] of candidates with these probabilities [K, H]; `rows`: their places in the tensors, None: all.

        A score that is no finite number becomes the least float32: such a candidate stands last.
        """
        values: dict[str, F64] = {name: probability[:, head].astype(np.float64) for name, head in self._heads}
        for name, side, column in self._numbers:
            raw = tensors[f"{side}_number"]
            of = raw[:, column] if side in ("item", "candidate") else np.full(1, raw[column])
            if rows is not None and len(of) > 1:
                of = of[rows]
            values[name] = np.broadcast_to(np.nan_to_num(of.astype(np.float64)), len(probability)).copy()
        found = np.asarray(self._run(*(values[name] for name in self._order)), np.float64)
        if found.ndim == 0:
            found = np.full(len(probability), float(found))
        with np.errstate(over="ignore"):
            scores = found.astype(np.float32)
        scores[~np.isfinite(scores)] = np.finfo(np.float32).min
        return scores


def _names(text: str, known: list[str]) -> set[str]:
    """The names that a formula uses, after checking everything in it."""
    if not text.strip() or len(text) > FORMULA_CHARS_MAX:
        raise FormulaError(f"a formula has 1 to {FORMULA_CHARS_MAX} characters, this one {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormulaError(f"{text!r} is no formula: {getattr(error, 'msg', error)}") from error
    if _is_deeper(tree, DEPTH_MAX):
        raise FormulaError(f"{text!r}: nested more than {DEPTH_MAX} deep")
    used: set[str] = set()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            allowed = f"names, numbers, + - * / **, comparisons, {_functions()}"
            raise FormulaError(f"{text!r}: {type(node).__name__} is not allowed; allowed: {allowed}")
        if isinstance(node, ast.Constant) and (isinstance(node.value, bool) or not isinstance(node.value, int | float)):
            raise FormulaError(f"{text!r}: {node.value!r} is no number")
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) > NUMBER_MAX:
            raise FormulaError(f"{text!r}: numbers are at most {NUMBER_MAX:.0e}")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small_power(node):
            raise FormulaError(f"{text!r}: a power is NAME ** number, of something with a name in it, and the number at most {POWER_MAX}")
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            raise FormulaError(f"{text!r}: write a < b and b < c as where(a < b, where(b < c, ...))")
        if isinstance(node, ast.Call) and (not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords):
            raise FormulaError(f"{text!r}: only {_functions()} may be called")
        if isinstance(node, ast.Name) and id(node) not in called:
            if node.id not in known:
                raise FormulaError(f"{text!r}: {node.id!r} is neither a head nor a number of the ranker; allowed: {', '.join(known)}")
            used.add(node.id)
    if not used:
        raise FormulaError(f"{text!r}: names no head and no number; allowed: {', '.join(known)}")
    return used


def _is_small_power(node: ast.BinOp) -> bool:
    """Powers of plain numbers are computed when the formula is compiled, as integers of any length: 9 ** 9 ** 9 would never end."""
    exponent = node.right
    has_name = any(isinstance(part, ast.Name) and part.id not in FUNCTIONS for part in ast.walk(node.left))
    return has_name and isinstance(exponent, ast.Constant) and isinstance(exponent.value, int | float) and 0 <= exponent.value <= POWER_MAX


def _is_deeper(node: ast.AST, levels: int) -> bool:
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in ast.iter_child_nodes(node))


def _functions() -> str:
    return ", ".join(f"{name}()" for name in FUNCTIONS)

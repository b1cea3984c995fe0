"""Which final score a ranking gets: the request's formula, else the announced one, else the domain file's, else the weighted sum of heads.

A request that names head weights of its own asks for the sum: it gets that, whatever is announced.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.request import RequestError
from inference.formula import Formula, FormulaError
from inference.ladder import Final
from inference.scoring import final_scores
from inference.served import Served
from protos.v1.ranking_pb2 import RankRequest

log = logging.getLogger(__name__)

RELEASES_MAX = 64
FORMER_MAX = 4
COMPILED_MAX = 256
"""Compiled formulas that are kept, those used last; a caller that sends ever new ones costs a millisecond each, and no memory."""


@dataclass(frozen=True)
class Rule:
    """How final scores are made: by `formula`, or where it is None as the sum of heads with `weights` float64 [H]."""

    weights: npt.NDArray[np.float64]
    formula: Formula | None = None

    @property
    def text(self) -> str:
        """The formula as answered and logged; empty: the sum."""
        return "" if self.formula is None else self.formula.text

    def final(self, tensors: Mapping[str, npt.NDArray[Any]]) -> Final:
        """The function that scores the candidates of a request with these packed tensors."""
        formula, weights = self.formula, self.weights
        if formula is None:
            return lambda probability, _: final_scores(probability, weights)
        return lambda probability, places: formula.scores(probability, tensors, places)


class Formulas:
    """Compiled formulas of one server, and what is announced for its rankers. Called on the event loop."""

    def __init__(self, count: Callable[[str], None]) -> None:
        """`count` is told "formula_refused" when an announced formula cannot be used."""
        self._count = count
        self._compiled: OrderedDict[tuple[str, str], Formula] = OrderedDict()
        self._announced: dict[str, tuple[str, ...]] = {}
        """By ranker: the announced formula, and behind it the ones before, newest first: a release uses the first that fits it."""
        self._chosen: dict[tuple[str, str], Formula | None] = {}

    def announce(self, ranker: str, text: str) -> None:
        """Makes a formula the ranker's; empty: the domain file's counts again. One that does not compile for a release is refused when `of`
        is asked for it: it is logged and counted, and the former one stays.
        """
        former = self._announced.get(ranker, ())
        self._announced[ranker] = tuple(dict.fromkeys((text, *former)))[:FORMER_MAX] if text else ()
        self._chosen = {key: formula for key, formula in self._chosen.items() if key[0] != ranker}

    def rule(self, served: Served, request: RankRequest, weights: npt.NDArray[np.float64]) -> Rule:
        """The rule for one request, with `weights` float64 [H] where it is the sum. Raises RequestError: the request's formula."""
        if request.score_formula:
            if request.head_weights:
                raise RequestError("score_formula", "not together with head_weights: write the weights into the formula")
            try:
                return Rule(weights, self._compile(served, request.score_formula))
            except FormulaError as error:
                raise RequestError("score_formula", str(error)) from error
        if request.head_weights:
            return Rule(weights)
        return Rule(weights, self.of(served))

    def of(self, served: Served) -> Formula | None:
        """The formula of a release where the request names none; None: the sum."""
        key = served.release.ranker, served.release.release_id
        if key not in self._chosen:
            if len(self._chosen) >= RELEASES_MAX:
                self._chosen.clear()
            self._chosen[key] = self._choose(served)
        return self._chosen[key]

    def _choose(self, served: Served) -> Formula | None:
        ranker = served.release.ranker
        for text in self._announced.get(ranker, ()):
            try:
                formula = self._compile(served, text)
            except FormulaError as error:
                self._count("formula_refused")
                log.warning("ranker %s: the announced formula cannot be used with %s: %s", ranker, served.release.release_id, error)
            else:
                return formula
        return None if served.ranker.score is None else self._compile(served, served.ranker.score)

    def _compile(self, served: Served, text: str) -> Formula:
        key = served.release.release_id, text
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = Formula(served.domain, served.release.ranker, text)
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return found

"""Formulas over heads and features: what they compute, and that nothing else can be said with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import DOMAIN

from inference.formula import FORMULA_CHARS_MAX, Formula, FormulaError

PROBABILITY = np.array([[0.5, 0.1], [0.2, 0.4], [0.9, 0.9]], np.float32)
TENSORS = {"candidate_number": np.array([[3.0], [np.nan], [0.0]], np.float32), "user_number": np.array([2.0], np.float32)}


def scores(text: str, **given) -> list[float]:
    return Formula(DOMAIN, "home", text).scores(PROBABILITY, TENSORS, **given).tolist()


def test_heads_and_features_by_name():
    assert scores("click - 2 * hide") == pytest.approx([0.3, -0.6, -0.9])
    assert scores("click + price") == pytest.approx([3.5, 0.2, 0.9])  # a missing number counts as 0
    assert scores("where(price > 1, click * age, hide)") == pytest.approx([1.0, 0.4, 0.9])
    assert scores("log1p(price) + 0 * click") == pytest.approx([np.log(4), 0, 0])
    assert scores("age ** 2 + 0 * hide") == pytest.approx([4, 4, 4])
    assert scores("age") == pytest.approx([2, 2, 2])


def test_of_some_candidates_only_theirs():
    formula = Formula(DOMAIN, "home", "click + price + age")
    found = formula.scores(PROBABILITY[:2], TENSORS, np.array([2, 0]))
    assert found.tolist() == pytest.approx([0.5 + 0 + 2, 0.2 + 3 + 2])
    assert found.dtype == np.float32


def test_what_is_no_number_stands_last():
    least = float(np.finfo(np.float32).min)
    assert scores("click / (hide - hide)") == [least] * 3
    assert scores("log(price) + click")[2] == least
    assert scores("exp(price * 1000) + click")[0] == least


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "1 to 500 characters"),
        ("click" + " " * FORMULA_CHARS_MAX, "1 to 500 characters"),
        ("click +", "is no formula"),
        ("clicks", "neither a head nor a number of the ranker; allowed: click, hide, age, price"),
        ("tags", "neither a head nor a number"),
        ("click.__class__", "Attribute is not allowed"),
        ("click[0]", "Subscript is not allowed"),
        ("[click]", "List is not allowed"),
        ("click if hide else 1", "IfExp is not allowed"),
        ("lambda: click", "Lambda is not allowed"),
        ("click and hide", "BoolOp is not allowed"),
        ("__import__('os')", "may be called"),
        ("eval(click)", "may be called"),
        ("exp(x=click)", "may be called"),
        ("'a' + click", "is no number"),
        ("True + click", "is no number"),
        ("1j + click", "is no number"),
        ("9 ** 9 ** 9 ** 9 + click", "a power is"),
        ("(9 ** 8) ** 8 + click", "a power is"),
        ("click ** 9", "a power is"),
        ("click ** hide", "a power is"),
        ("1e300 * click", "numbers are at most"),
        ("0 < click < 1", "write a < b"),
        ("-" * 300 + "click", "nested more than 20 deep"),
        ("1 + 1", "names no head and no number"),
        ("exp(click, hide, click)", "exp"),
    ],
)
def test_everything_else_is_refused_with_a_reason(text, why):
    with pytest.raises(FormulaError) as refused:
        Formula(DOMAIN, "home", text)
    assert why in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="click hideageprx0123456789.+-*/<>=()[]{}_'\"\\,:;lambdefortuqsn\n", max_size=60))
def test_any_text_is_a_formula_or_refused(text):
    try:
        found = Formula(DOMAIN, "home", text).scores(PROBABILITY, TENSORS)
    except FormulaError:
        return
    assert found.shape == (3,)
    assert np.isfinite(found).all()

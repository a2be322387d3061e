from __future__ import annotations

from dataclasses import replace

import pytest

from rewriter.check import check
from rewriter.ir import Effect, Error, Model, Value
from tests.rewriter.test_edit import INNER, OUTER, model


@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        (model(INNER.replace("Neg(x)", "Neg(y)")), "neg uses y, which does not exist"),
        (model(INNER.replace("y = neg", "y = gone")), "result y is gone"),
        (model(INNER.replace("Neg(x)", "Neg(neg)")), "neg depends on itself"),
        (model(INNER.replace("Neg(x)", "Neg(x) after(gone)")), "runs after gone"),
        (model(OUTER), "calls inner, which does not exist"),
        (model(OUTER.replace("Call(x)", "Call(x, x)"), INNER), "passes 2 inputs but Tin lists 1"),
        (model(INNER.replace("Neg(x)", "Neg(x:3)")), "output 3 of x"),
    ],
)
def test_what_is_wrong_is_said(before: Model, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        check(before)


def test_effects_and_captures() -> None:
    good = model(INNER, entries=("inner",))
    check(good)
    graph = replace(good.graphs["inner"], effects=(Effect("e", "gone"),))
    with pytest.raises(Error, match="effect e is gone"):
        check(replace(good, graphs={**good.graphs, "inner": graph}))
    entry = replace(good.entries["inner"], captures=("a variable",))
    with pytest.raises(Error, match="1 arguments for 1 inputs and 1 captures"):
        check(replace(good, entries={"inner": entry}))


def test_only_changed_graphs_are_checked_against_a_model_before() -> None:
    bad = model(INNER.replace("Neg(x)", "Neg(y)"))
    check(bad, bad)
    assert bad.graphs["inner"].nodes["neg"].inputs == (Value("y"),)

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from rewriter.edit import Edit, Note, Rewire, Skip
from rewriter.expr import Use
from rewriter.ir import Edge, Error, Model, Value
from rewriter.pipeline import Pipeline, Step, load_pass
from tests.rewriter.test_edit import INNER, model


@dataclass(frozen=True)
class Breaks:
    """A pass that uses an output that its node does not have."""

    def edits(self, _: Model) -> Iterable[Edit]:
        yield Rewire(Edge("inner", "", 0), Use("float32", Value("nothing")), "s")


@dataclass(frozen=True)
class Talks:
    """A pass that changes nothing, but skips a node and leaves a note."""

    def edits(self, _: Model) -> Iterable[Edit]:
        yield Skip("inner", "neg", "because")
        yield Note("noted")


class NoPass:
    """A class without `edits`, so not a pass."""


def test_the_pass_that_broke_the_model_is_named() -> None:
    with pytest.raises(Error, match=r"the pass Breaks left the model malformed: .*nothing, which does not exist"):
        Pipeline([Breaks()]).run(model(INNER))


def test_observers_see_every_step() -> None:
    observed: list[Step] = []
    before = model(INNER)
    after, steps = Pipeline([Talks(), Talks()], [observed.append]).run(before)
    assert observed == steps
    assert after.graphs == before.graphs
    assert [s.name for s in steps] == ["Talks", "Talks"]
    assert steps[0].skipped[0].reason == "because"
    assert steps[0].notes == ("noted",)


def test_a_pass_by_name() -> None:
    assert load_pass("tests.rewriter.test_pipeline:Talks") == Talks()


@pytest.mark.parametrize(
    "name",
    ["talks", "no.such.module:Talks", "tests.rewriter.test_pipeline:Gone", "tests.rewriter.test_pipeline:NoPass"],
)
def test_what_is_no_pass_is_refused(name: str) -> None:
    with pytest.raises(Error, match="pass"):
        load_pass(name)

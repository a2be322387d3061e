from __future__ import annotations

import pytest

from rewriter.ir import MAIN, Edge, Graph, Model, Value
from rewriter.liveness import Assumption
from rewriter.text import from_text

TEXT = """\
function choose() -> (y = out: float32) {
  mode = Placeholder() {dtype: bool}
  x = Placeholder() {dtype: float32}
  not = LogicalNot(mode)
  s = Switch(x, mode) {T: float32}
  trained = Neg(s:1) {T: float32}
  served = Abs(s) {T: float32}
  update = NoOp() after(trained)
  merged = Merge(served, trained) {N: 2, T: float32}
  chosen = SelectV2(not, x, merged) {T: float32}
  if = StatelessIf(mode, x) {Tin: proto "list { type: DT_FLOAT }", else_branch: @b, then_branch: @a}
  out = Add(chosen, if) {T: float32}
}
"""
GRAPHS = [from_text(TEXT)] + [
    from_text(f"function {n}(p: float32) -> (r = i: float32) {{\n  i = Identity(p) {{T: float32}}\n}}\n") for n in "ab"
]
MODEL = Model({MAIN: Graph(MAIN, {}), **{g.name: g for g in GRAPHS}})


def assume(**values: bool) -> Assumption:
    return Assumption(MODEL, MODEL.graphs["choose"], {Value(name): value for name, value in values.items()})


def test_nothing_is_dead_or_chosen_without_an_assumption() -> None:
    free = assume()
    assert not free.dead
    assert free.chosen(free.graph.nodes["merged"]) is None
    assert set(free.needed(["out"])) >= {"trained", "served", "mode"}
    assert free.called(["if"]) == {"a", "b"}


@pytest.mark.parametrize("mode", [True, False])
def test_an_assumed_mode_decides_switch_merge_select_and_branch(mode: bool) -> None:
    liveness = assume(mode=mode)
    living, dead = ("trained", "served") if mode else ("served", "trained")
    assert Value(dead) in liveness.dead
    assert liveness.runs(living)
    assert not liveness.runs(dead)
    assert liveness.runs("update") == mode  # by a control input
    assert liveness.chosen(liveness.graph.nodes["merged"]) == Value(living)
    assert liveness.chosen(liveness.graph.nodes["chosen"]) == (Value("merged") if mode else Value("x"))
    assert liveness.called(["if"]) == {"a" if mode else "b"}
    assert liveness.passes(Edge("a", "", 0)) == mode
    assert liveness.passes(Edge("choose", "chosen", 2)) == mode
    needed = set(liveness.needed(["out"]))
    assert dead not in needed
    assert (living in needed) == mode  # select takes x otherwise

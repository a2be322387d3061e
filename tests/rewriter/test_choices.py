from __future__ import annotations

from rewriter.choices import leaves, outside
from rewriter.ir import MAIN, Edge, Graph, Model, Value
from rewriter.text import from_text

MERGE = from_text("""\
function f(c: bool, a: float32, b: float32) -> (y = out: float32) {
  s = Switch(a, c) {T: float32}
  t = Switch(b, c) {T: float32}
  shaped = Reshape(t:1, c) {T: float32}
  merged = Merge(s, shaped) {N: 2, T: float32}
  out = Identity(merged) {T: float32}
}
""")
BRANCHES = from_text("""\
function g(c: bool, a: float32, b: float32) -> (y = if: float32) {
  if = StatelessIf(c, a, b) {else_branch: @second, then_branch: @first}
}
""")
FIRST = from_text("function first(p: float32, q: float32) -> (r = i: float32) {\n  i = Identity(p) {T: float32}\n}\n")
SECOND = from_text("function second(p: float32, q: float32) -> (r = n: float32) {\n  n = Neg(q) {T: float32}\n}\n")
MODEL = Model({MAIN: Graph(MAIN, {}), **{g.name: g for g in (MERGE, BRANCHES, FIRST, SECOND)}})


def test_merge_gives_each_input_with_an_edge_of_its_own() -> None:
    inputs = leaves(MODEL, Edge("f", "", 0), Value("out"))
    assert [(leaf.edge, leaf.value) for leaf in inputs] == [
        (Edge("f", "merged", 0), Value("a")),
        (Edge("f", "shaped", 0), Value("b")),  # before the change of shape
    ]


def test_branches_give_what_is_inside_or_passed_in() -> None:
    inside, outside = leaves(MODEL, Edge("g", "", 0), Value("if"))
    assert (inside.edge, inside.graph, inside.value) == (Edge("first", "", 0), "g", Value("a"))
    assert (outside.edge, outside.graph, outside.value) == (Edge("second", "", 0), "second", Value("n"))
    assert outside.calls == (("g", "if"),)


def test_an_argument_is_what_the_only_caller_passes() -> None:
    (leaf,) = leaves(MODEL, Edge("first", "", 0), Value("i"))
    assert (leaf.graph, leaf.value) == ("first", Value("p"))
    argument = outside(MODEL, leaf)
    assert (argument.edge, argument.graph, argument.value) == (leaf.edge, "g", Value("a"))
    assert outside(MODEL, argument) == argument  # nothing calls g


def test_a_loop_ends() -> None:
    graph = from_text("""\
function loop(a: float32) -> (y = merged: float32) {
  e = Enter(a) {T: float32, frame_name: "w"}
  merged = Merge(e, again) {N: 2, T: float32}
  again = NextIteration(merged) {T: float32}
}
""")
    model = Model({MAIN: Graph(MAIN, {}), "loop": graph})
    inputs = leaves(model, Edge("loop", "", 0), Value("merged"))
    assert [leaf.value for leaf in inputs] == [Value("a"), Value("again")]

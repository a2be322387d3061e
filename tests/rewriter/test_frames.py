from __future__ import annotations

from rewriter.apply import apply
from rewriter.edit import Duplicate, Rewire
from rewriter.expr import Use, constant
from rewriter.frames import frames
from rewriter.ir import MAIN, Edge, Graph, Model, Value
from rewriter.text import from_text

LOOP = from_text("""\
function f(x: float32, g: float32) -> (y = exit: float32) {
  enter = Enter(x) {T: float32, frame_name: "w", parallel_iterations: 7}
  merge = Merge(enter, next) {N: 2, T: float32}
  zero = Const() after(merge) {dtype: float32, value: proto "tensor { dtype: DT_FLOAT tensor_shape { } float_val: 9 }"}
  less = Less(merge, zero) {T: float32}
  cond = LoopCond(less)
  switch = Switch(merge, cond) {T: float32}
  body = Mul(switch:1, switch:1) {T: float32}
  next = NextIteration(body) {T: float32}
  exit = Exit(switch) {T: float32}
}
""")
MODEL = Model({MAIN: Graph(MAIN, {}), "f": LOOP})


def test_what_lies_between_enter_and_exit_lies_in_the_frame() -> None:
    frame_of = frames(LOOP)
    assert set(frame_of) == {"enter", "merge", "zero", "less", "cond", "switch", "body", "next"}
    assert set(frame_of.values()) == {("w",)}


def test_what_comes_from_outside_enters_once() -> None:
    value = Use("float32", Value("g")) * constant(2.0, "float32")
    edits = [Rewire(Edge("f", "body", 1), value, "s"), Rewire(Edge("f", "less", 0), value, "s")]
    graph = apply(MODEL, edits).graphs["f"]
    (entered,) = [n for n in graph.nodes.values() if n.op == "Enter" and n.name != "enter"]
    assert entered.inputs == (Value("s/Mul"),)
    assert (entered.attrs["frame_name"].s, entered.attrs["is_constant"].b) == (b"w", True)
    assert entered.attrs["parallel_iterations"].i == 7
    assert graph.nodes["body"].inputs[1] == graph.nodes["less"].inputs[0] == Value(entered.name)
    assert frames(graph).get("s/Mul") is None


def test_a_copied_loop_has_a_frame_of_its_own() -> None:
    graph = apply(MODEL, [Duplicate("f", (*frames(LOOP), "exit"), "copy")]).graphs["f"]
    assert graph.nodes["copy/enter"].attrs["frame_name"].s == b"copy/w"
    assert graph.nodes["copy/merge"].inputs == (Value("copy/enter"), Value("copy/next"))
    assert graph.nodes["copy/zero"].after == ("copy/merge",)


def test_a_damaged_loop_that_enters_itself_ends_the_search() -> None:
    """Enter, Identity, NextIteration and Enter again: a cycle that a file may hold."""
    names = frames(
        from_text("""\
function f(x: float32) -> (y = same: float32) {
  enter = Enter(next) {T: float32, frame_name: "w"}
  same = Identity(enter) {T: float32}
  next = NextIteration(same) {T: float32}
}
""")
    )
    assert names == {"enter": ("w",), "same": ("w",), "next": ("w",)}

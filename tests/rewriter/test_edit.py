"""Tests of edits on small graphs: text before, text after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rewriter import expr
from rewriter.apply import apply
from rewriter.check import check
from rewriter.edit import (
    AddResult,
    AddSignature,
    AddVariable,
    Clone,
    Define,
    Duplicate,
    Edit,
    Inline,
    MainSignature,
    Reorder,
    Replace,
    Rewire,
    Run,
    RunAfter,
    SetAttr,
)
from rewriter.expr import Function, Use, constant, handle, op, parameter, per_call, read
from rewriter.ir import MAIN, Edge, Entry, Error, Graph, Model, Node, Signature, Spec, Value, Variable
from rewriter.protos import Dtype, attr
from rewriter.text import from_text, to_text

STEP = Variable("step key", "step", "int64", (), path="step", initial=0)
INNER = """\
function inner(x: float32) -> (y = neg: float32) {
  neg = Neg(x) {T: float32}
}
"""
OUTER = """\
function outer(x: float32) -> (y = call: float32) {
  call = PartitionedCall(x) {Tin: proto "list { type: DT_FLOAT }", Tout: proto "list { type: DT_FLOAT }", f: @inner}
}
"""
ROOT = OUTER.replace("outer", "root").replace("inner", "outer")
BRANCHES = """\
function branches(c: bool, x: float32) -> (y = if: float32) {
  if = StatelessIf(c, x) {Tin: proto "list { type: DT_FLOAT }", else_branch: @other, then_branch: @inner}
}
"""
LOOP = """\
function loop(x: float32) -> (y = while: float32) {
  while = StatelessWhile(x) {T: proto "list { type: DT_FLOAT }", body: @inner, cond: @cond}
}
"""
COND = """\
function cond(x: float32) -> (go = less: bool) {
  zero = Const() {dtype: float32, value: proto "tensor { dtype: DT_FLOAT tensor_shape { } float_val: 0 }"}
  less = Less(x, zero) {T: float32}
}
"""


def model(*texts: str, entries: tuple[str, ...] = ()) -> Model:
    """Return a model with the given functions; `entries` are concrete functions without captures."""
    graphs = [from_text(t) for t in texts]
    entry_points = {}
    for graph in graphs:
        if graph.name in entries:
            specs = tuple(Spec(a, "float32", None) for a in graph.arguments)
            entry_points[graph.name] = Entry(graph.name, specs, (Spec("y", "float32", None),), ())
    return Model({MAIN: Graph(MAIN, {}), **{g.name: g for g in graphs}}, entries=entry_points)


def edited(before: Model, *edits: Edit) -> Model:
    after = apply(before, edits)
    check(after)
    return after


def doubled() -> Rewire:
    x = Use("float32", Value("neg"))
    return Rewire(Edge("inner", "", 0), x + x, "twice")


def test_rewire_places_an_expression() -> None:
    after = edited(model(INNER), doubled())
    assert to_text(after.graphs["inner"]) == (
        "function inner(x: float32) -> (y = twice/AddV2: float32) {\n"
        "  neg = Neg(x) {T: float32}\n"
        "  twice/AddV2 = AddV2(neg, neg) {T: float32}\n"
        "}\n"
    )


def test_an_expression_used_twice_is_placed_once() -> None:
    negated = op("Neg", Use("float32", Value("x")))
    edits = [Rewire(Edge("inner", "", 0), negated + negated, "s"), Rewire(Edge("inner", "neg", 0), negated, "s")]
    nodes = edited(model(INNER), *edits).graphs["inner"].nodes
    assert sorted(nodes) == ["neg", "s/AddV2", "s/Neg", "x"]


def test_graphs_without_edits_stay_the_same_objects() -> None:
    before = model(INNER, COND)
    after = edited(before, doubled())
    assert after.graphs["cond"] is before.graphs["cond"]
    assert after.graphs["inner"] is not before.graphs["inner"]


def test_an_effect_reaches_every_caller() -> None:
    before = model(INNER, OUTER, ROOT, entries=("root",))
    count = op("AssignAddVariableOp", handle(STEP), constant(1, "int64"))
    after = edited(before, AddVariable(STEP), Run("inner", count, "count"))
    for name in ("outer", "root"):
        graph = after.graphs[name]
        assert graph.nodes["call"].op == "StatefulPartitionedCall"
        assert [e.node for e in graph.effects] == ["call"]
        assert graph.stateful
    assert [e.node for e in after.graphs["inner"].effects] == ["count/AssignAddVariableOp"]


def test_a_variable_reaches_a_nested_function_through_all_callers() -> None:
    before = model(INNER, OUTER, ROOT, entries=("root",))
    value = op("Cast", read(STEP), DstT=Dtype("float32"))
    after = edited(before, AddVariable(STEP), Rewire(Edge("inner", "", 0), value, "s"))
    for name in ("inner", "outer", "root"):
        assert after.graphs[name].arguments == ("x", "step")
    assert after.entries["root"].captures == (STEP.key,)
    assert after.graphs["root"].nodes["call"].inputs == (("x", 0), ("step", 0))


def test_the_last_effect_waits_for_everything() -> None:
    count = op("AssignAddVariableOp", handle(STEP), constant(1, "int64"))
    after = edited(model(INNER), AddVariable(STEP), Run("inner", count, "count", last=True))
    assert after.graphs["inner"].nodes["count/AssignAddVariableOp"].after == ("neg",)


def test_a_per_call_value_is_computed_where_a_call_enters_and_passed_down() -> None:
    active = per_call("active", read(STEP) >= 3)
    chosen = expr.select(active, Use("float32", Value("neg")), Use("float32", Value("x")))
    before = model(INNER, OUTER, ROOT, entries=("root",))
    after = edited(before, AddVariable(STEP), Rewire(Edge("inner", "", 0), chosen, "s"))
    assert after.graphs["inner"].arguments == ("x", "active")
    assert after.graphs["outer"].arguments == ("x", "active")
    assert after.graphs["root"].arguments == ("x", "step")
    root = after.graphs["root"].nodes
    assert [n.op for n in root.values()].count("ReadVariableOp") == 1
    assert root["call"].inputs[1].node == "active/GreaterEqual"


def test_branches_of_an_if_get_the_same_arguments() -> None:
    other = INNER.replace("inner", "other")
    value = op("Cast", read(STEP), DstT=Dtype("float32"))
    before = model(INNER, other, BRANCHES, entries=("branches",))
    after = edited(before, AddVariable(STEP), Rewire(Edge("inner", "", 0), value, "s"))
    assert after.graphs["inner"].arguments == after.graphs["other"].arguments == ("x", "step")
    assert len(after.graphs["branches"].nodes["if"].inputs) == 3


def test_a_loop_carries_what_its_body_needs() -> None:
    value = op("Cast", read(STEP), DstT=Dtype("float32"))
    before = model(INNER, COND, LOOP, entries=("loop",))
    after = edited(before, AddVariable(STEP), Rewire(Edge("inner", "", 0), value, "s"))
    assert after.graphs["cond"].arguments == ("x", "step")
    assert [r.value.node for r in after.graphs["inner"].results] == ["s/Cast", "step"]
    assert len(after.graphs["loop"].nodes["while"].attrs["T"].list.type) == 2


def test_a_function_used_by_a_dataset_cannot_be_given_more() -> None:
    text = OUTER.replace("PartitionedCall", "MapDataset")
    value = op("Cast", read(STEP), DstT=Dtype("float32"))
    with pytest.raises(Error, match="other than a call"):
        apply(model(INNER, text), [AddVariable(STEP), Rewire(Edge("inner", "", 0), value, "s")])


def test_clones_call_clones() -> None:
    after = edited(model(INNER, OUTER), Clone("inner", "inner_2"), Clone("outer", "outer_2", {"inner": "inner_2"}))
    assert after.graphs["outer_2"].nodes["call"].attrs["f"].func.name == "inner_2"
    assert after.graphs["outer"].nodes["call"].attrs["f"].func.name == "inner"
    assert after.graphs["inner_2"] == replace(after.graphs["inner"], name="inner_2")


def test_a_defined_function_can_be_called() -> None:
    x = parameter("value", "float32")
    square = Function("square", (x,), ((4,),), (x * x,))
    after = edited(
        model(INNER), Define(square), Rewire(Edge("inner", "", 0), square(Use("float32", Value("neg"))), "s")
    )
    assert to_text(after.graphs["square"]) == (
        "function square(value: float32) -> (result = compute/Mul: float32) "
        '{_input_shapes: proto "list { shape { dim { size: 4 } } }"} {\n'
        "  compute/Mul = Mul(value, value) {T: float32}\n"
        "}\n"
    )
    assert after.graphs["inner"].nodes["s/PartitionedCall"].attrs["f"].func.name == "square"


def test_further_results_are_returned_in_the_order_that_is_wanted() -> None:
    before = model(INNER)
    added = AddResult("inner", "more", Use("float32", Value("x")), "more")
    after = apply(before, [Reorder("inner", (1, 0)), added])
    graph = after.graphs["inner"]
    assert [(r.name, r.value) for r in graph.results] == [("more", Value("x")), ("y", Value("neg"))]


def test_attributes_and_order() -> None:
    after = edited(model(INNER), SetAttr("inner", "neg", "_a", attr(1)), RunAfter("inner", "neg", ("x",)))
    assert after.graphs["inner"].nodes["neg"].attrs["_a"].i == 1
    assert after.graphs["inner"].nodes["neg"].after == ("x",)


@pytest.mark.parametrize(
    "edit",
    [
        Rewire(Edge("nowhere", "", 0), constant(1.0, "float32"), "s"),
        Rewire(Edge("inner", "nothing", 0), constant(1.0, "float32"), "s"),
        SetAttr("inner", "nothing", "a", None),
        Clone("inner", "outer"),
    ],
)
def test_an_edit_of_nothing_is_an_error(edit: Edit) -> None:
    with pytest.raises(Error):
        apply(model(INNER, OUTER), [edit])


def test_constants_of_equal_value_and_other_type_are_different() -> None:
    assert constant(1, "int64") is constant(1, "int64")
    assert constant(1, "float32") is not constant(True, "float32")


def test_copies_of_nodes_use_each_other_and_what_stands_instead() -> None:
    before = model(INNER.replace("neg = Neg(x)", "abs = Abs(x) {T: float32}\n  neg = Neg(abs) after(abs)"))
    instead = {Value("x"): Value("abs")}
    after = edited(before, Duplicate("inner", ("neg",), "copy", instead), Rewire(Edge("inner", "", 0), NEW, "s"))
    graph = after.graphs["inner"]
    assert graph.nodes["copy/neg"].inputs == (Value("abs"),)
    assert graph.nodes["copy/neg"].after == ("abs",)
    assert graph.results[0].value == Value("copy/neg")


NEW = Use("float32", Value("copy/neg"))


def test_a_node_becomes_another_op_under_its_name() -> None:
    after = edited(model(INNER), Replace("inner", "neg", op("Abs", Use("float32", Value("x")))))
    assert "  neg = Abs(x) {T: float32}\n" in to_text(after.graphs["inner"])


def test_a_call_is_inlined_with_its_effects() -> None:
    inner = """\
stateful function inner(x: float32) -> (y = neg: float32) {
  neg = Neg(x) {T: float32}
  check = CheckNumerics(neg) {T: float32, message: "m"}
  effect check = check
}
"""
    outer = OUTER.replace("}\n}", "}\n  last = NoOp() after(call)\n}")
    graph = edited(model(inner, outer), Inline("outer", "call", "inner")).graphs["outer"]
    assert "call" not in graph.nodes
    assert graph.results[0].value == Value("call/neg")
    assert graph.nodes["call/check"].inputs == (Value("call/neg"),)
    assert graph.nodes["last"].after == ("call/check", "call/neg")  # all that has run when the call has


def test_a_signature_of_the_main_graph_has_placed_outputs() -> None:
    x = Graph(MAIN, {"x": Node("x", "Placeholder", attrs={"dtype": attr(Dtype("float32"))})})
    serving = Signature("s", "", ("x",), ("y",), (Value("x"),), (Value("x"),), (SPEC, SPEC))
    before = Model({MAIN: x}, signatures={"s": serving}, object_based=False)
    after = edited(before, AddSignature("t", MainSignature("s", (op("Neg", Use("float32", Value("x"))),), "out")))
    assert after.main_signatures["t"].fetches == (Value("out/y/Neg"),)
    assert after.main_signatures["t"].like == "s"


SPEC = Spec("x", "float32", None)


def test_the_same_expression_is_a_call_or_inlined() -> None:
    value = parameter("value", "float32")
    twice = Function("twice", (value,), ((3,),), (value + value,))
    x = Use("float32", Value("x"))
    edits = [Rewire(Edge("inner", "", 0), twice.inlined(x, name="doubled", _tag="t"), "s")]
    graph = edited(model(INNER), *edits).graphs["inner"]
    assert graph.nodes["s/doubled"].inputs == (Value("x"), Value("x"))
    assert graph.nodes["s/doubled"].attrs["_tag"].s == b"t"

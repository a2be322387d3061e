from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter import protos
from rewriter.ir import Error, Graph, Node, Value
from rewriter.savedmodel.read import load
from rewriter.text import from_text, to_text

TEXT = """\
stateful function f(x: float32, handle: resource {_user_specified_name: "gamma"}) -> (y = bn: float32) {
  read = ReadVariableOp(handle) {dtype: float32}
  stats = Split(x) {num_split: 2}
  bn = Mul(read, stats:1) after(read) on "/cpu:0" {T: float32, _bnqat: "{\\"a\\": \\"x, y\\"}", big: true, e: 0.001}
  call = PartitionedCall(bn) {f: @g}
  effect call = call
}
"""


def plain(graph: Graph) -> Graph:
    """Return a graph without the parts that its text leaves out."""
    nodes = {n.name: replace(n, residue=b"") for n in graph.nodes.values()}
    results = tuple(r._replace(residue=b"") for r in graph.results)
    return replace(graph, nodes=nodes, results=results, residue=b"")


def test_text_is_what_it_was_read_from() -> None:
    assert to_text(from_text(TEXT)) == TEXT


def test_what_the_text_says() -> None:
    graph = from_text(TEXT)
    assert graph.name == "f"
    assert graph.stateful
    assert graph.arguments == ("x", "handle")
    assert graph.nodes["bn"].inputs == (("read", 0), ("stats", 1))
    assert graph.nodes["bn"].after == ("read",)
    assert graph.nodes["bn"].device == "/cpu:0"
    assert graph.effects == (("call", "call"),)
    assert graph.nodes["bn"].attrs["_bnqat"].s == b'{"a": "x, y"}'


@pytest.mark.parametrize("value", ["\\", "\\\\", '"', '\\"', "a, {b}", '", "'])
def test_any_string_survives_its_text(value: str) -> None:
    graph = from_text("function f(x: float32) -> (y = x: float32) {\n}\n")
    node = Node("n", "Identity", (Value("x"),), attrs={"a": protos.attr(value), "b": protos.attr(1)})
    graph = replace(graph, nodes={**graph.nodes, "n": node})
    assert from_text(to_text(graph)) == graph


@pytest.mark.parametrize("name", ["module_train", "keras_save"])
def test_every_graph_of_a_model_survives_its_text(name: str, model: Callable[[str], Path]) -> None:
    for graph in load(model(name)).graphs.values():
        assert plain(from_text(to_text(graph))) == plain(graph)


@pytest.mark.parametrize("line", ["bn = ", "bn = Mul(a", "effect", "= Mul(a)"])
def test_a_line_that_is_no_node_is_quoted(line: str) -> None:
    with pytest.raises(Error, match="no node"):
        from_text(f"function f() -> () {{\n  {line}\n}}")

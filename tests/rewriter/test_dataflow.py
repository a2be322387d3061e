from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter import ops, protos
from rewriter.dataflow import Argument, Computed, Origin, VariableKey, bindings, call_graph, origins
from rewriter.ir import Error, Node, Value
from rewriter.savedmodel.read import load
from tests.rewriter.test_edit import INNER, OUTER, ROOT, model


def test_an_argument_is_followed_through_calls() -> None:
    before = model(INNER, OUTER, ROOT, entries=("root",))
    assert origins(before, "inner", Value("x")) == {Argument("root", 0)}
    assert origins(before, "root", Value("call")) == {Computed("inner", "neg", "Neg")}


def test_reached_and_reaching() -> None:
    calls = model(INNER, OUTER, ROOT).analysis(call_graph)
    assert calls.reached("outer") == {"outer", "inner"}
    assert calls.reaching("inner") == {"outer", "root"}


def test_recursion_is_refused_by_name() -> None:
    with pytest.raises(Error, match="outer calls itself"):
        call_graph(model(OUTER.replace("@inner", "@outer")))


def test_variables_of_one_call_stay_together(model: Callable[[str], Path]) -> None:
    """A function shared by two batch norms has two bindings, not a mixture of eight variables."""
    read = load(model("module_shared"))
    all_bindings: set[tuple[Origin, ...]] = set()
    for graph in read.graphs.values():
        for node in graph.nodes.values():
            if node.op == "FusedBatchNormV3":
                all_bindings |= bindings(read, graph.name, node.inputs[1:5])
    keys = {tuple(o.key for o in origin if isinstance(o, VariableKey)) for origin in all_bindings}
    layers = {tuple(key.partition("/.ATTR")[0] for key in origin) for origin in keys if origin}
    assert layers == {
        tuple(f"norms/{i}/{role}" for role in ("gamma", "beta", "moving_mean", "moving_variance")) for i in range(2)
    }


def test_the_next_iteration_forwards_nothing_even_if_a_file_says_so() -> None:
    """Following forwarded values around a loop would never end."""
    node = Node("next", "NextIteration", (Value("enter"),), attrs={ops.STAND_IN: protos.attr("{}")})
    assert ops.forwarded(node, 0) is None
    assert ops.forwarded(replace(node, op="Identity"), 0) == Value("enter")

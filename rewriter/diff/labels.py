"""The names by which a reader knows things.

Functions go by what their author called them and by what runs them, nodes by the variable that they read or write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.ir import MAIN, Graph, Model, Value
from rewriter.liveness import Assumption

TRACED = re.compile(r"__(?:inference|forward|backward)_(.+)_(\d+)")
"""Name that `tf.function` gives a trace: the Python function's name and a running number."""

READS = ("Identity", "ReadVariableOp", "Variable", "VariableV2")


def function_labels(names: Iterable[str]) -> dict[str, str]:
    """Return a short label for each function: the Python function's name, and the trace's number if others share it."""
    parts = {name: TRACED.fullmatch(name) for name in names}
    counts = Counter(match[1] for match in parts.values() if match)
    return {
        name: name if match is None else match[1] if counts[match[1]] == 1 else f"{match[1]} {match[2]}"
        for name, match in parts.items()
    }


def users(model: Model) -> dict[str, list[str]]:
    """Return the signatures, and after them the functions of the model object, that run each graph, by its name."""
    entries = [(name, signature.entry) for name, signature in model.signatures.items()]
    # Paths with a dot lead to the functions of layers, and names with one underscore are private.
    entries += [
        (path, entry.function)
        for entry in model.entries.values()
        for path in entry.paths
        if "." not in path and (not path.startswith("_") or path == "__call__")
    ]
    calls = model.analysis(call_graph)
    users_of: dict[str, list[str]] = {}
    for name, graph in dict.fromkeys(entries):
        for reached in sorted(calls.reached(graph) | {graph}) if graph in model.graphs else ():
            if name not in users_of.setdefault(reached, []):
                users_of[reached].append(name)
    return users_of


def users_of_node(model: Model, graph: str, node: str, users_of: Mapping[str, list[str]]) -> list[str]:
    """Return the signatures and the functions of the model object that run a node, as far as its graph tells.

    In the main graph, a signature runs only what its outputs need.
    """
    if graph != MAIN:
        return users_of.get(graph, [])
    return [name for name, needed in model.analysis(_needed).items() if node in needed]


def _needed(model: Model) -> Mapping[str, Collection[str]]:
    """Return the nodes of the main graph that each of its signatures needs."""
    main = Assumption(model, model.graphs[MAIN], {})
    return {
        name: main.needed(value.node for value in signature.fetches)
        for name, signature in model.signatures.items()
        if not signature.entry
    }


def variable_of(model: Model, graph: Graph, name: str) -> str:
    """Return the name of the variable that a node reads or assigns; "" if it does neither, or for several variables."""
    node = graph.nodes[name]
    if node.op in READS:
        value = Value(name)
    elif node.op.startswith("Assign") and node.inputs:
        value = node.inputs[0]
    else:
        return ""
    (origin, *others) = origins(model, graph.name, value) or (None,)
    return model.variables[origin.key].name if isinstance(origin, VariableKey) and not others else ""

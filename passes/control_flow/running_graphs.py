"""The graphs that can run when a function does, with the facts that are known in them."""

from __future__ import annotations

from collections.abc import Mapping

from rewriter import op_defs, ops
from rewriter.dataflow import call_graph
from rewriter.ir import Graph, Model, Value
from rewriter.liveness import Assumption


def running_from(model: Model, function: str) -> Mapping[str, list[Assumption]]:
    """Return the graphs that can run when a function does, with the facts known in them.

    Branches that constants rule out are not among them: a serving function may call the one that takes the mode as an
    argument, with a constant.
    """
    memo = model.analysis(_run)
    if function not in memo:
        memo[function] = {}
        _running(model, function, {}, memo[function])
    return memo[function]


def _run(_: Model) -> dict[str, dict[str, list[Assumption]]]:
    """Return a memo for `running_from`, by function: empty at first."""
    return {}


def _running(model: Model, name: str, known: Mapping[Value, bool], assumptions: dict[str, list[Assumption]]) -> None:
    """Collect the graphs that run, where some boolean arguments of a function are known."""
    graph = model.graphs[name]
    assumption = Assumption(model, graph, known)
    if any(other.values == known for other in assumptions.setdefault(name, [])):
        return
    assumptions[name].append(assumption)
    for node in dict.fromkeys(call.node for call in model.analysis(call_graph).calls.get(name, [])):
        call = graph.nodes[node]
        form = ops.call_form_of(model, call)
        known_inputs = [assumption.known(v) if _boolean(model, graph, v) else None for v in call.inputs[form.first :]]
        for callee in assumption.taken(call):
            arguments = model.graphs[callee].arguments
            # A loop may change its booleans from round to round.
            inner = {
                Value(a): v for a, v in zip(arguments, known_inputs, strict=True) if v is not None and not form.carried
            }
            _running(model, callee, inner, assumptions)


def _boolean(model: Model, graph: Graph, value: Value) -> bool:
    return op_defs.output_dtype(model, graph, value) == "bool"

"""The training functions that a rewrite adds: their names, those that count steps, and those of the second phase."""

from __future__ import annotations

from passes.quantization.controls import step
from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.ir import Model

# From names of this form, TensorFlow's loader strips the prefix and the number.
TRAIN = "__inference_bnqat_train_0"
TRAIN_SIGNATURE = "__inference_bnqat_train_signature_0"
SERVE = "__inference_bnqat_serve_0"
"""Names of the functions that a rewrite adds."""

FROZEN = "_frozen"
"""Suffix of the names of the functions in which training normalises with frozen statistics."""


COUNTING = ("AssignAddVariableOp", "AssignAdd")
"""Ops that count a step."""


def counting(model: Model) -> frozenset[str]:
    """Return the functions that count a training step, themselves or by a function that they call."""
    key = VariableKey(step(model).key)
    calls = model.analysis(call_graph)
    counters = [
        graph.name
        for graph in model.graphs.values()
        if any(n.op in COUNTING and key in origins(model, graph.name, n.inputs[0]) for n in graph.nodes.values())
    ]
    return frozenset().union(*(calls.reaching(name) for name in counters)) | frozenset(counters)


def frozen(model: Model) -> frozenset[str]:
    """Return the functions of the second phase alone, and those that only call its root."""
    calls = model.analysis(call_graph)
    prefixes = tuple(f"{name}{FROZEN}" for name in (TRAIN, TRAIN_SIGNATURE))
    return frozenset().union(*(calls.reached(name) for name in model.graphs if name.startswith(prefixes)))

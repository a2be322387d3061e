"""The correspondence of the inputs and outputs of two concrete functions."""

from __future__ import annotations

import re
from typing import NamedTuple

from rewriter import ops
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Entry, Model, Spec, Value


class Alignment(NamedTuple):
    """The order in which one function's inputs and outputs are those of another."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def align(model: Model, entry: Entry, like: Entry) -> Alignment | None:
    """Return the alignment of `entry` with the inputs and outputs of `like`; None where it is not clear.

    Inputs are told apart by name. Outputs are told apart by name, or else by the layer that computes them:
    Keras names a signature's outputs after their layers, and nothing else.
    """
    inputs = _by_name(entry.inputs, like.inputs)
    outputs = _by_name(entry.outputs, like.outputs)
    if outputs is None and len(entry.outputs) == len(like.outputs):
        scopes = [_scopes(model, entry.function, r.value) for r in model.graphs[entry.function].results]
        candidates = [[i for i, scope in enumerate(scopes) if _plain(s.name) in scope] for s in like.outputs]
        if all(len(f) == 1 for f in candidates) and len({f[0] for f in candidates}) == len(candidates):
            outputs = tuple(f[0] for f in candidates)
    if inputs is None or outputs is None:
        return None
    fits = [_fits(entry.inputs[i], s) for i, s in zip(inputs, like.inputs, strict=True)]
    fits += [_fits(entry.outputs[i], s) for i, s in zip(outputs, like.outputs, strict=True)]
    return Alignment(inputs, outputs) if all(fits) else None


def _fits(a: Spec, b: Spec) -> bool:
    """Return true if two specs have the same dtype, and the same shape where both are known."""
    return a.dtype == b.dtype and (a.shape == b.shape or a.shape is None or b.shape is None)


def _by_name(specs: tuple[Spec, ...], like: tuple[Spec, ...]) -> tuple[int, ...] | None:
    """Return the positions in `specs` of the specs of `like`, by name; None where names do not tell."""
    if len(specs) != len(like):
        return None
    if len(specs) == 1:
        return (0,)
    names = [s.name for s in specs]
    if len(set(names)) != len(names) or set(names) != {s.name for s in like}:
        return None
    return tuple(names.index(s.name) for s in like)


def _plain(name: str) -> str:
    """Return a layer's name as a spec has it: TensorFlow puts an underscore for what an identifier cannot hold."""
    return re.sub(r"\W", "_", name)


def _scopes(model: Model, graph: str, value: Value) -> set[str]:
    """Return the parts of the names of the nodes that a value comes from, through forwarding ops and calls."""
    scopes: set[str] = set()
    while True:
        node = model.graphs[graph].nodes[value.node]
        scopes |= {_plain(part) for part in node.name.split("/")}
        called = ops.callees(model, node)
        if len(called) == 1:
            graph, value = called[0], model.graphs[called[0]].results[value.port].value
            continue
        passed = ops.forwarded(node, value.port)
        if passed is None:
            return scopes
        value = passed


def capturable(model: Model, entry: Entry) -> bool:
    """Return true if the main graph has all that a function captures, so that a signature can compute it.

    It has every variable, and of other objects those that its signatures use already.
    """
    calls = model.analysis(call_graph).calls.get(MAIN, [])
    available = {c for call in calls if call.callee in model.entries for c in model.entries[call.callee].captures}
    return all(isinstance(c, str) or c in available for c in entry.captures)

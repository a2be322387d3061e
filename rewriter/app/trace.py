"""Python functions as graphs: TensorFlow traces and saves them, and they are read like any other model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from passes.quantization.custom import QuantizeFunction, Traced, TraceRequest
from rewriter import op_defs, ops, protos
from rewriter.dataflow import call_graph, gradient_kinds
from rewriter.ir import Error, Gradient, Graph, Model, Node
from rewriter.savedmodel.read import load


def import_function(name: str) -> QuantizeFunction:
    """Return the function that ``module:function`` names.

    Raises:
        Error: there is no such function, or it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        target: Any = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as e:
        raise Error(f"there is no {name}: {type(e).__name__}: {_first_line(e)}") from e
    if not callable(target):
        raise Error(f"{name} is no function")
    function: QuantizeFunction = target
    return function


def title(function: QuantizeFunction) -> str:
    """Return the name of a function for use in a sentence."""
    plain = getattr(function, "python_function", function)
    return getattr(plain, "__qualname__", None) or type(plain).__name__


def trace(requests: Sequence[TraceRequest]) -> Traced:
    """Return the graphs of functions (value, context) -> value, float32 of one shape; equal functions share one.

    Raises:
        Error: a function fails, holds variables or ops with effects, or returns something else.
    """
    import tensorflow as tf

    module = tf.Module()
    for number, request in enumerate(requests):
        setattr(module, f"pipeline_{number}", _concrete(request))
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
            tf.saved_model.save(module, folder, options=options)
        except (AssertionError, ValueError, tf.errors.OpError) as e:
            raise Error(f"the pipeline {title(requests[0].function)} cannot be saved: {_first_line(e)}") from e
        model = load(Path(folder))
    names: dict[TraceRequest, str] = {}
    graphs: dict[str, Graph] = {}
    gradients: dict[str, Gradient] = {}
    for number, request in enumerate(requests):
        (entry,) = model.root_entries(f"pipeline_{number}")
        moved_graphs, registered = _renamed_graphs(model, entry.function, f"bnqat_pipeline_{number}")
        _refuse_effects(request, moved_graphs.values())
        _refuse_captures(request, registered.values())
        top, *helpers = moved_graphs.values()
        twin = None if helpers else next((g for g in graphs.values() if _same_but_names(g, top)), None)
        names[request] = (twin or top).name
        if twin is None:
            graphs |= moved_graphs
            gradients |= registered
    return Traced(names, graphs, gradients)


def _concrete(request: TraceRequest) -> Any:
    """Return the `tf.function` of a request, traced for its shape and context."""
    import tensorflow as tf

    def pipeline(vector: Any) -> Any:
        return request.function(vector, request.context)

    name, spec = title(request.function), tf.TensorSpec(request.shape, tf.float32, "vector")
    place = f"for {request.context.role} of {request.context.layer}"
    function = tf.function(pipeline, input_signature=[spec])
    try:
        concrete = function.get_concrete_function()
    except Exception as e:
        raise Error(f"the pipeline {name} fails {place}: {type(e).__name__}: {_first_line(e)}") from e
    result = concrete.structured_outputs
    if not isinstance(result, tf.Tensor | tf.TensorSpec):
        raise Error(f"the pipeline {name} gives no tensor {place}, but {result!r}")
    if result.dtype != tf.float32 or result.shape != tf.TensorShape(request.shape):
        raise Error(
            f"the pipeline {name} gives {result.dtype.name} {result.shape} {place}, and not float32 "
            f"{list(request.shape)}"
        )
    if concrete.captured_inputs:
        raise Error(
            f"the pipeline {name} uses a variable or tensor from outside; make numbers of them, which become constants"
        )
    return function


def _renamed_graphs(model: Model, function: str, prefix: str) -> tuple[dict[str, Graph], dict[str, Gradient]]:
    """Return a function and those that it needs, renamed, itself first; and the gradients among them."""
    needed = _needed(model, function)
    names = {old: prefix if index == 0 else f"{prefix}_{index}" for index, old in enumerate(needed)}
    kinds = {
        k: f"{prefix}_gradient_{i}" for i, k in enumerate(k for k, g in model.gradients.items() if g.function in names)
    }
    graphs = {}
    for old, new in names.items():
        nodes = {name: _renamed(node, names, kinds) for name, node in model.graphs[old].nodes.items()}
        graphs[new] = replace(model.graphs[old], name=new, nodes=nodes)
    gradients = {new: model.gradients[old] for old, new in kinds.items()}
    return graphs, {kind: g._replace(function=names[g.function]) for kind, g in gradients.items()}


def _needed(model: Model, function: str) -> list[str]:
    """Return a function and all functions that it calls or is differentiated with, itself first."""
    waiting, needed = [function], list[str]()
    while waiting:
        name = waiting.pop(0)
        if name not in needed:
            needed.append(name)
            waiting += sorted(model.analysis(call_graph).reached(name) - {name})
            kinds = gradient_kinds(model.graphs[name])
            waiting += [model.gradients[kind].function for kind in kinds if kind in model.gradients]
    return needed


def _renamed(node: Node, names: Mapping[str, str], kinds: Mapping[str, str]) -> Node:
    attrs = {k: protos.with_functions(v, names) for k, v in node.attrs.items()}
    if ops.GRADIENT in attrs and attrs[ops.GRADIENT].s.decode() in kinds:
        attrs[ops.GRADIENT] = protos.attr(kinds[attrs[ops.GRADIENT].s.decode()])
    return replace(node, op=names.get(node.op, node.op), attrs=attrs)


def _refuse_effects(request: TraceRequest, graphs: Iterable[Graph]) -> None:
    for node in (node for graph in graphs for node in graph.nodes.values()):
        definition = op_defs.registered(node.op)
        if definition is not None and definition.is_stateful and node.op not in ops.CALLS:
            raise Error(
                f"the pipeline {title(request.function)} uses {node.op}, which has effects or differs from call to "
                "call and cannot be part of a quantiser"
            )


def _refuse_captures(request: TraceRequest, gradients: Iterable[Gradient]) -> None:
    # Quantisers run in branches, and TensorFlow passes a gradient function no tensors of a branch.
    if any(gradient.signature is not None and gradient.signature.bound_inputs for gradient in gradients):
        raise Error(
            f"the gradient function in the pipeline {title(request.function)} uses tensors other than its own "
            "arguments and cannot be part of a quantiser; write v + tf.stop_gradient(f(v) - v), with tf.clip_by_value "
            "before it where the gradient is to be 0"
        )


def _same_but_names(one: Graph, other: Graph) -> bool:
    """Return true if two functions are equal but for their names."""
    return replace(one, name="") == replace(other, name="")


def _first_line(e: Exception) -> str:
    lines = [line for line in str(e).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""

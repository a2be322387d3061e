"""Python functions as graphs: traced by TensorFlow, saved, and read like any other model."""

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


def named(name: str) -> QuantizeFunction:
    """A function by ``module:function``.

    Raises:
        Error: there is none, or it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as e:
        raise Error(f"there is no {name}: {type(e).__name__}: {_first_line(e)}") from e
    if not callable(found):
        raise Error(f"{name} is no function")
    function: QuantizeFunction = found
    return function


def title(function: QuantizeFunction) -> str:
    """What a function is called in a sentence."""
    plain = getattr(function, "python_function", function)
    return getattr(plain, "__qualname__", None) or type(plain).__name__


def trace(wanted: Sequence[TraceRequest]) -> Traced:
    """The graphs of functions (float32 [size], context) -> float32 [size]; equal ones are one.

    Raises:
        Error: a function fails, holds variables or ops with effects, or gives something else.
    """
    import tensorflow as tf

    module = tf.Module()
    for number, each in enumerate(wanted):
        setattr(module, f"pipeline_{number}", _concrete(each))
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
            tf.saved_model.save(module, folder, options=options)
        except (AssertionError, ValueError, tf.errors.OpError) as e:
            raise Error(f"the pipeline {title(wanted[0].function)} cannot be saved: {_first_line(e)}") from e
        model = load(Path(folder))
    names: dict[TraceRequest, str] = {}
    graphs: dict[str, Graph] = {}
    gradients: dict[str, Gradient] = {}
    for number, each in enumerate(wanted):
        (entry,) = model.root_entries(f"pipeline_{number}")
        own, registered = _moved(model, entry.function, f"bnqat_pipeline_{number}")
        _refuse_effects(each, own.values())
        _refuse_captures(each, registered.values())
        top, *others = own.values()
        twin = None if others else next((g for g in graphs.values() if _alike(g, top)), None)
        names[each] = (twin or top).name
        if twin is None:
            graphs |= own
            gradients |= registered
    return Traced(names, graphs, gradients)


def _concrete(wanted: TraceRequest) -> Any:
    """The traced function for a size and a context."""
    import tensorflow as tf

    def pipeline(vector: Any) -> Any:
        return wanted.function(vector, wanted.context)

    name, spec = title(wanted.function), tf.TensorSpec([wanted.size], tf.float32, "vector")
    place = f"for {wanted.context.role} of {wanted.context.layer}"
    function = tf.function(pipeline, input_signature=[spec])
    try:
        concrete = function.get_concrete_function()
    except Exception as e:
        raise Error(f"the pipeline {name} fails {place}: {type(e).__name__}: {_first_line(e)}") from e
    result = concrete.structured_outputs
    if not isinstance(result, tf.Tensor | tf.TensorSpec):
        raise Error(f"the pipeline {name} gives no tensor {place}, but {result!r}")
    if result.dtype != tf.float32 or result.shape.rank != 1 or result.shape[0] != wanted.size:
        raise Error(
            f"the pipeline {name} gives {result.dtype.name} {result.shape} {place}, and not float32 [{wanted.size}]"
        )
    if concrete.captured_inputs:
        raise Error(
            f"the pipeline {name} uses a variable or tensor from outside; make numbers of them, which become constants"
        )
    return function


def _moved(model: Model, function: str, prefix: str) -> tuple[dict[str, Graph], dict[str, Gradient]]:
    """A function and what it needs, under new names, itself first; and the gradient functions among them."""
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
    """A function and all that it calls or is differentiated with, itself first."""
    waiting, found = [function], list[str]()
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += sorted(model.analysis(call_graph).reached(name) - {name})
            kinds = gradient_kinds(model.graphs[name])
            waiting += [model.gradients[kind].function for kind in kinds if kind in model.gradients]
    return found


def _renamed(node: Node, names: Mapping[str, str], kinds: Mapping[str, str]) -> Node:
    attrs = {k: protos.with_functions(v, names) for k, v in node.attrs.items()}
    if ops.GRADIENT in attrs and attrs[ops.GRADIENT].s.decode() in kinds:
        attrs[ops.GRADIENT] = protos.attr(kinds[attrs[ops.GRADIENT].s.decode()])
    return replace(node, op=names.get(node.op, node.op), attrs=attrs)


def _refuse_effects(wanted: TraceRequest, graphs: Iterable[Graph]) -> None:
    for node in (node for graph in graphs for node in graph.nodes.values()):
        definition = op_defs.registered(node.op)
        if definition is not None and definition.is_stateful and node.op not in ops.CALLS:
            raise Error(
                f"the pipeline {title(wanted.function)} uses {node.op}, which has effects or differs from call to call "
                "and cannot be part of a quantiser"
            )


def _refuse_captures(wanted: TraceRequest, gradients: Iterable[Gradient]) -> None:
    # Quantisers run in branches, of which TensorFlow gives a gradient function no tensors.
    if any(gradient.signature is not None and gradient.signature.bound_inputs for gradient in gradients):
        raise Error(
            f"the gradient function in the pipeline {title(wanted.function)} uses tensors other than its own arguments "
            "and cannot be part of a quantiser; write v + tf.stop_gradient(f(v) - v), with tf.clip_by_value before it "
            "where the gradient is to be 0"
        )


def _alike(one: Graph, other: Graph) -> bool:
    """Whether two functions are equal but for their names."""
    return replace(one, name="") == replace(other, name="")


def _first_line(e: Exception) -> str:
    lines = [line for line in str(e).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""

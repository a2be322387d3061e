"""Tensors that gradient functions take from the function which they differentiate.

An op with a gradient of its own (``tf.custom_gradient``, as in ``tf.nn.silu`` and ``tf.recompute_grad``) names it in an
attribute. What the gradient function captures are objects of the kind ``captured_tensor``: a tensor by name, and the
function that computes it. A copy of that function needs a gradient function that takes the copy's tensors; and where
passes gave the op another input, its gradient takes that one, too.

Source: ``tensorflow/core/protobuf/saved_object_graph.proto``, and ``_trace_gradient_functions`` in
``tensorflow/python/saved_model/save.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rewriter import ops, protos
from rewriter.dataflow import gradient_kinds
from rewriter.ir import Error, Gradient, Graph, Model, Node, Value, unused
from rewriter.savedmodel.graphs import main_value
from rewriter.savedmodel.objects import make_user_object


def renumbered(gradient: Gradient, moved: Mapping[int, int]) -> Gradient:
    """A gradient that captures objects of other numbers; what is not moved keeps its own."""
    if gradient.signature is None:
        return gradient
    signature = type(gradient.signature).FromString(gradient.signature.SerializeToString())
    signature.bound_inputs[:] = [moved.get(n, n) for n in gradient.signature.bound_inputs]
    return gradient._replace(signature=signature)


def recapture(model: Model, objects: Any) -> Model:
    """Let every gradient function take tensors of the function that holds its op.

    Args:
        model: as it is to be written.
        objects: its object graph, to which captured tensors are added.

    Returns:
        The model with the gradient functions that copies of ops need.

    Raises:
        Error: a pass removed what a gradient function takes.
    """
    numbers = {n for n, node in enumerate(objects.nodes) if node.WhichOneof("kind") == "captured_tensor"}
    if not numbers:
        return model
    work = _Recapture(model, objects, {n: objects.nodes[n].captured_tensor for n in numbers})
    waiting = list(model.graphs)
    while waiting:
        waiting += work.visit(waiting.pop(0))
    work.forget()
    return replace(model, graphs=work.graphs, gradients=work.gradients, entries=work.entries)


@dataclass
class _Recapture:
    """What is done to a model's graphs and gradients.

    Attributes:
        tensors: captured tensors as the source had them, by number.
        made: the kinds of copied gradients, by kind, graph, and what is captured.
        source: ops of the source's functions by kind, as far as they were looked for.
    """

    model: Model
    objects: Any
    tensors: dict[int, Any]
    made: dict[tuple[str, str, tuple[Value, ...]], str] = field(default_factory=dict)
    source: dict[str, dict[str, Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graphs, self.gradients = dict(self.model.graphs), dict(self.model.gradients)
        self.entries = dict(self.model.entries)
        self.tensors = {n: type(held).FromString(held.SerializeToString()) for n, held in self.tensors.items()}

    def visit(self, name: str) -> list[str]:
        """Look after the ops of one graph; the gradient functions that were copied for it."""
        copied, nodes = [], dict(self.graphs[name].nodes)
        for node in self.graphs[name].nodes.values():
            kind = protos.text(node.attrs[ops.GRADIENT].s) if ops.GRADIENT in node.attrs else ""
            gradient = self.gradients.get(kind)
            taken = [] if gradient is None or gradient.signature is None else gradient.signature.bound_inputs
            held = {n: self._now(name, node, kind, self.tensors[n]) for n in taken if n in self.tensors}
            if gradient is None or all((name, value) == _said(self.tensors[n]) for n, value in held.items()):
                continue
            if all(self.tensors[n].concrete_function == name for n in held) and kind not in self.made.values():
                for n, value in held.items():
                    self.objects.nodes[n].captured_tensor.name = f"{value.node}:{value.port}"
                continue
            key = (kind, name, tuple(held.values()))
            if key not in self.made:
                self.made[key] = self._copy(kind, gradient, name, held)
                copied.append(self.gradients[self.made[key]].function)
            nodes[node.name] = replace(node, attrs={**node.attrs, ops.GRADIENT: protos.attr(self.made[key])})
        if copied:
            self.graphs[name] = replace(self.graphs[name], nodes=nodes)
        return copied

    def _now(self, graph: str, node: Node, kind: str, tensor: Any) -> Value:
        """What a captured tensor is for a node: what the node takes where the source's took that tensor."""
        function, value = _said(tensor)
        before = self._before(function).get(kind)
        if before is not None and value in before.inputs:
            position = before.inputs.index(value)
            if position < len(node.inputs):
                return node.inputs[position]
        if value.node not in self.graphs[graph].nodes:
            raise Error(
                f"the gradient of {node.name} in {graph} takes {tensor.name} of {function}, which was rewritten; leave "
                "that batch norm out, or save the model without experimental_custom_gradients"
            )
        return value

    def _before(self, function: str) -> dict[str, Node]:
        """The ops of a function in the source that have a gradient of their own, by kind."""
        if function not in self.source:
            graph: Graph | None = self.model.source.protos.get(function, (None, None))[0]
            nodes = [] if graph is None else [n for n in graph.nodes.values() if ops.GRADIENT in n.attrs]
            self.source[function] = {protos.text(n.attrs[ops.GRADIENT].s): n for n in reversed(nodes)}
        return self.source[function]

    def _copy(self, kind: str, gradient: Gradient, graph: str, held: dict[int, Value]) -> str:
        """A copy of a gradient for ops of a graph; its kind."""
        function = unused(f"{gradient.function}_of_{graph}", self.graphs)
        numbers = {number: self._tensor(graph, value) for number, value in held.items()}
        self.graphs[function] = replace(self.graphs[gradient.function], name=function)
        copy = unused(f"{kind}_of_{graph}", self.gradients)
        self.gradients[copy] = renumbered(gradient, numbers)._replace(function=function)
        return copy

    def _tensor(self, graph: str, value: Value) -> int:
        tensor = self.objects.nodes.add().captured_tensor
        tensor.name, tensor.concrete_function = f"{value.node}:{value.port}", graph
        return len(self.objects.nodes) - 1

    def forget(self) -> None:
        """Take out gradients that capture tensors, and are those of no op any more."""
        kinds = {kind for graph in self.graphs.values() for kind in gradient_kinds(graph)}
        used: set[int] = set()
        for kind, gradient in list(self.gradients.items()):
            taken = set() if gradient.signature is None else set(gradient.signature.bound_inputs)
            if kind in kinds or taken.isdisjoint(self.tensors):
                used |= taken
            else:
                del self.gradients[kind]
                self.graphs.pop(gradient.function, None)
                self.entries.pop(gradient.function, None)
                self.objects.concrete_functions.pop(gradient.function, None)
        for number in self.tensors.keys() - used:
            make_user_object(self.objects.nodes[number])  # it keeps its number, which others count on


def _said(tensor: Any) -> tuple[str, Value]:
    return tensor.concrete_function, main_value(tensor.name)

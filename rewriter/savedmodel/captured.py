"""Tensors that custom gradient functions capture from the function that they differentiate.

An op with a custom gradient (``tf.custom_gradient``, as in ``tf.nn.silu`` and ``tf.recompute_grad``) names it in an
attribute. The gradient function's captures are objects of the kind ``captured_tensor``: a tensor's name, and the
function that computes it. If that function is copied, the copy needs a gradient function that captures the copy's
tensors. If a pass gave the op another input, the gradient must capture that input, too.

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


def renumbered(gradient: Gradient, new_numbers: Mapping[int, int]) -> Gradient:
    """Return a gradient whose captures have new object numbers; a number that is not in the mapping stays."""
    if gradient.signature is None:
        return gradient
    signature = type(gradient.signature).FromString(gradient.signature.SerializeToString())
    signature.bound_inputs[:] = [new_numbers.get(n, n) for n in gradient.signature.bound_inputs]
    return gradient._replace(signature=signature)


def recapture(model: Model, objects: Any) -> Model:
    """Make every gradient function capture tensors of the function that holds its op.

    Args:
        model: the model to write.
        objects: its object graph, to which captured tensors are added.

    Returns:
        The model with the gradient functions that copies of ops need.

    Raises:
        Error: a pass removed a tensor that a gradient function captures.
    """
    numbers = {n for n, node in enumerate(objects.nodes) if node.WhichOneof("kind") == "captured_tensor"}
    if not numbers:
        return model
    work = _Recapture(model, objects, {n: objects.nodes[n].captured_tensor for n in numbers})
    waiting = list(model.graphs)
    while waiting:
        # A copied gradient function may itself hold ops whose gradients capture its tensors.
        waiting += work.visit(waiting.pop(0))
    work.remove_unused()
    return replace(model, graphs=work.graphs, gradients=work.gradients, entries=work.entries)


@dataclass
class _Recapture:
    """A model's graphs and gradients while their captures are replaced.

    Attributes:
        tensors: the captured tensors of the source, by object number.
        copies: the kind of each copied gradient, by its original's kind, the graph, and the captured values.
        ops_by_function: ops with a custom gradient in the source's functions, by kind; a cache.
    """

    model: Model
    objects: Any
    tensors: dict[int, Any]
    copies: dict[tuple[str, str, tuple[Value, ...]], str] = field(default_factory=dict)
    ops_by_function: dict[str, dict[str, Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graphs, self.gradients = dict(self.model.graphs), dict(self.model.gradients)
        self.entries = dict(self.model.entries)
        self.tensors = {n: type(tensor).FromString(tensor.SerializeToString()) for n, tensor in self.tensors.items()}

    def visit(self, name: str) -> list[str]:
        """Update the gradients of one graph's ops; return the gradient functions that were copied for it.

        If all captures are of this graph and the gradient is not a copy itself, the captured tensors are edited in
        place. Otherwise the graph gets a copy of the gradient, and its op names the copy's kind.
        """
        copied_functions, nodes = [], dict(self.graphs[name].nodes)
        for node in self.graphs[name].nodes.values():
            kind = protos.text(node.attrs[ops.GRADIENT].s) if ops.GRADIENT in node.attrs else ""
            gradient = self.gradients.get(kind)
            captures = [] if gradient is None or gradient.signature is None else gradient.signature.bound_inputs
            values = {n: self._current_value(name, node, kind, self.tensors[n]) for n in captures if n in self.tensors}
            if gradient is None or all(
                (name, value) == _function_and_value(self.tensors[n]) for n, value in values.items()
            ):
                continue
            if all(self.tensors[n].concrete_function == name for n in values) and kind not in self.copies.values():
                for n, value in values.items():
                    self.objects.nodes[n].captured_tensor.name = f"{value.node}:{value.port}"
                continue
            key = (kind, name, tuple(values.values()))
            if key not in self.copies:
                self.copies[key] = self._copy(kind, gradient, name, values)
                copied_functions.append(self.gradients[self.copies[key]].function)
            nodes[node.name] = replace(node, attrs={**node.attrs, ops.GRADIENT: protos.attr(self.copies[key])})
        if copied_functions:
            self.graphs[name] = replace(self.graphs[name], nodes=nodes)
        return copied_functions

    def _current_value(self, graph: str, node: Node, kind: str, tensor: Any) -> Value:
        """Return the value that takes a captured tensor's place for a node.

        If the source's op takes the tensor as an input, that is the node's input in the same position.
        """
        function, value = _function_and_value(tensor)
        source_node = self._source_ops(function).get(kind)
        if source_node is not None and value in source_node.inputs:
            position = source_node.inputs.index(value)
            if position < len(node.inputs):
                return node.inputs[position]
        if value.node not in self.graphs[graph].nodes:
            raise Error(
                f"the gradient of {node.name} in {graph} takes {tensor.name} of {function}, which was rewritten; leave "
                "that batch norm out, or save the model without experimental_custom_gradients"
            )
        return value

    def _source_ops(self, function: str) -> dict[str, Node]:
        """Return the ops with a custom gradient in a function of the source, by kind."""
        if function not in self.ops_by_function:
            graph: Graph | None = self.model.source.protos.get(function, (None, None))[0]
            nodes = [] if graph is None else [n for n in graph.nodes.values() if ops.GRADIENT in n.attrs]
            # Reversed, so that the first of several ops of one kind stays in the dict.
            self.ops_by_function[function] = {protos.text(n.attrs[ops.GRADIENT].s): n for n in reversed(nodes)}
        return self.ops_by_function[function]

    def _copy(self, kind: str, gradient: Gradient, graph: str, values: dict[int, Value]) -> str:
        """Copy a gradient for the ops of a graph, and return the copy's kind."""
        function = unused(f"{gradient.function}_of_{graph}", self.graphs)
        numbers = {number: self._new_captured_tensor(graph, value) for number, value in values.items()}
        self.graphs[function] = replace(self.graphs[gradient.function], name=function)
        copy = unused(f"{kind}_of_{graph}", self.gradients)
        self.gradients[copy] = renumbered(gradient, numbers)._replace(function=function)
        return copy

    def _new_captured_tensor(self, graph: str, value: Value) -> int:
        tensor = self.objects.nodes.add().captured_tensor
        tensor.name, tensor.concrete_function = f"{value.node}:{value.port}", graph
        return len(self.objects.nodes) - 1

    def remove_unused(self) -> None:
        """Remove gradients that capture tensors and that no op names any more."""
        kinds = {kind for graph in self.graphs.values() for kind in gradient_kinds(graph)}
        used: set[int] = set()
        for kind, gradient in list(self.gradients.items()):
            captures = set() if gradient.signature is None else set(gradient.signature.bound_inputs)
            if kind in kinds or captures.isdisjoint(self.tensors):
                used |= captures
            else:
                del self.gradients[kind]
                self.graphs.pop(gradient.function, None)
                self.entries.pop(gradient.function, None)
                self.objects.concrete_functions.pop(gradient.function, None)
        for number in self.tensors.keys() - used:
            make_user_object(self.objects.nodes[number])  # removing it would renumber the others


def _function_and_value(tensor: Any) -> tuple[str, Value]:
    return tensor.concrete_function, main_value(tensor.name)

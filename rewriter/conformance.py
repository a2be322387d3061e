"""Conformance of nodes to the definitions of their ops: attributes, inputs and their dtypes.

Source: ``tensorflow/core/framework/op_def.proto``, and ``node_def_util.cc``, which refuses the same on loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tensorflow.python.framework import dtypes as tf_dtypes

from rewriter import op_defs, ops, protos
from rewriter.ir import ARG, Error, Graph, Model, Node, Value

VALUE_FIELDS = {
    "string": "s",
    "int": "i",
    "float": "f",
    "bool": "b",
    "type": "type",
    "shape": "shape",
    "tensor": "tensor",
    "func": "func",
}
"""Attribute type -> field of ``AttrValue`` that holds it; a ``list(...)`` is in the field "list"."""

MAX_OUTPUTS = 1 << 20
"""Limit on a node's outputs, above any real node: a Case of thousands of batch norms has some ten thousand."""

VALUES_PER_ELEMENT = {"half_val": 1, "float_val": 1, "double_val": 1, "int_val": 1, "string_val": 1, "int64_val": 1}
VALUES_PER_ELEMENT |= {"bool_val": 1, "uint32_val": 1, "uint64_val": 1, "scomplex_val": 2, "dcomplex_val": 2}
"""Field of ``TensorProto`` -> number of its values that make one element."""


def conform(model: Model) -> None:
    """Check that all nodes of a model fit their ops.

    Raises:
        Error: one does not; the message names the graph, the node and the problem.
    """
    for graph in model.graphs.values():
        checker = _GraphChecker(model, graph)
        for problem in checker.problems():
            raise Error(f"in {graph.name or 'the main graph'}: {problem}")


class _GraphChecker:
    """Checker of one graph's nodes; it caches the dtypes of their outputs."""

    def __init__(self, model: Model, graph: Graph) -> None:
        self.model = model
        self.graph = graph
        self._output_groups: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        self._attributes: dict[str, tuple[Mapping[str, Any], list[str]]] = {}

    def problems(self) -> Iterator[str]:
        """Yield what does not fit, one sentence each."""
        for node in self.graph.nodes.values():
            if node.op == ARG:
                if "T" not in node.attrs or not _is_dtype(node.attrs["T"].type):
                    yield f"the argument {node.name} has no dtype"
            elif node.op in self.model.graphs:
                callee = self.model.graphs[node.op]
                expected = [callee.nodes[a].attrs["T"].type for a in callee.arguments if a in callee.nodes]
                yield from self._input_problems(node, [(len(expected), tuple(expected))])
            else:
                definition = op_defs.op_def(self.model, node.op)
                attrs, faults = self._attributes_of(definition, node)
                yield from faults or self._input_problems(node, _tensor_groups(definition.input_arg, attrs))
                yield from (() if faults else self._call_problems(node, _tensor_groups(definition.output_arg, attrs)))
                # Outputs are listed one by one when a graph is written, and a damaged attribute may claim 2**60.
                if not faults and sum(count for count, _ in _tensor_groups(definition.output_arg, attrs)) > MAX_OUTPUTS:
                    yield f"{node.name} ({node.op}) has more than {MAX_OUTPUTS} outputs"
        shapes = self.graph.attrs.get("_input_shapes")
        if shapes is not None and (len(shapes.list.shape) != len(self.graph.arguments) or shapes.list.type):
            yield f"its attribute _input_shapes is not one of {len(self.graph.arguments)} shapes"
        for result in self.graph.results:
            actual = self._dtype(result.value) if result.value.node in self.graph.nodes else None
            if actual is not None and result.dtype and protos.dtype_name(actual).removesuffix("_ref") != result.dtype:
                yield f"the result {result.name} is {result.dtype}, and {result.value.node} gives {_dtype_name(actual)}"

    def _input_problems(self, node: Node, expected: list[tuple[int, tuple[int, ...]]]) -> Iterator[str]:
        """Yield differences between a node's inputs and the expected groups of tensors, as of `_tensor_groups`."""
        count = sum(number for number, _ in expected)
        if count != len(node.inputs):
            yield f"{node.name} ({node.op}) has {len(node.inputs)} inputs and takes {count}"
            return
        position = 0
        for number, dtypes in expected:
            for offset in range(number):
                value = node.inputs[position]
                position += 1
                required = dtypes[offset if len(dtypes) > 1 else 0]
                actual = self._dtype(value) if value.node in self.graph.nodes else None
                # A reference's dtype number is that of its value plus 100.
                if actual is not None and actual % 100 != required % 100:
                    yield (
                        f"{node.name} ({node.op}) takes {_dtype_name(required)} as input {position - 1}, "
                        f"and {value.node} gives {_dtype_name(actual)}"
                    )

    def _call_problems(self, node: Node, outputs: list[tuple[int, tuple[int, ...]]]) -> Iterator[str]:
        """Yield callees that take or return another number of values than the call passes or gives."""
        form = ops.call_form(self.model, node)
        if form is None:
            return
        input_count, output_count = len(node.inputs) - form.first, sum(number for number, _ in outputs)
        callees = [self.model.graphs[name] for name in ops.callees(self.model, node) if name in self.model.graphs]
        for position, callee in enumerate(callees):
            argument_count = len(callee.arguments)
            if argument_count != input_count:
                yield (
                    f"{node.name} ({node.op}) passes {input_count} values to {callee.name}, "
                    f"which takes {argument_count}"
                )
            # A loop's condition returns one boolean, not the loop's variables.
            condition = form.carried and position == 0
            if not condition and len(callee.results) != output_count:
                yield (
                    f"{node.name} ({node.op}) gives {output_count} values, "
                    f"and {callee.name} returns {len(callee.results)}"
                )

    def _dtype(self, value: Value) -> int | None:
        """Return the number of a value's dtype; None if the node has no such output."""
        if value.node not in self._output_groups:
            self._output_groups[value.node] = self._outputs(self.graph.nodes[value.node])
        port = value.port
        for count, dtypes in self._output_groups[value.node]:
            if 0 <= port < count:
                return dtypes[port if len(dtypes) > 1 else 0] or None
            port -= count
        return None

    def _outputs(self, node: Node) -> list[tuple[int, tuple[int, ...]]]:
        if node.op == ARG:
            return [(1, (node.attrs["T"].type,))] if "T" in node.attrs else []
        if node.op in self.model.graphs:
            results = self.model.graphs[node.op].results
            return [(len(results), tuple(protos.dtype_number(r.dtype) if r.dtype else 0 for r in results))]
        definition = op_defs.op_def(self.model, node.op)
        attrs, faults = self._attributes_of(definition, node)
        return [] if faults else _tensor_groups(definition.output_arg, attrs)

    def _attributes_of(self, definition: Any, node: Node) -> tuple[Mapping[str, Any], list[str]]:
        if node.name not in self._attributes:
            self._attributes[node.name] = _attributes(definition, node)
        return self._attributes[node.name]


def _attributes(definition: Any, node: Node) -> tuple[Mapping[str, Any], list[str]]:
    """Return a node's attributes with the defaults of its op, and the faults found in them, one sentence each.

    Without faults, each attribute of the definition is present or has a default: `op_defs.attribute` relies on it.
    """
    attrs = dict(node.attrs)
    faults = []
    for attr_def in definition.attr:
        value = attrs.get(attr_def.name)
        if value is None:
            if not attr_def.HasField("default_value"):
                faults.append(f"{node.name} ({node.op}) has no attribute {attr_def.name}")
            attrs[attr_def.name] = attr_def.default_value
        elif not _has_type(value, attr_def.type):
            faults.append(
                f"the attribute {attr_def.name} of {node.name} ({node.op}) is not of the type {attr_def.type}"
            )
        elif attr_def.HasField("allowed_values") and not _allowed(value, attr_def.allowed_values):
            faults.append(f"the attribute {attr_def.name} of {node.name} ({node.op}) is none of the values it may have")
        elif attr_def.has_minimum and (value.i if attr_def.type == "int" else _length(value)) < attr_def.minimum:
            faults.append(f"the attribute {attr_def.name} of {node.name} ({node.op}) is below {attr_def.minimum}")
    # `constants.constant_of` decodes constants, and relies on this.
    if not faults and node.op == "Const":
        tensor = attrs["value"].tensor
        if tensor.dtype != attrs["dtype"].type or not _is_complete(tensor):
            faults.append(f"the constant {node.name} does not hold what its dtype and shape say")
    return attrs, faults


def _has_type(value: Any, kind: str) -> bool:
    value_field = value.WhichOneof("value")
    if kind.startswith("list("):
        fields = {field.name for field, _ in value.list.ListFields()}
        fits = value_field == "list" and fields <= {VALUE_FIELDS[kind[len("list(") : -1]]}
        return fits and all(_is_dtype(t) for t in value.list.type)
    if kind == "type":
        return bool(value_field == "type") and _is_dtype(value.type)
    return bool(value_field == VALUE_FIELDS[kind])


def _is_dtype(number: int) -> bool:
    try:
        return number != 0 and tf_dtypes.as_dtype(number) is not None
    except TypeError:
        return False


def _allowed(value: Any, allowed: Any) -> bool:
    value_field = value.WhichOneof("value")
    if value_field == "list":
        return set(value.list.type) <= set(allowed.list.type) and set(value.list.s) <= set(allowed.list.s)
    return bool(value.type in allowed.list.type if value_field == "type" else value.s in allowed.list.s)


def _length(value: Any) -> int:
    return max(len(items) for _, items in value.list.ListFields()) if value.list.ListFields() else 0


def _is_complete(tensor: Any) -> bool:
    """Return true if a ``TensorProto`` has enough data for its shape.

    It stores all elements, or fewer; in the latter case, the last one stands for the rest.

    Source: ``tensorflow/core/framework/tensor.proto``.
    """
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        return False
    count = math.prod(sizes)
    if tensor.tensor_content:
        return bool(len(tensor.tensor_content) == count * (tf_dtypes.as_dtype(tensor.dtype).size or 0))
    stored = sum(len(getattr(tensor, name)) // per_element for name, per_element in VALUES_PER_ELEMENT.items())
    return bool(stored <= count)


def _tensor_groups(arguments: Any, attrs: Mapping[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """Return (number of tensors, dtypes) for each argument of an op definition; a single dtype holds for all."""
    groups: list[tuple[int, tuple[int, ...]]] = []
    for arg in arguments:
        if arg.type_list_attr:
            types = tuple(attrs[arg.type_list_attr].list.type)
            groups.append((len(types), types))
        else:
            count = attrs[arg.number_attr].i if arg.number_attr else 1
            groups.append((count, (attrs[arg.type_attr].type if arg.type_attr else arg.type,)))
    return groups


def _dtype_name(number: int) -> str:
    return protos.dtype_name(number % 100)

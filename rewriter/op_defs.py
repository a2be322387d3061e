"""Op definitions: attributes with their defaults, and a node's outputs with their dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

from tensorflow.python.framework import op_def_registry

from rewriter import protos
from rewriter.ir import ARG, Attrs, Error, Graph, Model, Node, Value


class Attributed(Protocol):
    """An op with attributes: a `Node`, or a term that stands for one."""

    @property
    def op(self) -> str:
        """Name of the op."""

    @property
    def attrs(self) -> Attrs:
        """Stored attributes by name; defaults may be absent."""


@cache
def registered(op: str) -> Any:
    """Return the op definition registered in this TensorFlow, or None."""
    return op_def_registry.get(op)


def op_def(model: Model, op: str) -> Any:
    """Return the definition of an op: the registered one, or else the one that the model brings.

    Raises:
        Error: neither exists.
    """
    definition = registered(op)
    if definition is None:
        definition = model.op_defs.get(op)
    if definition is None:
        raise Error(f"the op {op} is neither registered in this TensorFlow nor described in the model")
    return definition


def defaults(definition: Any) -> Mapping[str, Any]:
    """Return the defaults of an op definition's attributes, as ``AttrValue`` by name."""
    return {a.name: a.default_value for a in definition.attr if a.HasField("default_value")}


@cache
def _registered_defaults(op: str) -> Mapping[str, Any]:
    """Return the attribute defaults of a registered op; empty for any other op."""
    definition = registered(op)
    return {} if definition is None else defaults(definition)


def attribute(node: Attributed, name: str) -> Any:
    """Return an attribute of a registered op as an ``AttrValue``: the node's own, or the op definition's default.

    TensorFlow leaves defaults out when it saves. So attributes that an op definition has are read by this function,
    never from the `attrs` of a node.

    Raises:
        Error: neither has it; `rewriter.conformance` refuses such a model when it is read.
    """
    value = node.attrs.get(name)
    if value is None:
        value = _registered_defaults(node.op).get(name)
    if value is None:
        raise Error(f"a node of the op {node.op} has no attribute {name}")
    return value


def argument_dtype(argument: Node) -> str:
    """Return the dtype name of a function's argument, a node of the op `Arg`; "" for a polymorphic function's."""
    return protos.dtype_name(argument.attrs["T"].type) if "T" in argument.attrs else ""


def get(model: Model, node: Node, name: str) -> Any:
    """Return an attribute as a Python value (bool, int, float, str, dtype name), or its op definition's default.

    Raises:
        Error: neither the node nor the op definition has it.
    """
    value = node.attrs.get(name)
    if value is None:
        value = defaults(op_def(model, node.op)).get(name)
    if value is None:
        raise Error(f"node {node.name} ({node.op}) has no attribute {name}")
    kind = value.WhichOneof("value")
    content = getattr(value, kind)
    if kind == "s":
        return content.decode(errors="replace")
    return protos.dtype_name(content) if kind == "type" else content


def argument_counts(arguments: Any, attrs: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, number of tensors) of each input or output argument of an op definition.

    Source: ``tensorflow/core/framework/op_def.proto``, ArgDef: `number_attr` and `type_list_attr`.
    """
    for arg in arguments:
        if arg.number_attr:
            value = attrs.get(arg.number_attr) or defaults.get(arg.number_attr)
            yield arg.name, value.i if value is not None else 0
        elif arg.type_list_attr:
            value = attrs.get(arg.type_list_attr) or defaults.get(arg.type_list_attr)
            yield arg.name, len(value.list.type) if value is not None else 0
        else:
            yield arg.name, 1


@cache
def refers_to_functions(op: str) -> bool:
    """Return true if a node of this op may refer to functions, or if the op is not registered."""
    # An op that is not registered may be a direct call, whose op is the function's name.
    definition = registered(op)
    return definition is None or any(a.type in ("func", "list(func)") for a in definition.attr)


@cache
def _fixed_outputs(op: str) -> list[tuple[str, int]] | None:
    """Return the outputs of a registered op if their number does not depend on its attributes; else None."""
    definition = registered(op)
    if definition is None or any(a.number_attr or a.type_list_attr for a in definition.output_arg):
        return None
    return [(a.name, 1) for a in definition.output_arg]


def outputs(definition: Any, attrs: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return (name, number of tensors) of each output argument of a node with these attributes."""
    fixed = _fixed_outputs(definition.name)
    if fixed is not None:
        return fixed
    return list(argument_counts(definition.output_arg, attrs, defaults(definition)))


def output_count(model: Model, node: Node) -> int:
    """Return the number of a node's outputs."""
    if node.op == ARG:
        return 1
    if node.op in model.graphs:
        return len(model.graphs[node.op].results)
    return sum(count for _, count in outputs(op_def(model, node.op), node.attrs))


def output_dtype(model: Model, graph: Graph, value: Value) -> str:
    """Return the dtype name of a value; for a reference, the dtype of its variable."""
    node = graph.nodes[value.node]
    if node.op == ARG:
        return argument_dtype(node)
    if node.op in model.graphs:
        return model.graphs[node.op].results[value.port].dtype
    definition = op_def(model, node.op)
    attrs = {**defaults(definition), **node.attrs}
    port = value.port
    for arg, (_, count) in zip(definition.output_arg, outputs(definition, node.attrs), strict=True):
        if port < count:
            number = attrs[arg.type_list_attr].list.type[port] if arg.type_list_attr else arg.type
            return protos.dtype_name(attrs[arg.type_attr].type if arg.type_attr else number).removesuffix("_ref")
        port -= count
    raise IndexError(f"{value} is not an output of {node.op}")

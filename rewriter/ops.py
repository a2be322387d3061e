"""What is known about ops: definitions, attributes, which ones call functions, which ones forward a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import dtypes, op_def_registry, tensor_util

from rewriter.ir import ARG, Attrs, Error, Graph, Model, Node, Value


class Attributed(Protocol):
    """An op with attributes: a `Node`, or a term that stands for one."""

    @property
    def op(self) -> str:
        """The op."""

    @property
    def attrs(self) -> Attrs:
        """Those attributes that were written, by name."""


class CallForm(NamedTuple):
    """How an op calls functions.

    Attributes:
        callees: the attributes that name them (each holds one function or a list).
        types: the attribute that lists the dtypes of the inputs passed on; None where there is none.
        first: index of the first input that is passed on.
        carried: whether what goes in must come out of the callee again (loop variables).
        stateful: the op to use when a callee gains side effects.
    """

    callees: tuple[str, ...]
    types: str | None
    first: int
    carried: bool
    stateful: str


CALLS: Mapping[str, CallForm] = {
    "PartitionedCall": CallForm(("f",), "Tin", 0, False, "StatefulPartitionedCall"),
    "StatefulPartitionedCall": CallForm(("f",), "Tin", 0, False, "StatefulPartitionedCall"),
    "If": CallForm(("then_branch", "else_branch"), "Tin", 1, False, "If"),
    "StatelessIf": CallForm(("then_branch", "else_branch"), "Tin", 1, False, "If"),
    "Case": CallForm(("branches",), "Tin", 1, False, "Case"),
    "StatelessCase": CallForm(("branches",), "Tin", 1, False, "Case"),
    "While": CallForm(("cond", "body"), "T", 0, True, "While"),
    "StatelessWhile": CallForm(("cond", "body"), "T", 0, True, "While"),
}

FORWARDS: Mapping[str, int] = dict.fromkeys(
    (
        "Cast",
        "CheckNumerics",
        "EnsureShape",
        "Enter",
        "Identity",
        "PreventGradient",
        "ReadVariableOp",
        "RefEnter",
        "RefIdentity",
        "RefSwitch",
        "Snapshot",
        "StopGradient",
        "Switch",
    ),
    0,
)
"""Ops whose outputs are, or read, one of their inputs: the index of that input."""

VIEWS = frozenset({"ExpandDims", "Reshape", "Squeeze"})
"""Ops whose output is their first input in another shape, as that of some StridedSlice is: `viewed` knows."""

CHOICES: Mapping[str, int] = {"Merge": 0, "RefMerge": 0, "Select": 1, "SelectV2": 1}
"""Ops whose first output is one of several inputs: the index of the first of them."""


GRADIENT = "_gradient_op_type"
"""Attribute of an op that has a gradient of its own: of which kind (``tf.custom_gradient``)."""

PROXY = "_bnqat"
"""Attribute of a node that stands for its last input, in another precision: TensorFlow keeps it when a user
loads and saves a model again, on nodes but not on functions."""


PART = "_bnqat_part"
"""Attribute of a node inside a quantiser: the part of its arithmetic, as named in `passes.quantization.node_marks`."""


GENERAL = "_bnqat_general"
"""Attribute of a Case whose branches compute the same, each under a condition of its own: the position of the one that
does so under every condition."""


def forwarded(node: Node, port: int) -> Value | None:
    """The value that this output of a node is, or reads, or stands for; None where the node computes it."""
    if PROXY in node.attrs and node.inputs:
        return node.inputs[-1]
    if node.op == "IdentityN":
        return node.inputs[port]
    return node.inputs[FORWARDS[node.op]] if node.op in FORWARDS else None


def call_form(model: Model, node: Node) -> CallForm | None:
    """How this node calls functions; None where it does not, or not in a way that inputs can be added to."""
    form = CALLS.get(node.op)
    if form is None and node.op in model.graphs:
        return CallForm((), None, 0, False, node.op)
    return form


def call_form_of(model: Model, node: Node) -> CallForm:
    """How this node, which is known to call a function, calls it.

    Raises:
        Error: it calls none.
    """
    form = call_form(model, node)
    if form is None:
        raise Error(f"node {node.name} ({node.op}) is not a call")
    return form


def callees(model: Model, node: Node) -> tuple[str, ...]:
    """The functions that a node with a call form calls, in order."""
    form = CALLS.get(node.op)
    if form is None:
        return (node.op,) if node.op in model.graphs else ()
    return tuple(name for key in form.callees if key in node.attrs for name in functions_in(node.attrs[key]))


def with_functions(value: Any, names: Mapping[str, str]) -> Any:
    """An attribute with functions' names replaced; the attribute itself where it has none of them."""
    if not any(name in names for name in functions_in(value)):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    for function in copy.list.func if copy.WhichOneof("value") == "list" else (copy.func,):
        function.name = names.get(function.name, function.name)
    return copy


def functions_in(value: Any) -> Iterator[str]:
    """The names of the functions that an attribute refers to."""
    kind = value.WhichOneof("value")
    if kind == "func":
        yield value.func.name
    elif kind == "list":
        for func in value.list.func:
            yield func.name


@cache
def dtype_name(number: int) -> str:
    """``types_pb2.DataType`` -> name, as 1 -> "float32"."""
    try:
        return str(dtypes.as_dtype(number).name)
    except TypeError as e:
        raise Error(f"unknown dtype number {number}; the model needs a newer TensorFlow") from e


@cache
def dtype_number(name: str) -> int:
    """Name -> ``types_pb2.DataType``."""
    return int(dtypes.as_dtype(name).as_datatype_enum)


class Dtype(str):
    """A dtype by name; `attr` makes a type attribute of it, of a plain string a bytes attribute."""

    __slots__ = ()


@cache
def dtype_attr(name: str) -> Any:
    """A dtype as an ``AttrValue``; one proto for each dtype, as protos are never changed."""
    return attr(Dtype(name))


def more_dtypes(dtypes: Any, names: list[str]) -> Any:
    """A list of dtypes, as an ``AttrValue``, with more of them."""
    longer = attr_value_pb2.AttrValue()
    longer.CopyFrom(dtypes)
    longer.list.type.extend(dtype_number(n) for n in names)
    return longer


def more_shapes(shapes: Any, added: Sequence[tuple[int, ...] | None]) -> Any:
    """A list of shapes, as an ``AttrValue``, with more of them; None is an unknown rank."""
    longer = attr_value_pb2.AttrValue()
    longer.CopyFrom(shapes)
    longer.list.shape.extend(shapes_attr([*added]).list.shape)
    return longer


class Func(str):
    """A function by name; `attr` makes a function attribute of it."""

    __slots__ = ()


def attr(value: bool | int | float | str | bytes | np.ndarray | list[Dtype] | list[Func]) -> Any:
    """A Python value as an ``AttrValue``."""
    proto = attr_value_pb2.AttrValue()
    if isinstance(value, bool):
        proto.b = value
    elif isinstance(value, int):
        proto.i = value
    elif isinstance(value, float):
        proto.f = value
    elif isinstance(value, Dtype):
        proto.type = dtype_number(value)
    elif isinstance(value, Func):
        proto.func.name = value
    elif isinstance(value, str | bytes):
        proto.s = value.encode() if isinstance(value, str) else value
    elif isinstance(value, np.ndarray | np.generic):
        proto.tensor.CopyFrom(tensor_util.make_tensor_proto(value))
    else:
        for each in value:
            if isinstance(each, Func):
                proto.list.func.add(name=each)
            else:
                proto.list.type.append(dtype_number(each))
    return proto


def shape_attr(shape: tuple[int, ...]) -> Any:
    """A shape as an ``AttrValue``."""
    proto = attr_value_pb2.AttrValue()
    proto.shape.SetInParent()
    for size in shape:
        proto.shape.dim.add().size = size
    return proto


def shapes_attr(shapes: list[tuple[int, ...] | None]) -> Any:
    """A list of shapes as an ``AttrValue``; None is an unknown rank."""
    proto = attr_value_pb2.AttrValue()
    proto.list.SetInParent()
    for shape in shapes:
        added = proto.list.shape.add()
        if shape is None:
            added.unknown_rank = True
        else:
            for size in shape:
                added.dim.add().size = size
    return proto


@cache
def registered(op: str) -> Any:
    """The op definition registered in this TensorFlow, or None."""
    return op_def_registry.get(op)


def op_def(model: Model, op: str) -> Any:
    """The definition of an op: registered here, or brought by the model.

    Raises:
        Error: the op is known to neither.
    """
    found = registered(op)
    if found is None:
        found = model.op_defs.get(op)
    if found is None:
        raise Error(f"the op {op} is neither registered in this TensorFlow nor described in the model")
    return found


def defaults(definition: Any) -> Mapping[str, Any]:
    """The attributes of an op definition that have a default, with it, an ``AttrValue``."""
    return {a.name: a.default_value for a in definition.attr if a.HasField("default_value")}


@cache
def _registered_defaults(op: str) -> Mapping[str, Any]:
    """The same for a registered op; empty for any other."""
    definition = registered(op)
    return {} if definition is None else defaults(definition)


def attribute(node: Attributed, name: str) -> Any:
    """An attribute of a registered op as an ``AttrValue``: the node's own, or the default of the op's definition.

    TensorFlow leaves defaults out when it saves, so nothing reads the `attrs` of a node for what an op definition has.

    Raises:
        Error: neither has it, which `rewriter.conformance` refuses in a model that is read.
    """
    value = node.attrs.get(name)
    if value is None:
        value = _registered_defaults(node.op).get(name)
    if value is None:
        raise Error(f"a node of the op {node.op} has no attribute {name}")
    return value


def argument_dtype(argument: Node) -> str:
    """The dtype of a function's argument, a node of the op `Arg`, by name."""
    return dtype_name(argument.attrs["T"].type)


def get(model: Model, node: Node, name: str) -> Any:
    """An attribute as a Python value (bool, int, float, str, dtype name), or its op definition's default.

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
    return dtype_name(content) if kind == "type" else content


def argument_counts(arguments: Any, attrs: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, number of tensors) of each input or output argument of an op definition.

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
    """Whether a node of this op may refer to functions; True where the op is not registered."""
    definition = registered(op)
    return definition is None or any(a.type in ("func", "list(func)") for a in definition.attr)


@cache
def _fixed_outputs(op: str) -> list[tuple[str, int]] | None:
    """The outputs of a registered op, where their number does not depend on its attributes."""
    definition = registered(op)
    if definition is None or any(a.number_attr or a.type_list_attr for a in definition.output_arg):
        return None
    return [(a.name, 1) for a in definition.output_arg]


def outputs(definition: Any, attrs: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, number of tensors) of each output argument of a node with these attributes."""
    fixed = _fixed_outputs(definition.name)
    if fixed is not None:
        return fixed
    return list(argument_counts(definition.output_arg, attrs, defaults(definition)))


def output_count(model: Model, node: Node) -> int:
    """How many outputs a node has."""
    if node.op == ARG:
        return 1
    if node.op in model.graphs:
        return len(model.graphs[node.op].results)
    return sum(count for _, count in outputs(op_def(model, node.op), node.attrs))


def output_dtype(model: Model, graph: Graph, value: Value) -> str:
    """The dtype of a value, by name; a reference's is that of what it refers to."""
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
            own = attrs[arg.type_list_attr].list.type[port] if arg.type_list_attr else arg.type
            return dtype_name(attrs[arg.type_attr].type if arg.type_attr else own).removesuffix("_ref")
        port -= count
    raise IndexError(f"{value} is not an output of {node.op}")


def text(data: bytes) -> str:
    """Bytes of an attribute or a constant as text; what is no UTF-8 is spelled out."""
    return data.decode(errors="backslashreplace")


def viewed(graph: Graph, node: Node) -> Value | None:
    """What a node gives in another shape; None where it does anything else."""
    return node.inputs[0] if node.op in VIEWS or _adds_axes(graph, node) else None


def _adds_axes(graph: Graph, node: Node) -> bool:
    """Whether a node is ``v[None, :, None]`` or the like: a StridedSlice that takes all and adds axes of size 1.

    Source: op ``StridedSlice``: bit i of a mask is about the i-th part of the slice.
    """
    strides = constant_of(graph, node.inputs[3]) if node.op == "StridedSlice" else None
    if strides is None or (strides != 1).any():
        return False
    masks = {name: attribute(node, name).i for name in MASKS}
    whole = masks["begin_mask"] & masks["end_mask"] | masks["new_axis_mask"]
    return not masks["shrink_axis_mask"] and whole | masks["ellipsis_mask"] == (1 << strides.size) - 1


MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def constant_of(graph: Graph, value: Value) -> np.ndarray | None:
    """What a constant holds; None where the value is no constant, or one of more than `LARGEST` elements.

    A constant may say its size and hold one element only, so that a small file makes a large array.
    """
    node = graph.nodes[value.node]
    if node.op != "Const":
        return None
    tensor = attribute(node, "value").tensor
    if math.prod(d.size for d in tensor.tensor_shape.dim) > LARGEST:
        return None
    found: np.ndarray = tensor_util.MakeNdarray(tensor)
    # Strings that are left out are empty ones, of another type than those that are there.
    return np.array([s or b"" for s in found.ravel()], object).reshape(found.shape) if found.dtype == object else found


LARGEST = 2**24
"""The most elements of constants that are looked into, and of the values that a quantiser computes."""

"""Conversion of GraphDef and FunctionDef protos to graphs, and back.

Source: ``tensorflow/core/framework/{graph,node_def,function,op_def}.proto``. A FunctionDef spells an edge
``node:output_arg:index`` or, for an argument, ``argument``; a GraphDef spells it ``node:port``. A residue is a
serialised proto of the fields that `rewriter.ir` has no place for; they are written again unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tensorflow.core.framework import function_pb2, graph_pb2, node_def_pb2, op_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from rewriter import op_defs, protos
from rewriter.ir import ARG, MAIN, Effect, Error, Graph, Node, Result, Spec, Value

Definitions = Callable[[str], Any]
"""An op's name -> its definition; a function of the model counts as an op. Raises Error if unknown."""


def definitions(library: Any, stripped_ops: Mapping[str, Any]) -> Definitions:
    """Return a lookup of op definitions: the library's functions, then registered ops, then the model's own list.

    Args:
        library: the ``FunctionDefLibrary``.
        stripped_ops: the ops that the model describes in ``MetaInfoDef.stripped_op_list``, by name.
    """
    signatures = {f.signature.name: f.signature for f in library.function}

    def find(op: str) -> Any:
        definition = signatures.get(op) or op_defs.registered(op) or stripped_ops.get(op)
        if definition is None:
            raise Error(f"the op {op} is neither registered in this TensorFlow nor described in the model")
        return definition

    return find


def described(names: set[str]) -> list[Any]:
    """Return the definitions of the registered ones of these ops, for ``MetaInfoDef.stripped_op_list``.

    They are sorted by name and have no documentation.
    """
    copies = []
    for name in sorted(names):
        definition = op_defs.registered(name)
        if definition is not None:
            copy = op_def_pb2.OpDef()
            copy.CopyFrom(definition)
            copy.ClearField("summary")
            copy.ClearField("description")
            for part in (*copy.input_arg, *copy.output_arg, *copy.attr):
                part.ClearField("description")
            copies.append(copy)
    return copies


def read_main(proto: Any) -> Graph:
    """Return the main graph of a GraphDef, without its library."""
    nodes: dict[str, Node] = {}
    for node in proto.node:
        inputs, after = _split_inputs(node, nodes, "the main graph")
        nodes[node.name] = _read_node(node, tuple(main_value(i) for i in inputs), after)
    rest = graph_pb2.GraphDef(versions=proto.versions, version=proto.version)
    return Graph(MAIN, nodes, residue=rest.SerializeToString(deterministic=True))


def read_function(proto: Any, find: Definitions) -> Graph:
    """Return the graph of a FunctionDef."""
    signature = proto.signature
    nodes: dict[str, Node] = {}
    for index, arg in enumerate(signature.input_arg):
        _refuse_twice(arg.name, nodes, signature.name)
        nodes[arg.name] = _read_argument(arg, proto.arg_attr.get(index))
    by_name = {n.name: n for n in proto.node_def}
    ports: dict[str, dict[str, tuple[int, int]]] = {}

    def value(text: str) -> Value:
        name, _, rest = text.partition(":")
        if not rest:
            return Value(name)
        output, _, index = rest.partition(":")
        # Listed once per node: a Case may have thousands of outputs, each of which is asked for.
        if name not in ports:
            node = by_name.get(name)
            if node is None:
                raise Error(f"in {signature.name}: the input {text} does not exist")
            ports[name] = _first_ports(find(node.op), node.attr)
        first, count = ports[name].get(output, (0, 0))
        if not _number(index, text) < count:
            raise Error(f"in {signature.name}: {name} has no output {rest}")
        return Value(name, first + _number(index, text))

    for node in proto.node_def:
        inputs, after = _split_inputs(node, nodes, signature.name)
        nodes[node.name] = _read_node(node, tuple(value(i) for i in inputs), after)
    return Graph(
        signature.name,
        nodes,
        tuple(a.name for a in signature.input_arg),
        tuple(_read_result(a, value(proto.ret[a.name])) for a in signature.output_arg),
        tuple(Effect(name, proto.control_ret[name]) for name in signature.control_output),
        dict(proto.attr),
        signature.is_stateful,
        _function_residue(proto),
    )


def _first_ports(definition: Any, attrs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the first port and the number of ports of each output argument."""
    first, ports = 0, {}
    for name, count in op_defs.outputs(definition, attrs):
        ports[name] = first, count
        first += count
    return ports


def _split_inputs(node: Any, nodes: Mapping[str, Node], graph_name: str) -> tuple[list[str], tuple[str, ...]]:
    """Return a node's data inputs, and the nodes of its control inputs.

    Raises:
        Error: a node of the same name exists already.
    """
    _refuse_twice(node.name, nodes, graph_name)
    inputs = [i for i in node.input if i[:1] != "^"]
    return inputs, tuple(i[1:] for i in node.input if i[:1] == "^")


def _refuse_twice(name: str, nodes: Mapping[str, Node], graph_name: str) -> None:
    if name in nodes:
        raise Error(f"in {graph_name}: there are two nodes called {name}")


# int() alone would read digits of other scripts, and raise a ValueError for thousands of digits.
_PORT = re.compile(r"\d{0,9}", re.ASCII)


def _number(text: str, value: str) -> int:
    """Parse the port of a value; an empty text is port 0.

    Raises:
        Error: the text is not a number.
    """
    if not _PORT.fullmatch(text):
        raise Error(f"{value}: {text!r} is not the number of an output")
    return int(text or 0)


SPARSE = ("values", "indices", "dense_shape")
"""Components of a sparse tensor (``TensorInfo.CooSparse``)."""


def tensors_of(key: str, info: Any) -> dict[str, str]:
    """Return the tensor names of a signature's input or output by key; a sparse tensor has three.

    A composite tensor is a single tensor with an empty name; its components are ignored.

    Args:
        key: the name of the input or output.
        info: its ``TensorInfo``.
    """
    if info.WhichOneof("encoding") == "coo_sparse":
        return {f"{key}.{part}": getattr(info.coo_sparse, f"{part}_tensor_name") for part in SPARSE}
    return {key: info.name}


def tensor_info(spec: Spec, value: Value) -> Any:
    """Return the ``TensorInfo`` of a value of the main graph."""
    info = meta_graph_pb2.TensorInfo(name=f"{value.node}:{value.port}", dtype=protos.dtype_number(spec.dtype))
    if spec.shape is None:
        info.tensor_shape.unknown_rank = True
    else:
        info.tensor_shape.CopyFrom(protos.shape_attr(spec.shape).shape)
    return info


def main_value(text: str) -> Value:
    """Parse a value as a GraphDef spells it."""
    name, _, port = text.partition(":")
    return Value(name, _number(port, text))


def _read_node(proto: Any, inputs: tuple[Value, ...], after: tuple[str, ...]) -> Node:
    if proto.op == ARG:
        raise Error(f"the node {proto.name} is of the op {ARG}, which TensorFlow does not have")
    residue = b""
    if proto.HasField("experimental_debug_info") or proto.HasField("experimental_type"):
        rest = node_def_pb2.NodeDef()
        rest.CopyFrom(proto)
        for name in ("name", "op", "input", "device", "attr"):
            rest.ClearField(name)
        residue = rest.SerializeToString(deterministic=True)
    return Node(proto.name, proto.op, inputs, after, dict(proto.attr), proto.device, residue)


def _arg_residue(proto: Any) -> bytes:
    rest = op_def_pb2.OpDef.ArgDef()
    rest.CopyFrom(proto)
    rest.ClearField("name")
    rest.ClearField("type")
    data: bytes = rest.SerializeToString(deterministic=True)
    return data


def _read_argument(arg: Any, extra: Any) -> Node:
    attrs = {} if extra is None else dict(extra.attr)
    # The argument of a polymorphic function names a type attribute instead, which is in the residue.
    if arg.type:
        attrs["T"] = protos.dtype_attr(protos.dtype_name(arg.type))
    return Node(arg.name, ARG, attrs=attrs, residue=_arg_residue(arg))


def _read_result(arg: Any, value: Value) -> Result:
    return Result(arg.name, value, protos.dtype_name(arg.type) if arg.type else "", _arg_residue(arg))


def _function_residue(proto: Any) -> bytes:
    rest = function_pb2.FunctionDef()
    rest.signature.CopyFrom(proto.signature)
    for name in ("name", "input_arg", "output_arg", "control_output", "is_stateful"):
        rest.signature.ClearField(name)
    if not rest.signature.ByteSize():
        rest.ClearField("signature")
    for index, number in proto.resource_arg_unique_id.items():
        rest.resource_arg_unique_id[index] = number
    data: bytes = rest.SerializeToString(deterministic=True)
    return data


def write_main(graph: Graph) -> Any:
    """Return the GraphDef of the main graph, without a library."""
    proto = graph_pb2.GraphDef.FromString(graph.residue)
    for node in graph.nodes.values():
        inputs = [v.node if v.port == 0 else f"{v.node}:{v.port}" for v in node.inputs]
        _write_node(proto.node.add(), node, inputs)
    return proto


def write_function(graph: Graph, find: Definitions) -> Any:
    """Return the FunctionDef of a graph."""
    proto = function_pb2.FunctionDef.FromString(graph.residue)
    signature = proto.signature
    signature.name = graph.name
    signature.is_stateful = graph.stateful
    spelled: dict[str, list[str]] = {}

    def spell(value: Value) -> str:
        node = graph.nodes[value.node]
        if node.op == ARG:
            return node.name
        if node.name not in spelled:
            counts = op_defs.outputs(find(node.op), node.attrs)
            spelled[node.name] = [f"{name}:{i}" for name, count in counts for i in range(count)]
        return f"{node.name}:{spelled[node.name][value.port]}"

    for index, name in enumerate(graph.arguments):
        _write_argument(proto, index, graph.nodes[name])
    for result in graph.results:
        arg = signature.output_arg.add()
        arg.MergeFromString(result.residue)
        arg.name = result.name
        if result.dtype:
            arg.type = protos.dtype_number(result.dtype)
        proto.ret[result.name] = spell(result.value)
    for effect in graph.effects:
        signature.control_output.append(effect.name)
        proto.control_ret[effect.name] = effect.node
    for name, attribute in graph.attrs.items():
        proto.attr[name].CopyFrom(attribute)
    for node in graph.nodes.values():
        if node.op != ARG:
            _write_node(proto.node_def.add(), node, [spell(v) for v in node.inputs])
    return proto


def _write_argument(proto: Any, index: int, node: Node) -> None:
    arg = proto.signature.input_arg.add()
    arg.MergeFromString(node.residue)
    arg.name = node.name
    if "T" in node.attrs:
        arg.type = node.attrs["T"].type
    for name, attribute in node.attrs.items():
        if name != "T":
            proto.arg_attr[index].attr[name].CopyFrom(attribute)


def _write_node(proto: Any, node: Node, inputs: list[str]) -> None:
    if node.residue:
        proto.MergeFromString(node.residue)
    proto.name, proto.op, proto.device = node.name, node.op, node.device
    proto.input.extend(inputs)
    proto.input.extend(f"^{name}" for name in node.after)
    for name, attribute in node.attrs.items():
        proto.attr[name].CopyFrom(attribute)

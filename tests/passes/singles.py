"""Graphs of single ops as short text: a line is ``name = Op(inputs) shape``, with ? for an unknown size."""

from __future__ import annotations

import ast
import re

import numpy as np

from rewriter import protos
from rewriter.draft import var_handle
from rewriter.ir import MAIN, Graph, Model, Node, Signature, Value, Variable
from rewriter.text import to_text

LINE = re.compile(r"^(\S+) = (\w+)\((.*?)\)(?: =(\S+))? (\[.*\]|-)$")
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
TRAINED = ("gamma", "beta")


CHANNELS = 6


def model(text: str) -> Model:
    """Return a model whose main graph has one batch norm's variables, their values by role, and the given lines.

    The signature returns the node of the last line.
    """
    variables = {r: Variable(r, f"norm/{r}", "float32", (CHANNELS,), trainable=r in TRAINED) for r in ROLES}
    nodes: dict[str, Node] = {}
    for role, variable in variables.items():
        nodes[f"{role}/v"] = var_handle(f"{role}/v", variable)
        read = {"dtype": protos.dtype_attr("float32"), "_output_shapes": protos.shapes_attr([(CHANNELS,)])}
        nodes[role] = Node(role, "ReadVariableOp", (Value(f"{role}/v"),), attrs=read)
    for line in filter(None, (line.strip() for line in text.splitlines())):
        node = _node(line)
        nodes[node.name] = node
    last = list(nodes)[-1]
    signature = Signature("serving_default", "", ("x",), ("y",), (Value("x"),), (Value(last),))
    return Model({MAIN: Graph(MAIN, nodes)}, variables, signatures={"serving_default": signature})


def _node(line: str) -> Node:
    match = LINE.match(line)
    assert match is not None, line
    name, op, inputs, content, shape = match.groups()
    sizes = None if shape == "-" else tuple(-1 if s == "?" else int(s) for s in re.findall(r"\?|\d+", shape))
    attrs = {"_output_shapes": protos.shapes_attr([sizes])}
    if op == "Const":
        value = np.array(ast.literal_eval(content), np.float32 if "." in content else np.int32)
        attrs |= {"value": protos.attr(value), "dtype": protos.dtype_attr(value.dtype.name)}
    elif op == "Placeholder":
        attrs["dtype"] = protos.dtype_attr("float32")
    else:
        attrs["T"] = protos.dtype_attr("float32")
    if op == "Mean":
        attrs["keep_dims"] = protos.attr(len(sizes or ()) > 1)
    values = tuple(Value(*_port(v)) for v in inputs.split(", ") if v)
    return Node(name, op, values, attrs=attrs)


def _port(text: str) -> tuple[str, int]:
    name, _, port = text.partition(":")
    return name, int(port or 0)


def line_of(node: Node, attributes: tuple[str, ...] = ()) -> str:
    """Return a node as a line of text, with the named attributes only."""
    attrs = {k: v for k, v in node.attrs.items() if k in attributes}
    graph = Graph(MAIN, {node.name: Node(node.name, node.op, node.inputs, node.after, attrs)})
    return to_text(graph).splitlines()[1].strip()


def text_of(after: Model, attributes: tuple[str, ...] = ("data_format", "epsilon", "is_training")) -> list[str]:
    """Return the main graph's lines without the variables, with the kernel's attributes only."""
    shown = (n for n in after.graphs[MAIN].nodes.values() if n.op not in ("VarHandleOp", "ReadVariableOp"))
    return [line_of(node, attributes) for node in shown]

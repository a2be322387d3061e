"""The text form of a graph, and its parser: for tests, dumps and diffs.

::

    function serve(x: float32, gamma: resource) -> (y = bn:0: float32) {
      read = ReadVariableOp(gamma) {dtype: float32}
      bn = FusedBatchNormV3(x, read, ...) after(other) {T: float32, epsilon: 0.001}
      effect assign = assign
    }

Each node has one line; ``name`` stands for ``name:0``. Attributes are written plainly if their kind is clear (booleans,
integers, floats, strings, dtypes, ``@function``), and as ``proto "..."`` otherwise. `from_text` turns text of `to_text`
into an equal graph, except for residues.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np
from google.protobuf import text_format
from tensorflow.core.framework import attr_value_pb2

from rewriter import protos
from rewriter.ir import ARG, Effect, Error, Graph, Node, Result, Value

_NAME = r"[\w.\\/>^-]+"
_HEAD = re.compile(rf"^(stateful )?function ({_NAME}|main)\((.*)\) -> \((.*)\)(?: (\{{.*\}}))? \{{$")
_NODE = re.compile(rf"^({_NAME}) = ({_NAME})\((.*?)\)(?: after\((.*?)\))?(?: on (\"[^\"]*\"))?(?: (\{{.*\}}))?$")
_ARGUMENT = re.compile(rf"^({_NAME}): (\w+)(?: (\{{.*\}}))?$")
_RESULT = re.compile(rf"^({_NAME}) = ({_NAME}(?::\d+)?): (\w+)$")
_EFFECT = re.compile(rf"^effect ({_NAME}) = ({_NAME})$")


def to_text(graph: Graph) -> str:
    """Return the text of a graph."""
    arguments = ", ".join(_argument(graph.nodes[name]) for name in graph.arguments)
    results = ", ".join(f"{r.name} = {_value(r.value)}: {r.dtype}" for r in graph.results)
    stateful = "stateful " if graph.stateful else ""
    attrs = f" {_attrs(graph.attrs)}" if graph.attrs else ""
    lines = [f"{stateful}function {graph.name or 'main'}({arguments}) -> ({results}){attrs} {{"]
    lines += [f"  {_node(n)}" for n in graph.nodes.values() if n.op != ARG]
    lines += [f"  effect {e.name} = {e.node}" for e in graph.effects]
    return "\n".join([*lines, "}"]) + "\n"


def _argument(node: Node) -> str:
    dtype = protos.dtype_name(node.attrs["T"].type) if "T" in node.attrs else "any"
    rest = {k: v for k, v in node.attrs.items() if k != "T"}
    return f"{node.name}: {dtype}" + (f" {_attrs(rest)}" if rest else "")


def _node(node: Node) -> str:
    text = f"{node.name} = {node.op}({', '.join(_value(v) for v in node.inputs)})"
    if node.after:
        text += f" after({', '.join(node.after)})"
    if node.device:
        text += f' on "{node.device}"'
    return text + (f" {_attrs(node.attrs)}" if node.attrs else "")


def _value(value: Value) -> str:
    return f"{value.node}:{value.port}" if value.port else value.node


def _attrs(attrs: Any) -> str:
    return "{" + ", ".join(f"{k}: {attr_text(v)}" for k, v in sorted(attrs.items())) + "}"


def attr_text(value: Any) -> str:
    """Return an attribute as `to_text` writes it."""
    kind = value.WhichOneof("value")
    if kind == "b":
        return "true" if value.b else "false"
    if kind == "i":
        return str(value.i)
    if kind == "f":
        # A point, an exponent, inf or nan tells a float from an integer when the text is read back.
        short = str(np.float32(value.f))
        return short if any(c in short for c in ".en") else f"{short}.0"
    if kind == "s":
        # Attributes hold any bytes; latin-1 maps each of them to one character and back.
        return _quoted(value.s.decode("latin-1"))
    if kind == "type":
        return protos.dtype_name(value.type)
    if kind == "func" and not value.func.attr:
        return f"@{value.func.name}"
    return "proto " + _quoted(text_format.MessageToString(value, as_one_line=True))


def _quoted(text: str) -> str:
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def from_text(text: str) -> Graph:
    """Return the graph that a text describes.

    Raises:
        Error: a line cannot be read; the message quotes it.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    head = _HEAD.match(lines[0])
    if head is None or lines[-1] != "}":
        raise Error(f"this is no graph: {lines[0]}")
    stateful, name, arguments, results, attrs = head.groups()
    argument_nodes = [_parse_argument(a) for a in _split(arguments)]
    nodes = {n.name: n for n in argument_nodes}
    effects = []
    for line in lines[1:-1]:
        if effect := _EFFECT.match(line):
            effects.append(Effect(*effect.groups()))
        else:
            node = _parse_node(line)
            nodes[node.name] = node
    return Graph(
        "" if name == "main" else name,
        nodes,
        tuple(n.name for n in argument_nodes),
        tuple(_parse_result(r) for r in _split(results)),
        tuple(effects),
        _parse_attrs(attrs or ""),
        bool(stateful),
    )


def _split(text: str) -> list[str]:
    """Split a text at commas outside quotes and braces."""
    parts, depth, quoted, escaped, start = [], 0, False, False, 0
    for i, c in enumerate(text):
        if escaped or c == "\\":
            escaped = not escaped
        elif c == '"':
            quoted = not quoted
        elif not quoted and c in "{}":
            depth += 1 if c == "{" else -1
        elif c == "," and not quoted and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in (*parts, text[start:].strip()) if p]


def _parse_argument(text: str) -> Node:
    match = _ARGUMENT.match(text)
    if match is None:
        raise Error(f"this is no argument: {text}")
    name, dtype, attrs = match.groups()
    typed = {} if dtype == "any" else {"T": protos.attr(protos.Dtype(dtype))}
    return Node(name, ARG, attrs={**typed, **_parse_attrs(attrs or "")})


def _parse_result(text: str) -> Result:
    match = _RESULT.match(text)
    if match is None:
        raise Error(f"this is no result: {text}")
    return Result(match[1], _parse_value(match[2]), match[3])


def _parse_node(line: str) -> Node:
    match = _NODE.match(line)
    if match is None:
        raise Error(f"this is no node: {line}")
    name, op, inputs, after, device, attrs = match.groups()
    return Node(
        name,
        op,
        tuple(_parse_value(v) for v in _split(inputs)),
        tuple(_split(after or "")),
        _parse_attrs(attrs or ""),
        device[1:-1] if device else "",
    )


def _parse_value(text: str) -> Value:
    name, _, port = text.partition(":")
    return Value(name, int(port or 0))


def _parse_attrs(text: str) -> dict[str, Any]:
    pairs = (part.partition(": ") for part in _split(text[1:-1]))
    return {k: _parse_attr(v) for k, _, v in pairs}


def _parse_attr(text: str) -> Any:
    if text in ("true", "false"):
        return protos.attr(text == "true")
    if text.startswith("@"):
        return protos.attr(protos.Func(text[1:]))
    if text.startswith('"'):
        return protos.attr(ast.literal_eval(text).encode("latin-1"))
    if text.startswith("proto "):
        return text_format.Parse(ast.literal_eval(text[6:]), attr_value_pb2.AttrValue())
    if re.fullmatch(r"-?\d+", text):
        return protos.attr(int(text))
    if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-?inf|nan", text):
        return protos.attr(float(text))
    return protos.attr(protos.Dtype(text))

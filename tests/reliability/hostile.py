"""Models that would do harm if bnqat ran them or trusted their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorflow.core.framework import node_def_pb2, op_def_pb2, types_pb2

from tests.mutate import mutated


def writing_files(model: Path, target: Path, marker: Path) -> Path:
    """Copy a model, and let every function and the main graph write a file as soon as it runs."""

    def edit(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            write, *constants = _writer(marker, suffix=":output:0")
            for node in function.node_def:
                node.input.append(f"^{write.name}")
            function.node_def.extend([write, *constants])
            function.control_ret[write.name] = write.name
            function.signature.control_output.append(write.name)
            function.signature.is_stateful = True
        write, *constants = _writer(marker, suffix="")
        for node in meta.graph_def.node:
            node.input.append(f"^{write.name}")
        meta.graph_def.node.extend([write, *constants])

    return mutated(model, target, edit)


def _writer(marker: Path, suffix: str) -> list[Any]:
    """Return a node that writes a file, and its constants."""
    constants = []
    for name, text in (("evil_name", str(marker)), ("evil_text", "was here")):
        constant = node_def_pb2.NodeDef(name=name, op="Const")
        constant.attr["dtype"].type = types_pb2.DT_STRING
        constant.attr["value"].tensor.dtype = types_pb2.DT_STRING
        constant.attr["value"].tensor.tensor_shape.SetInParent()
        constant.attr["value"].tensor.string_val.append(text.encode())
        constants.append(constant)
    inputs = [f"{c.name}{suffix}" for c in constants]
    return [node_def_pb2.NodeDef(name="evil_write", op="WriteFile", input=inputs), *constants]


CUSTOM = "AcmeScale"


def with_custom_ops(model: Path, target: Path, *, described: bool = True) -> Path:
    """Copy a model, and turn every Relu into an op that is registered nowhere."""

    def edit(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                node.input[:] = [i.replace(":activations:", ":scaled:") for i in node.input]
            for result, value in function.ret.items():
                function.ret[result] = value.replace(":activations:", ":scaled:")
        for graph in (meta.graph_def.node, *(f.node_def for f in meta.graph_def.library.function)):
            for node in graph:
                if node.op == "Relu":
                    node.op = CUSTOM
        if described:
            meta.meta_info_def.stripped_op_list.op.append(_definition())

    return mutated(model, target, edit)


def _definition() -> Any:
    definition = op_def_pb2.OpDef(name=CUSTOM)
    definition.input_arg.add(name="x", type_attr="T")
    definition.output_arg.add(name="scaled", type_attr="T")
    definition.attr.add(name="T", type="type")
    return definition

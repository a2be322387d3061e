"""Small changes to saved models, made in their files without bnqat's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

Edit = Callable[[Any], object]


def mutated(model: Path, target: Path, edit: Edit) -> Path:
    """Copy a model and edit its meta graph."""
    shutil.copytree(model, target)
    proto = saved_model_pb2.SavedModel.FromString((model / "saved_model.pb").read_bytes())
    edit(proto.meta_graphs[0])
    (target / "saved_model.pb").write_bytes(proto.SerializeToString(deterministic=True))
    return target


def with_record(model: Path, target: Path, edit: Edit) -> Path:
    """Copy a rewritten model and edit its record of changes."""
    shutil.copytree(model, target)
    file = target / "assets.extra" / "bnqat_changes.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))
    return target


def with_value(model: Path, target: Path, key: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Copy a model and change the value of one variable."""
    shutil.copytree(model, target)
    prefix = target / "variables" / "variables"
    reader = tf.train.load_checkpoint(str(prefix))
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    tensors[key] = change(tensors[key])
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[name]) for name in names],
    )
    return target


def function_with(meta: Any, op: str, training: bool | None = None) -> Any:
    """The first function that holds a node of an op."""
    for function in meta.graph_def.library.function:
        for node in function.node_def:
            if node.op == op and training in (None, _trains(node)):
                return function
    raise AssertionError(op)


def _trains(node: Any) -> bool:
    return bool(node.attr["is_training"].b) if "is_training" in node.attr else True


def nodes_of(function: Any, op: str) -> Iterator[Any]:
    """A function's nodes of an op."""
    return (node for node in function.node_def if node.op == op)


def rename_functions(meta: Any) -> None:
    """Number all functions anew, as TensorFlow does when it traces again."""
    names = {f.signature.name: f"{f.signature.name}_{7000 + i}" for i, f in enumerate(meta.graph_def.library.function)}
    nodes = [*meta.graph_def.node, *(n for f in meta.graph_def.library.function for n in f.node_def)]
    for node in nodes:
        node.op = names.get(node.op, node.op)
        for value in node.attr.values():
            for func in (value.func, *value.list.func) if value.WhichOneof("value") in ("func", "list") else ():
                if func.name:
                    func.name = names.get(func.name, func.name)
    for function in meta.graph_def.library.function:
        function.signature.name = names[function.signature.name]
    objects = meta.object_graph_def
    concrete = {names[name]: proto for name, proto in objects.concrete_functions.items()}
    for name in list(objects.concrete_functions):
        del objects.concrete_functions[name]
    for name, proto in concrete.items():
        objects.concrete_functions[name].CopyFrom(proto)
    for node in objects.nodes:
        function_names = node.function.concrete_functions if node.WhichOneof("kind") == "function" else []
        function_names[:] = [names[name] for name in function_names]
        if node.WhichOneof("kind") == "bare_concrete_function":
            bare = node.bare_concrete_function
            bare.concrete_function_name = names[bare.concrete_function_name]

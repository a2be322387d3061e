"""Facts about a model besides its nodes: items with named aspects, each a text.

Source: ``tensorflow/core/protobuf/{meta_graph,saved_object_graph,saver}.proto``. Paired functions of two models have
the same name here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format

from rewriter import protos
from rewriter.ir import Model, Spec
from rewriter.savedmodel.checkpoint import Checkpoint
from rewriter.savedmodel.main_graph import OBJECT_GRAPH_KEY
from rewriter.savedmodel.objects import object_paths, tensor_specs
from rewriter.savedmodel.read import Source
from rewriter.savedmodel.source import MODEL_FILES

VARIABLE, SIGNATURE, CONCRETE, OBJECT = "variable", "signature", "concrete function", "object"
COLLECTION, FILE, TENSOR, MODEL = "collection", "file", "checkpoint tensor", "model"

LOGS = ("assets.extra/bnqat.json", "assets.extra/bnqat_changes.json")
"""Files that a rewrite writes about itself; they are no part of the model."""

SYNCHRONIZATION = ("AUTO", "NONE", "ON_WRITE", "ON_READ")
AGGREGATION = ("NONE", "SUM", "MEAN", "ONLY_FIRST_REPLICA")

Item = tuple[str, str]
"""Kind and name, as ("variable", key)."""
Aspects = Mapping[str, str]
Facts = dict[Item, Aspects]


def facts(model: Model, names: Mapping[str, str], values: Container[str] = ()) -> Facts:
    """Return all items of a model, with their aspects.

    Args:
        model: a model as it was read, or as it is written.
        names: new names of functions, by their names in the model.
        values: the keys of the variables and other tensors whose values are an aspect.
    """
    source: Source = model.source
    meta = source.proto.meta_graphs[source.index]
    items: Facts = {}
    for key, variable in model.variables.items():
        aspects = {
            "name": variable.name,
            "dtype": variable.dtype,
            "shape": shape_text(variable.shape),
            "trainable": str(variable.trainable),
            "synchronization": SYNCHRONIZATION[variable.synchronization],
            "aggregation": AGGREGATION[variable.aggregation],
        }
        items[VARIABLE, key] = aspects
    for name, signature in meta.signature_def.items():
        items[SIGNATURE, name] = dict(_signature(signature))
    for name, concrete in meta.object_graph_def.concrete_functions.items():
        items[CONCRETE, names.get(name, name)] = dict(_concrete(model, concrete))
    items |= {(OBJECT, path): dict(aspects) for path, aspects in _objects(model, meta.object_graph_def, names)}
    for key, device in _devices(model, meta.object_graph_def):
        items[VARIABLE, key] = {**items[VARIABLE, key], "device": device}
    for name, collection in meta.collection_def.items():
        items[COLLECTION, name] = {"content": _collection(collection)}
    for path in sorted(source.path.rglob("*")):
        name = path.relative_to(source.path).as_posix()
        if path.is_file() and name not in (*MODEL_FILES, *LOGS) and not name.startswith("variables/"):
            items[FILE, name] = {"bytes": str(path.stat().st_size), "sha256": _file_hash(path)}
    if source.checkpoint is not None:
        items |= _tensors(source.checkpoint, model)
    for item in [item for item in items if item[0] in (VARIABLE, TENSOR) and item[1] in values]:
        if source.checkpoint is not None and item[1] in source.checkpoint.shapes:
            items[item] = {**items[item], "value": value_text(source.checkpoint.tensor(item[1]))}
    items[MODEL, "meta graph"] = dict(_meta(source, meta, names))
    return items


def shape_text(shape: tuple[int, ...] | None) -> str:
    """Return a shape as text, with ? for an unknown size."""
    return "unknown rank" if shape is None else "[" + ", ".join("?" if s < 0 else str(s) for s in shape) + "]"


def _spec(spec: Spec) -> str:
    return f"{spec.name}: {spec.dtype} {shape_text(spec.shape)}"


def _signature(proto: Any) -> Iterator[tuple[str, str]]:
    for role, tensors in (("input", proto.inputs), ("output", proto.outputs)):
        for key, info in tensors.items():
            shape = None if info.tensor_shape.unknown_rank else tuple(d.size for d in info.tensor_shape.dim)
            yield (
                f"{role} {key}",
                f"{protos.dtype_name(info.dtype) if info.dtype else 'no dtype'} {shape_text(shape)}",
            )
            yield f"tensor of {role} {key}", info.name or _one_line(info)
            if any(d.name for d in info.tensor_shape.dim):
                yield f"names of dimensions of {role} {key}", ", ".join(d.name for d in info.tensor_shape.dim)
    yield "method", proto.method_name
    for key, value in proto.defaults.items():
        yield f"default of {key}", _one_line(value)


def _concrete(model: Model, proto: Any) -> Iterator[tuple[str, str]]:
    yield "inputs", ", ".join(_spec(s) for s in tensor_specs(proto.canonicalized_input_signature))
    yield "outputs", ", ".join(_spec(s) for s in tensor_specs(proto.output_signature))
    yield "input structure", _proto_hash(proto.canonicalized_input_signature)
    yield "output structure", _proto_hash(proto.output_signature)
    keys = {number: key for key, number in model.source.numbers.items()}
    for position, number in enumerate(proto.bound_inputs):
        yield f"capture {position}", keys.get(number, f"object {number}")


def _devices(model: Model, graph: Any) -> Iterator[tuple[str, str]]:
    """Yield key and device of each variable that has a device."""
    for key, number in model.source.numbers.items():
        if graph.nodes[number].variable.device:
            yield key, graph.nodes[number].variable.device


def _objects(model: Model, graph: Any, names: Mapping[str, str]) -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Yield path and aspects of each object but variables; the path is the shortest one from the root."""
    paths = object_paths(graph)
    # The two models may number the same objects differently, so objects go by path, and variables by key.
    labels = {**paths, **{number: f"variable {key}" for key, number in model.source.numbers.items()}}
    for number, path in paths.items():
        kind = graph.nodes[number].WhichOneof("kind")
        if kind not in ("variable", None):
            yield path or "the root", _object(graph.nodes[number], kind, names, labels)


def _object(node: Any, kind: str, names: Mapping[str, str], labels: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    yield "kind", kind
    content = type(getattr(node, kind))()
    content.CopyFrom(getattr(node, kind))
    if kind == "user_object":
        yield "identifier", content.identifier
        content.ClearField("identifier")
    elif kind == "function":
        yield "functions", ", ".join(names.get(f, f) for f in content.concrete_functions)
        content.ClearField("concrete_functions")
    elif kind == "bare_concrete_function":
        yield "functions", names.get(content.concrete_function_name, content.concrete_function_name)
        content.ClearField("concrete_function_name")
    yield "content", _proto_hash(content) if kind in ("user_object", "function") else _one_line(content)
    for child in node.children:
        yield f"child {child.local_name}", labels.get(child.node_id, "") or "the root"
    for slot in node.slot_variables:
        variable = labels.get(slot.original_variable_node_id, "")
        yield f"slot {slot.slot_name} of {variable}", labels.get(slot.slot_variable_node_id, "a slot variable")
    rest = type(node)()
    rest.CopyFrom(node)
    for field in (kind, "children", "slot_variables"):
        rest.ClearField(field)
    if rest.ByteSize():
        yield "registration", _proto_hash(rest)


def _collection(proto: Any) -> str:
    kind = proto.WhichOneof("kind")
    values = list(getattr(proto, kind).value) if kind else []
    if kind == "node_list":
        return ", ".join(values)
    return f"{len(values)} of kind {kind}, {_proto_hash(proto)}"


def _tensors(checkpoint: Checkpoint, model: Model) -> Facts:
    """Return the checkpoint's tensors besides the variables: an optimizer's state, a counter of saves."""
    return {
        (TENSOR, key): {"dtype": checkpoint.dtypes[key].name, "shape": shape_text(tuple(shape))}
        for key, shape in checkpoint.shapes.items()
        if key not in model.variables and key != OBJECT_GRAPH_KEY
    }


def value_text(value: Any) -> str:
    """Return a short text that identifies a value: minimum, maximum, and a hash of the bytes."""
    array = np.asarray(value)
    # The bytes of an array of objects are addresses.
    content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    if array.dtype.kind in "fiu" and array.size:
        return f"{array.min():.6g} to {array.max():.6g}, sha256 {_hash(content)}"
    return f"sha256 {_hash(content)}"


def _meta(source: Source, meta: Any, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    info = meta.meta_info_def
    yield "tags", ", ".join(info.tags)
    yield "TensorFlow version", info.tensorflow_version
    yield "meta graph version", info.meta_graph_version
    yield "stripped default attributes", str(info.stripped_default_attrs)
    yield "TensorFlow revision", info.tensorflow_git_version
    yield "ops listed", ", ".join(o.name for o in info.stripped_op_list.op)
    for op in info.stripped_op_list.op:
        yield f"definition of {op.name}", _proto_hash(op)
    for name, alias in info.function_aliases.items():
        yield f"alias of {names.get(name, name)}", alias
    if info.HasField("any_info"):
        yield "any info", _proto_hash(info.any_info)
    for asset in meta.asset_file_def:
        yield f"asset {asset.filename}", asset.tensor_info.name
    yield "SavedModel version", str(source.proto.saved_model_schema_version)
    yield "saver", _one_line(meta.saver_def)
    yield "graph versions", _one_line(meta.graph_def.versions)
    library = meta.graph_def.library
    for gradient in library.registered_gradients:
        yield f"gradient of {gradient.registered_op_type}", names.get(gradient.gradient_func, gradient.gradient_func)
    for gradient in library.gradient:
        yield f"gradient of {gradient.function_name}", names.get(gradient.gradient_func, gradient.gradient_func)
    for index, other in enumerate(source.proto.meta_graphs):
        if index != source.index:
            yield f"meta graph {', '.join(other.meta_info_def.tags)}", _proto_hash(other)


def _one_line(proto: Any) -> str:
    text: str = text_format.MessageToString(proto, as_one_line=True)
    return text


def _proto_hash(proto: Any) -> str:
    return f"sha256 {_hash(proto.SerializeToString(deterministic=True))}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

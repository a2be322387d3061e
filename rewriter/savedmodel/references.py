"""Checks of the references in a SavedModel: object graphs, signatures, and variables against the checkpoint.

Source: ``tensorflow/core/protobuf/{saved_object_graph,trackable_object_graph,meta_graph}.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorflow.python.saved_model import nested_structure_coder

from rewriter import op_defs
from rewriter.dataflow import VariableKey, origins
from rewriter.ir import MAIN, Error, Model, Value
from rewriter.savedmodel.checkpoint import Checkpoint
from rewriter.savedmodel.graphs import main_value, tensors_of
from rewriter.savedmodel.objects import functions_of

OPS_ALONE = frozenset({"__saved_model_init_op", "__saved_model_train_op"})
"""Signatures that name an op instead of tensors: the first initialises tables, the second trains."""


def refuse_dangling(path: Path, objects: Any, trackables: Any) -> None:
    """Refuse object graphs with references to objects or concrete functions that they do not hold.

    Raises:
        Error: a reference is dangling; the message names the object and what is missing.
    """
    for number, reference in _references(objects):
        if not 0 <= number < len(objects.nodes):
            raise Error(f"{path}: {reference} is object {number}, and there are {len(objects.nodes)} objects")
    for number, node in enumerate(objects.nodes):
        for name in functions_of(node):
            if name not in objects.concrete_functions:
                raise Error(f"{path}: object {number} is the concrete function {name!r}, which does not exist")
    for number, node in enumerate(trackables.nodes):
        for child in node.children:
            if not 0 <= child.node_id < len(trackables.nodes):
                raise Error(
                    f"{path}: in the checkpoint, object {number} has a child {child.node_id}, which is not there"
                )


def refuse_disagreeing(path: Path, objects: Any, trackables: Any) -> None:
    """Refuse a checkpoint whose objects have other children than the model's objects.

    TensorFlow finds the tensors to restore through these children. Both object graphs number their objects alike; a
    checkpoint may have fewer, as functions are not saved in it.

    Raises:
        Error: the two disagree; the message names the object and the child.
    """
    if len(trackables.nodes) > len(objects.nodes):
        raise Error(
            f"{path}: the model has {len(objects.nodes)} objects, and its checkpoint has {len(trackables.nodes)}"
        )
    for number, (node, saved) in enumerate(zip(objects.nodes, trackables.nodes, strict=False)):
        children = {c.local_name: c.node_id for c in node.children}
        for child in saved.children:
            if children.get(child.local_name, child.node_id) != child.node_id:
                raise Error(
                    f"{path}: {child.local_name!r} of object {number} is object {children[child.local_name]}, "
                    f"and in the checkpoint object {child.node_id}"
                )


def refuse_structures(path: Path, objects: Any) -> None:
    """Refuse signatures of concrete functions, and enum values of variables, that TensorFlow cannot decode.

    Raises:
        Error: one cannot be decoded; the message names the function or object.
    """
    for number, node in enumerate(objects.nodes):
        for name in ("synchronization", "aggregation") if node.HasField("variable") else ():
            enum_values = node.variable.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number
            if getattr(node.variable, name) not in enum_values:
                raise Error(f"{path}: the {name} of object {number}, a variable, is none of those that there are")
        if node.WhichOneof("kind") in ("function", "bare_concrete_function"):
            function_proto = getattr(node, node.WhichOneof("kind"))
            if node.WhichOneof("kind") == "function" or function_proto.HasField("function_spec"):
                _refuse_undecodable(path, function_proto.function_spec, f"of object {number}")
    for name, function in objects.concrete_functions.items():
        whose = f"of the concrete function {name!r}"
        if function.HasField("output_signature"):
            _decoded(path, function.output_signature, whose)
        if function.HasField("canonicalized_input_signature"):
            match _decoded(path, function.canonicalized_input_signature, whose):
                case None | [list() | tuple(), dict()]:  # none where a graph was wrapped
                    pass
                case _:
                    raise Error(f"{path}: the signature {whose} is no pair of arguments and keywords")


def _refuse_undecodable(path: Path, spec: Any, whose: str) -> None:
    _decoded(path, spec.input_signature, whose)
    arguments = _decoded(path, spec.fullargspec, whose)
    if not isinstance(getattr(arguments, "args", None), list | tuple):
        raise Error(f"{path}: the argument names {whose} are damaged")


def _decoded(path: Path, structure: Any, whose: str) -> Any:
    try:
        return nested_structure_coder.decode_proto(structure)
    except Exception as e:
        # The decoder raises errors of many types; tf.saved_model.load would raise the same one.
        raise Error(f"{path}: the signature {whose} cannot be decoded") from e


def _references(objects: Any) -> Iterator[tuple[int, str]]:
    """Yield every object number in the object graph, with a description of the reference."""
    for number, node in enumerate(objects.nodes):
        for child in (*node.children, *node.dependencies):
            yield child.node_id, f"{child.local_name!r} of object {number}"
        for slot in node.slot_variables:
            yield slot.original_variable_node_id, f"what object {number} keeps a slot for"
            yield slot.slot_variable_node_id, f"the slot {slot.slot_name!r} of object {number}"
        for name, saveable in node.saveable_objects.items():
            yield saveable.save_function, f"what saves {name!r} of object {number}"
            yield saveable.restore_function, f"what restores {name!r} of object {number}"
    for name, function in objects.concrete_functions.items():
        for number in function.bound_inputs:
            yield number, f"what the concrete function {name!r} captures"


def refuse_unlike(path: Path, model: Model, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors have other shapes or dtypes than the variables.

    Raises:
        Error: one differs; the message names the variable, and both shapes and dtypes.
    """
    for key, variable in model.variables.items():
        if key not in checkpoint.shapes or variable.shape is None:
            continue
        shape, dtype = tuple(checkpoint.shapes[key]), str(checkpoint.dtypes[key].name)
        if not _compatible(variable.shape, shape) or dtype.removesuffix("_ref") != variable.dtype.removesuffix("_ref"):
            raise Error(
                f"{path}: the variable {variable.name} is {variable.dtype} of shape {list(variable.shape)}, and the "
                f"checkpoint holds {dtype} of shape {list(shape)}"
            )


def refuse_misread(path: Path, model: Model) -> None:
    """Refuse reads of variables whose ``_output_shapes`` contradicts the variable's shape.

    Raises:
        Error: one does; the message names the node, the variable and both shapes.
    """
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            stated_shapes = node.attrs["_output_shapes"].list.shape if "_output_shapes" in node.attrs else ()
            if node.op != "ReadVariableOp" or not stated_shapes or stated_shapes[0].unknown_rank:
                continue
            shape = tuple(d.size for d in stated_shapes[0].dim)
            for origin in origins(model, graph.name, Value(node.name)):
                variable = model.variables.get(origin.key) if isinstance(origin, VariableKey) else None
                if variable is not None and variable.shape is not None and not _compatible(shape, variable.shape):
                    raise Error(
                        f"{path}: the node {node.name} in {graph.name or 'the main graph'} reads {variable.name}, of "
                        f"shape {list(variable.shape)}, and is said to have the shape {list(shape)}"
                    )


def _compatible(a: Sequence[int], b: Sequence[int]) -> bool:
    """Return true if two shapes may be equal; -1 is an unknown size."""
    return len(a) == len(b) and all(m == n or -1 in (m, n) for m, n in zip(a, b, strict=True))


def refuse_signatures(path: Path, meta: Any, model: Model) -> None:
    """Refuse constants and signature tensors that the main graph lacks, and signatures unlike their function.

    Raises:
        Error: there is one; the message names the object or signature and what is wrong.
    """
    objects = {p: entry.function for entry in model.entries.values() for p in entry.paths}
    for name, signature in model.signatures.items():
        entry = model.entries.get(signature.entry)
        if objects.get(f"signatures.{name}", signature.entry) != signature.entry:
            raise Error(
                f"{path}: the signature {name!r} is {signature.entry} in the graph, and "
                f"{objects[f'signatures.{name}']} among the objects"
            )
        if entry is not None and (len(signature.inputs), len(signature.outputs)) != (
            len(entry.inputs),
            len(entry.outputs),
        ):
            raise Error(
                f"{path}: the signature {name!r} has {len(signature.inputs)} inputs and {len(signature.outputs)} "
                f"outputs, and its function {signature.entry} has {len(entry.inputs)} and {len(entry.outputs)}"
            )
    main = model.graphs[MAIN]
    for number, constant in model.constants.items():
        if constant not in main.nodes or main.nodes[constant].op != "Const":
            raise Error(f"{path}: object {number} is the constant {constant!r}, which the graph does not hold")
    for name, signature_def in meta.signature_def.items():
        for key, info in (*signature_def.inputs.items(), *signature_def.outputs.items()):
            if name in OPS_ALONE or info.WhichOneof("encoding") not in ("name", "coo_sparse"):
                continue
            for tensor in tensors_of(key, info).values():
                value = main_value(tensor)
                producer = main.nodes.get(value.node)
                if producer is None or value.port >= op_defs.output_count(model, producer):
                    raise Error(
                        f"{path}: {key!r} of the signature {name!r} is {tensor!r}, which the graph does not compute"
                    )

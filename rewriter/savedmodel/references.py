"""Do the object graphs and signatures of a SavedModel refer to what there is, and variables fit the checkpoint.

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
"""Signatures that are no tensors' but name an op: the one that initialises tables, and one that trains."""


def refuse_dangling(path: Path, objects: Any, trackables: Any) -> None:
    """Refuse object graphs that refer to objects or concrete functions that they do not hold.

    Raises:
        Error: names the object and what is missing.
    """
    for number, what in _numbers(objects):
        if not 0 <= number < len(objects.nodes):
            raise Error(f"{path}: {what} is object {number}, and there are {len(objects.nodes)} objects")
    for number, held in enumerate(objects.nodes):
        for name in functions_of(held):
            if name not in objects.concrete_functions:
                raise Error(f"{path}: object {number} is the concrete function {name!r}, which does not exist")
    for number, held in enumerate(trackables.nodes):
        for child in held.children:
            if not 0 <= child.node_id < len(trackables.nodes):
                raise Error(
                    f"{path}: in the checkpoint, object {number} has a child {child.node_id}, which is not there"
                )


def refuse_disagreeing(path: Path, objects: Any, trackables: Any) -> None:
    """Refuse a checkpoint whose objects have other children than the model's: what is restored depends on what is held.

    A checkpoint may have fewer objects, as functions are not saved in it; both number theirs alike.

    Raises:
        Error: names the object and the child.
    """
    if len(trackables.nodes) > len(objects.nodes):
        raise Error(
            f"{path}: the model has {len(objects.nodes)} objects, and its checkpoint has {len(trackables.nodes)}"
        )
    for number, (held, saved) in enumerate(zip(objects.nodes, trackables.nodes, strict=False)):
        known = {c.local_name: c.node_id for c in held.children}
        for child in saved.children:
            if known.get(child.local_name, child.node_id) != child.node_id:
                raise Error(
                    f"{path}: {child.local_name!r} of object {number} is object {known[child.local_name]}, and in the "
                    f"checkpoint object {child.node_id}"
                )


def refuse_structures(path: Path, objects: Any) -> None:
    """Refuse signatures of concrete functions, and kinds of variables, that TensorFlow cannot decode.

    Raises:
        Error: names the function or object.
    """
    for number, held in enumerate(objects.nodes):
        for name in ("synchronization", "aggregation") if held.HasField("variable") else ():
            known = held.variable.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number
            if getattr(held.variable, name) not in known:
                raise Error(f"{path}: the {name} of object {number}, a variable, is none of those that there are")
        if held.WhichOneof("kind") in ("function", "bare_concrete_function"):
            own = getattr(held, held.WhichOneof("kind"))
            if held.WhichOneof("kind") == "function" or own.HasField("function_spec"):
                _refuse_undecodable(path, own.function_spec, f"of object {number}")
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
        # Whatever TensorFlow raises here, it raises for those who load the model.
        raise Error(f"{path}: the signature {whose} cannot be decoded") from e


def _numbers(objects: Any) -> Iterator[tuple[int, str]]:
    """Every number of an object, and what is said to be it."""
    for number, held in enumerate(objects.nodes):
        for child in (*held.children, *held.dependencies):
            yield child.node_id, f"{child.local_name!r} of object {number}"
        for slot in held.slot_variables:
            yield slot.original_variable_node_id, f"what object {number} keeps a slot for"
            yield slot.slot_variable_node_id, f"the slot {slot.slot_name!r} of object {number}"
        for name, saveable in held.saveable_objects.items():
            yield saveable.save_function, f"what saves {name!r} of object {number}"
            yield saveable.restore_function, f"what restores {name!r} of object {number}"
    for name, function in objects.concrete_functions.items():
        for number in function.bound_inputs:
            yield number, f"what the concrete function {name!r} captures"


def refuse_unlike(path: Path, model: Model, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that holds other shapes or dtypes than the variables have.

    Raises:
        Error: names the variable and both.
    """
    for key, variable in model.variables.items():
        if key not in checkpoint.shapes or variable.shape is None:
            continue
        shape, dtype = tuple(checkpoint.shapes[key]), str(checkpoint.dtypes[key].name)
        if not _alike(variable.shape, shape) or dtype.removesuffix("_ref") != variable.dtype.removesuffix("_ref"):
            raise Error(
                f"{path}: the variable {variable.name} is {variable.dtype} of shape {list(variable.shape)}, and the "
                f"checkpoint holds {dtype} of shape {list(shape)}"
            )


def refuse_misread(path: Path, model: Model) -> None:
    """Refuse reads of variables that are said to have another shape than the variable.

    Raises:
        Error: names the node, the variable and both shapes.
    """
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            said = node.attrs["_output_shapes"].list.shape if "_output_shapes" in node.attrs else ()
            if node.op != "ReadVariableOp" or not said or said[0].unknown_rank:
                continue
            shape = tuple(d.size for d in said[0].dim)
            for origin in origins(model, graph.name, Value(node.name)):
                variable = model.variables.get(origin.key) if isinstance(origin, VariableKey) else None
                if variable is not None and variable.shape is not None and not _alike(shape, variable.shape):
                    raise Error(
                        f"{path}: the node {node.name} in {graph.name or 'the main graph'} reads {variable.name}, of "
                        f"shape {list(variable.shape)}, and is said to have the shape {list(shape)}"
                    )


def _alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes may be the same; -1 is an unknown size."""
    return len(a) == len(b) and all(m == n or -1 in (m, n) for m, n in zip(a, b, strict=True))


def refuse_signatures(path: Path, meta: Any, model: Model) -> None:
    """Refuse constants and signatures' tensors that the main graph lacks, and signatures unlike their function.

    Raises:
        Error: names the object or signature and what is wrong.
    """
    objects = {p: entry.function for entry in model.entries.values() for p in entry.paths}
    for name, known in model.signatures.items():
        entry = model.entries.get(known.entry)
        if objects.get(f"signatures.{name}", known.entry) != known.entry:
            raise Error(
                f"{path}: the signature {name!r} is {known.entry} in the graph, and {objects[f'signatures.{name}']} "
                "among the objects"
            )
        if entry is not None and (len(known.inputs), len(known.outputs)) != (len(entry.inputs), len(entry.outputs)):
            raise Error(
                f"{path}: the signature {name!r} has {len(known.inputs)} inputs and {len(known.outputs)} outputs, and "
                f"its function {known.entry} has {len(entry.inputs)} and {len(entry.outputs)}"
            )
    main = model.graphs[MAIN]
    for number, constant in model.constants.items():
        if constant not in main.nodes or main.nodes[constant].op != "Const":
            raise Error(f"{path}: object {number} is the constant {constant!r}, which the graph does not hold")
    for name, signature in meta.signature_def.items():
        for key, info in (*signature.inputs.items(), *signature.outputs.items()):
            if name in OPS_ALONE or info.WhichOneof("encoding") not in ("name", "coo_sparse"):
                continue
            for tensor in tensors_of(key, info).values():
                value = main_value(tensor)
                held = main.nodes.get(value.node)
                if held is None or value.port >= op_defs.output_count(model, held):
                    raise Error(
                        f"{path}: {key!r} of the signature {name!r} is {tensor!r}, which the graph does not compute"
                    )

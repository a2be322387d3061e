"""Writes a `Model` as a SavedModel."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tensorflow.core.framework import function_pb2
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from rewriter import op_defs, protos
from rewriter.dataflow import call_graph
from rewriter.ir import ARG, MAIN, Endpoint, Error, Model, Node, Value
from rewriter.savedmodel import checkpoint, main_graph, v1
from rewriter.savedmodel.captured import recapture
from rewriter.savedmodel.files import stamps
from rewriter.savedmodel.graphs import definitions, described, tensor_info, write_function, write_main
from rewriter.savedmodel.objects import GENERIC, Additions, make_user_object, synchronized_otherwise
from rewriter.savedmodel.read import Source, checkpoint_in, interpreted, signatures_of
from rewriter.savedmodel.references import refuse_disagreeing
from rewriter.savedmodel.shrink import (
    checkpoint_keys,
    hold_captured,
    share_by_name,
    shrink_meta,
    shrink_objects,
    shrink_saver,
)
from rewriter.savedmodel.source import MODEL_FILES
from rewriter.savedmodel.staging import refuse_overlap, staged

KERAS_PREFIX = "_tf_keras_"
KERAS_METADATA = "keras_metadata.pb"
FINGERPRINT = "fingerprint.pb"
EXTRA = "assets.extra"
PREDICT = "tensorflow/serving/predict"


@dataclass(frozen=True)
class Written:
    """A model that was written to its working directory, which is not yet the destination.

    Attributes:
        model: the model as a reader will find it; only its graphs are those that were written, not read again. Its
            source is the new SavedModel.
        changes: the changes besides the graphs, a sentence each.
    """

    model: Model
    changes: list[str]


def save(
    model: Model,
    target: str | Path,
    overwrite: bool = False,
    log: Callable[[Written], Mapping[str, str]] | None = None,
    without: Collection[str] = (),
) -> list[str]:
    """Write a model to a new directory, whole or not at all.

    Args:
        model: the model to write, with its source.
        target: the directory to make.
        overwrite: replace a SavedModel that is there.
        log: returns texts to write to ``assets.extra``, by file name.
        without: names of files in ``assets.extra`` that are not copied.

    Returns:
        The changes besides the graphs, a sentence each; nothing if no pass changed anything.

    Raises:
        Error: the destination exists, or the model or a file cannot be written.
    """
    source: Source = model.source
    target = Path(target)
    refuse_overlap(source.path, target)
    try:
        with staged(target, overwrite) as directory:
            changes = _write(model, directory, log, without)
            _refuse_changed(source)
    except Error:
        _refuse_changed(source)  # a changed source explains whatever else went wrong
        raise
    return changes


def _write(
    model: Model,
    directory: Path,
    log: Callable[[Written], Mapping[str, str]] | None,
    without: Collection[str],
) -> list[str]:
    """Write a model to an empty directory; return the changes besides the graphs."""
    source: Source = model.source
    changed = bool(model.attributes or model.assigned or synchronized_otherwise(model))
    changed = changed or len(model.graphs) != len(source.protos)
    changed = changed or any(model.graphs.get(n) is not g for n, (g, _) in source.protos.items())
    written, changes = _lower(model) if changed else (model, [])
    proto, trackables = written.source.proto, written.source.trackables
    _write_proto(directory / source.file, proto)
    # The fingerprint is that of the source's graph; from Keras' metadata, Keras would rebuild the source's layers.
    _copy_files(source.path, directory, drop={KERAS_METADATA, FINGERPRINT} if changed else set())
    for name in without:
        (directory / EXTRA / name).unlink(missing_ok=True)
    if changed:
        changes += [f"{n} removed" for n in (KERAS_METADATA, FINGERPRINT) if (source.path / n).exists()]
    if source.checkpoint is not None and not changed:
        _copy_directory(source.checkpoint.prefix.parent, directory / "variables")
    if changed and (source.checkpoint is not None or _added(model)):
        prefix = directory / "variables" / "variables"
        keys = checkpoint_keys(trackables, source.checkpoint.shapes) if _shrunk(model) and source.checkpoint else None
        checkpoint.copy(source.checkpoint, prefix, _changed_tensors(model, trackables), keys)
    if log is not None:
        extra = directory / EXTRA
        extra.mkdir(exist_ok=True)
        reread_source = replace(written.source, path=directory, checkpoint=checkpoint_in(directory))
        reread_model = interpreted(replace(written, source=reread_source))
        for name, text in log(Written(reread_model, changes)).items():
            (extra / name).write_text(text, encoding="utf-8")
    return changes


def _refuse_changed(source: Source) -> None:
    """Refuse a source that changed: it may have been read in part before, in part after the change.

    Raises:
        Error: the stamps of its files are no longer those taken before reading.
    """
    if stamps(source.path) != source.stamps:
        raise Error(f"{source.path} changed while it was read; nothing was written, run this again when it is whole")


def _write_proto(file: Path, proto: Any) -> None:
    if file.suffix == ".pbtxt":
        file.write_text(text_format.MessageToString(proto), encoding="utf-8")
    else:
        file.write_bytes(proto.SerializeToString(deterministic=True))


def _copy_files(source: Path, target: Path, drop: set[str]) -> None:
    """Copy everything that is neither the graph nor the checkpoint: assets, assets.extra, and any other files."""
    for path in sorted(source.iterdir()):
        if path.name in {*MODEL_FILES, "variables"} | drop:
            continue
        if path.is_dir():
            _copy_directory(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _copy_directory(source: Path, target: Path) -> None:
    """Copy a directory, and make the copy writable even if the source is read-only."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder, _, _ in os.walk(target):
        Path(folder).chmod(Path(folder).stat().st_mode | stat.S_IRWXU)


def _changed_tensors(model: Model, trackables: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    if model.object_based:
        tensors[main_graph.OBJECT_GRAPH_KEY] = trackables.SerializeToString(deterministic=True)
    for variable in _added(model):
        tensors[variable.key] = np.asarray(variable.initial, dtype=variable.dtype)
    # A later pass may have removed a variable that was assigned.
    return tensors | {key: value for key, value in model.assigned.items() if key in model.variables}


def _added(model: Model) -> list[Any]:
    return [v for v in model.variables.values() if v.initial is not None]


def _shrunk(model: Model) -> bool:
    """Return true if the model lacks concrete functions or variables of its source."""
    source: Source = model.source
    functions = set(source.proto.meta_graphs[source.index].object_graph_def.concrete_functions)
    return not (model.entries.keys() >= functions and model.variables.keys() >= source.numbers.keys())


def _lower(model: Model) -> tuple[Model, list[str]]:
    """Return the model in the form that the format needs, and the changes besides the graphs, a sentence each.

    The source of the returned model holds the protos to write.
    """
    source: Source = model.source
    proto = saved_model_pb2.SavedModel()
    proto.CopyFrom(source.proto)
    meta = proto.meta_graphs[source.index]
    if not model.object_based:
        extended = v1.extend(model, meta, _added(model))
        _write_graphs(extended, meta)
        for signature in (*model.signatures.values(), *model.main_signatures.values()):
            v1.write_signature(meta, signature)
        return replace(extended, source=replace(source, proto=proto)), []
    # Refused here and not when the model is read: inspecting and comparing need no agreement.
    refuse_disagreeing(source.path, meta.object_graph_def, source.trackables)
    trackables = trackable_object_graph_pb2.TrackableObjectGraph()
    trackables.CopyFrom(source.trackables)
    shrunk = _shrunk(model)
    if shrunk:
        model = shrink_objects(model, meta.object_graph_def, trackables)
        stored = () if source.checkpoint is None else source.checkpoint.shapes
        model = shrink_saver(model, meta.saver_def, checkpoint_keys(trackables, stored))
    model = recapture(model, meta.object_graph_def)
    for endpoint in (*model.attributes.values(), *model.new_signatures.values()):
        if isinstance(endpoint, Endpoint):
            meta.object_graph_def.concrete_functions[endpoint.function].SetInParent()
    Additions(model, meta.object_graph_def, trackables, model.source.numbers).add()
    if shrunk:
        hold_captured(meta.object_graph_def, trackables)
    changes = make_loadable(meta.object_graph_def, trackables)
    # After all changes of the checkpoint's object graph, as the main graph holds that as a constant.
    model, calls = main_graph.extend(
        model, meta.saver_def, _added(model), trackables.SerializeToString(deterministic=True)
    )
    if shrunk:
        model = replace(model, graphs={**model.graphs, MAIN: share_by_name(model.graphs[MAIN])})
    _write_graphs(model, meta)
    if shrunk:
        source_signatures = signatures_of(source.proto.meta_graphs[source.index], source.protos[MAIN][0])
        removed_signatures = source_signatures.keys() - model.signatures.keys()
        shrink_meta(meta, model.graphs, removed_signatures)
        if len(proto.meta_graphs) > 1:
            # All meta graphs share one checkpoint, which now lacks tensors that the others restore.
            changes.append(f"{len(proto.meta_graphs) - 1} other meta graphs of the source are left out")
    for name, call in calls.items():
        _write_signature(model, meta, name, call)
    written = replace(model.source, proto=proto, trackables=trackables)
    if shrunk:
        written = replace(
            written,
            proto=saved_model_pb2.SavedModel(
                saved_model_schema_version=proto.saved_model_schema_version, meta_graphs=[meta]
            ),
            index=0,
        )
    return replace(model, source=written), changes


def make_loadable(objects: Any, trackables: Any) -> list[str]:
    """Make ``tf.saved_model.load`` load the model without Keras, and Keras load it without rebuilding its layers.

    Optimizer slots need an optimizer's method that plain objects lack. Keras would rebuild objects marked as its own
    from metadata, and silently lose the rewrite.

    Returns:
        The changes, a sentence each.
    """
    changes = []
    slots = {s.slot_variable_node_id for n in objects.nodes for s in n.slot_variables}
    slots -= {c.node_id for n in objects.nodes for c in n.children}
    captured = {number for f in objects.concrete_functions.values() for number in f.bound_inputs}
    _hold_captured_slots(objects, trackables, captured)
    slots -= captured
    for graph in (objects, trackables):
        for number, node in enumerate(graph.nodes):
            node.ClearField("slot_variables")
            if number in slots:
                node.Clear()  # removing it would renumber the others
    for number in sorted(slots):
        make_user_object(objects.nodes[number])
    if slots:
        changes.append(f"{len(slots)} optimizer slot variables dropped: the state of the float training is not loaded")
    relabelled = 0
    for node in objects.nodes:
        if node.WhichOneof("kind") == "user_object" and node.user_object.identifier.startswith(KERAS_PREFIX):
            node.user_object.identifier = GENERIC
            node.user_object.ClearField("metadata")
            relabelled += 1
    if relabelled:
        changes.append(f"{relabelled} Keras objects relabelled as plain objects, so that Keras runs the graph as it is")
    return changes


def _hold_captured_slots(objects: Any, trackables: Any, captured: set[int]) -> None:
    """Make captured slots attributes of their optimizer; otherwise nothing would keep them alive."""
    for number, node in enumerate(objects.nodes):
        for slot in node.slot_variables:
            if slot.slot_variable_node_id in captured:
                name = f"{slot.slot_name}_{slot.original_variable_node_id}"
                for graph in (objects, trackables):
                    graph.nodes[number].children.add(node_id=slot.slot_variable_node_id, local_name=name)


def _write_graphs(model: Model, meta: Any) -> None:
    """Write all graphs to a meta graph; a graph that no pass touched is the proto that was read."""
    source: Source = model.source
    graph_def = meta.graph_def
    library = type(graph_def.library)()
    library.gradient.extend(graph_def.library.gradient)
    for kind, gradient in model.gradients.items():
        library.registered_gradients.add(registered_op_type=kind, gradient_func=gradient.function)
    find = _definitions(model, meta)
    for name, graph in model.graphs.items():
        if name != MAIN:
            read, proto = source.protos.get(name, (None, None))
            library.function.append(proto if read is graph else write_function(graph, find))
    if source.protos[MAIN][0] is not model.graphs[MAIN]:
        graph_def.CopyFrom(write_main(model.graphs[MAIN]))
    graph_def.library.CopyFrom(library)
    listed = {o.name for o in meta.meta_info_def.stripped_op_list.op}
    # V1 importers take the definitions of the producer's ops from this list.
    op_names = {n.op for g in model.graphs.values() for n in g.nodes.values()} - set(model.graphs) - {ARG}
    meta.meta_info_def.stripped_op_list.op.extend(described(op_names - listed))
    meta.meta_info_def.stripped_op_list.op.sort(key=lambda o: o.name)


def library(model: Model, functions: Collection[str]) -> Any:
    """Return some functions of a model, and those that they call, as a ``FunctionDefLibrary``."""
    calls = model.analysis(call_graph)
    find = _definitions(model, model.source.proto.meta_graphs[model.source.index])
    proto = function_pb2.FunctionDefLibrary()
    for name in sorted(frozenset().union(*(calls.reached(f) for f in functions))):
        proto.function.append(write_function(model.graphs[name], find))
    return proto


def _definitions(model: Model, meta: Any) -> Callable[[str], Any]:
    """Return a lookup of op definitions for writing; a function of the model is defined by its current results."""
    find = definitions(meta.graph_def.library, model.op_defs)

    def definition_of(op: str) -> Any:
        graph = model.graphs.get(op)
        if graph is None:
            return find(op)
        definition = type(op_defs.registered("NoOp"))(name=op)
        for result in graph.results:
            definition.output_arg.add(name=result.name, type=protos.dtype_number(result.dtype))
        return definition

    return definition_of


def _write_signature(model: Model, meta: Any, name: str, call: Node) -> None:
    """Write the SignatureDef of a new signature, with the tensors of its call.

    It starts as a copy of the SignatureDef of `endpoint.like`, unless the endpoint names inputs of its own.
    """
    endpoint = model.new_signatures[name]
    signature = meta.signature_def[name]
    if endpoint.inputs:
        entry = model.entries[endpoint.function]
        for spec, value in zip(entry.inputs, call.inputs, strict=False):
            signature.inputs[spec.name].CopyFrom(tensor_info(spec, value))
        for port, spec in enumerate(entry.outputs):
            signature.outputs[spec.name].CopyFrom(tensor_info(spec, Value(call.name, port)))
        signature.method_name = PREDICT
        return
    like = model.signature_of(endpoint.like)
    signature.CopyFrom(meta.signature_def[like.name])
    # The call's remaining inputs are captures.
    for keyword, value in zip(like.inputs, call.inputs, strict=False):
        signature.inputs[keyword].name = f"{value.node}:0"
    for tensor in signature.outputs.values():
        tensor.name = f"{call.name}:{tensor.name.partition(':')[2]}"
    for port, spec in enumerate(endpoint.returns):
        signature.outputs[spec.name].CopyFrom(tensor_info(spec, Value(call.name, port)))

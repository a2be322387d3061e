"""Reads a SavedModel into a `Model`, without executing anything in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from rewriter import op_defs, ops
from rewriter.check import check, check_entries
from rewriter.conformance import conform
from rewriter.ir import MAIN, Error, Gradient, Graph, Model, Signature
from rewriter.savedmodel import v1
from rewriter.savedmodel.checkpoint import Checkpoint
from rewriter.savedmodel.files import Stamps, refuse_names, stamps
from rewriter.savedmodel.graphs import definitions, main_value, read_function, read_main
from rewriter.savedmodel.main_graph import OBJECT_GRAPH_KEY
from rewriter.savedmodel.objects import owned, read_entries, read_variables
from rewriter.savedmodel.references import (
    OPS_ALONE,
    refuse_dangling,
    refuse_misread,
    refuse_signatures,
    refuse_structures,
    refuse_unlike,
)
from rewriter.savedmodel.source import require_model

SERVE_TAG = "serve"


@dataclass(frozen=True)
class Source:
    """The SavedModel that a Model was read from; `rewriter.savedmodel` needs it to write the model again.

    Attributes:
        path: the directory.
        file: the name of the file with the graph.
        proto: the SavedModel; never changed.
        index: the index of the meta graph that was read.
        checkpoint: its checkpoint; None if it has none.
        trackables: the checkpoint's object graph.
        numbers: each variable's number in the object graph, by key.
        protos: each graph as read, with its proto: a graph that no pass touched is written verbatim.
        stamps: the files' stamps, taken before any file was read.
    """

    path: Path
    file: str
    proto: Any
    index: int
    checkpoint: Checkpoint | None
    trackables: Any
    numbers: Mapping[str, int]
    protos: Mapping[str, tuple[Graph, Any]]
    stamps: Stamps


def load(path: str | Path, tags: Collection[str] | None = None) -> Model:
    """Read the SavedModel in a directory.

    Args:
        path: the directory.
        tags: the tags of the meta graph to read, if the model holds several; None stands for the one with
            the tag "serve".

    Raises:
        Error: the model is missing, damaged, or of a kind that is not supported; the message says which.
    """
    path = Path(path)
    file = require_model(path)
    # Before anything is read, so that a change at any later time is noticed (`write._refuse_changed`).
    stamped = stamps(path)
    proto = _read_proto(file)
    index = _meta_graph(path, proto, tags)
    meta = proto.meta_graphs[index]
    for meta_graph in proto.meta_graphs:  # the other meta graphs are written unchanged, so all are checked
        refuse_names(path, meta_graph)
    stripped_ops = {o.name: o for o in meta.meta_info_def.stripped_op_list.op}
    find = definitions(meta.graph_def.library, stripped_ops)
    protos: dict[str, tuple[Graph, Any]] = {MAIN: (read_main(meta.graph_def), meta.graph_def)}
    for function in meta.graph_def.library.function:
        if not function.signature.name or function.signature.name in protos:
            raise Error(f"{path} holds two functions called {function.signature.name}, or one without a name")
        if op_defs.registered(function.signature.name) is not None:  # its calls would look like nodes of the op
            raise Error(f"{path} holds a function called {function.signature.name}, which is the name of an op")
        protos[function.signature.name] = (read_function(function, find), function)
    graphs = {name: graph for name, (graph, _) in protos.items()}
    checkpoint = checkpoint_in(path)
    trackables = _trackables(path, checkpoint)
    refuse_dangling(path, meta.object_graph_def, trackables)
    refuse_structures(path, meta.object_graph_def)
    source = Source(path, file.name, proto, index, checkpoint, trackables, {}, protos, stamped)
    values = None if checkpoint is None else checkpoint.tensor
    objects = bool(meta.object_graph_def.nodes)
    registered = meta.graph_def.library.registered_gradients
    concrete = dict(meta.object_graph_def.concrete_functions)
    gradients = {g.registered_op_type: Gradient(g.gradient_func, concrete.get(g.gradient_func)) for g in registered}
    for kind, gradient in gradients.items():
        if gradient.function not in graphs:
            raise Error(f"{path}: the gradient {kind} is the function {gradient.function}, which does not exist")
    model = Model(graphs, gradients=gradients, op_defs=stripped_ops, values=values, source=source, object_based=objects)
    # First: whatever follows takes it for granted that attributes are there and of their op's types.
    conform(model)
    check(model)
    model = interpreted(model)
    check_entries(model)
    refuse_signatures(path, meta, model)
    if model.variables and not objects and not meta.saver_def.restore_op_name:
        raise Error(f"{path} has variables and nothing that restores them")
    if checkpoint is not None and objects:  # the saver of TensorFlow 1 may restore parts of a tensor
        refuse_unlike(path, model, checkpoint)
    refuse_misread(path, model)
    if checkpoint is None and model.variables:
        raise Error(f"{path} has variables but no directory 'variables' with their values")
    return model


def interpreted(model: Model) -> Model:
    """Return a model with the variables, concrete functions and signatures that its source's proto describes."""
    meta = model.source.proto.meta_graphs[model.source.index]
    return _from_objects(model, meta) if model.object_based else _from_collections(model, meta)


def _from_objects(model: Model, meta: Any) -> Model:
    numbered = read_variables(meta.object_graph_def, model.source.trackables)
    return replace(
        model,
        variables={v.key: v for v in numbered.values()},
        entries=read_entries(meta.object_graph_def, model.graphs, numbered),
        signatures=signatures_of(meta, model.graphs[MAIN]),
        constants={
            n: node.constant.operation
            for n, node in enumerate(meta.object_graph_def.nodes)
            if node.WhichOneof("kind") == "constant"
        },
        owned=owned(meta.object_graph_def),
        root_names=frozenset(c.local_name for c in meta.object_graph_def.nodes[0].children),
        source=replace(model.source, numbers={v.key: n for n, v in numbered.items()}),
    )


def _from_collections(model: Model, meta: Any) -> Model:
    main = model.graphs[MAIN]
    return replace(
        model,
        variables=v1.read_variables(meta, main, model),
        signatures=v1.read_signatures(meta, main),
        collections=v1.read_collections(meta),
    )


def _read_proto(file: Path) -> Any:
    proto = saved_model_pb2.SavedModel()
    try:
        if file.suffix == ".pbtxt":
            text_format.Parse(file.read_text(encoding="utf-8"), proto)
        else:
            proto.ParseFromString(file.read_bytes())
    except (DecodeError, text_format.ParseError, ValueError, OSError, RecursionError) as e:
        raise Error(f"{file} cannot be read: it is truncated, damaged or no SavedModel ({e})") from e
    if not proto.meta_graphs or not any(m.HasField("graph_def") for m in proto.meta_graphs):
        raise Error(f"{file} holds no graph: it is truncated, damaged or no SavedModel")
    return proto


def _trackables(path: Path, checkpoint: Checkpoint | None) -> Any:
    """Return the checkpoint's object graph; an empty one if there is none."""
    trackables = trackable_object_graph_pb2.TrackableObjectGraph()
    if checkpoint is not None and OBJECT_GRAPH_KEY in checkpoint.shapes:
        try:
            trackables.ParseFromString(checkpoint.bytes_of(OBJECT_GRAPH_KEY))
        except (DecodeError, TypeError) as e:
            raise Error(f"{path}: the object graph of the checkpoint is damaged") from e
    return trackables


def _meta_graph(path: Path, proto: Any, tags: Collection[str] | None) -> int:
    """Return the index of the meta graph to read."""
    tag_sets = [frozenset(m.meta_info_def.tags) for m in proto.meta_graphs]
    listing = "; ".join(",".join(sorted(tag_set)) or "no tags" for tag_set in tag_sets)
    if tags is not None:
        if frozenset(tags) not in tag_sets:
            raise Error(f"{path} holds no meta graph with the tags {','.join(sorted(tags))}; it holds: {listing}")
        return tag_sets.index(frozenset(tags))
    if len(tag_sets) == 1:
        return 0
    serving = [i for i, tag_set in enumerate(tag_sets) if tag_set == {SERVE_TAG}]
    if len(serving) != 1:
        raise Error(f"{path} holds several meta graphs ({listing}); choose one with --tags")
    return serving[0]


def checkpoint_in(path: Path) -> Checkpoint | None:
    """Return the checkpoint of a SavedModel; None if it has none."""
    prefix = path / "variables" / "variables"
    # TensorFlow 1 leaves an empty directory where there is no variable.
    return Checkpoint(prefix) if prefix.parent.is_dir() and any(prefix.parent.iterdir()) else None


def signatures_of(meta: Any, main: Graph) -> dict[str, Signature]:
    """Return the signatures that a single concrete function computes.

    Input names are in the order of the function's arguments, output names in the order of its results.
    """
    concrete = set(meta.object_graph_def.concrete_functions)
    signatures = {}
    for name, signature in sorted(meta.signature_def.items()):
        if name in OPS_ALONE or not signature.outputs:
            continue
        producers = {t.name.partition(":")[0] for t in signature.outputs.values()}
        producer = main.nodes.get(producers.pop()) if len(producers) == 1 else None
        form = None if producer is None else ops.CALLS.get(producer.op)
        if producer is None or form is None or form.callees != ("f",):
            continue
        function = op_defs.attribute(producer, "f").func.name
        if function not in concrete:
            continue
        order = {v.node: i for i, v in enumerate(producer.inputs)}
        inputs = sorted(signature.inputs, key=lambda k: order.get(signature.inputs[k].name.partition(":")[0], -1))
        outputs = sorted(signature.outputs, key=lambda k: main_value(signature.outputs[k].name).port)
        signatures[name] = Signature(name, function, tuple(inputs), tuple(outputs))
    return signatures

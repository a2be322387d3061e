"""Reading a SavedModel into a `Model`. Nothing in the model is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from rewriter.ir import MAIN, Error, Graph, Model, Signature
from rewriter.savedmodel.checkpoint import Checkpoint
from rewriter.savedmodel.graphs import definitions, read_function, read_main
from rewriter.savedmodel.main_graph import OBJECT_GRAPH_KEY
from rewriter.savedmodel.objects import read_entries, read_variables
from rewriter.savedmodel.staging import require_model

INIT_SIGNATURE = "__saved_model_init_op"


@dataclass(frozen=True)
class Source:
    """What a Model was read from: `rewriter.savedmodel` needs it to write the model again.

    Attributes:
        proto: the SavedModel; never changed.
        trackables: the checkpoint's object graph.
        numbers: each variable's number in the object graph, by key.
        protos: each graph as read, with its proto, so that what no pass touched goes back verbatim.
    """

    path: Path
    proto: Any
    checkpoint: Checkpoint | None
    trackables: Any
    numbers: Mapping[str, int]
    protos: Mapping[str, tuple[Graph, Any]]


def load(path: str | Path) -> Model:
    """Read the SavedModel in a directory.

    Raises:
        Error: it is missing, damaged, or of a kind that is not supported; the message says which.
    """
    path = Path(path)
    proto = _read_proto(path)
    meta = _only_meta_graph(path, proto)
    find = definitions(meta.graph_def.library, {o.name: o for o in meta.meta_info_def.stripped_op_list.op})
    protos: dict[str, tuple[Graph, Any]] = {MAIN: (read_main(meta.graph_def), meta.graph_def)}
    for function in meta.graph_def.library.function:
        protos[function.signature.name] = (read_function(function, find), function)
    graphs = {name: graph for name, (graph, _) in protos.items()}
    checkpoint = _checkpoint(path)
    if checkpoint is None and any(n.HasField("variable") for n in meta.object_graph_def.nodes):
        raise Error(f"{path} has variables but no directory 'variables' with their values")
    trackables = trackable_object_graph_pb2.TrackableObjectGraph()
    if checkpoint is not None and OBJECT_GRAPH_KEY in checkpoint.shapes:
        trackables.ParseFromString(checkpoint.bytes_of(OBJECT_GRAPH_KEY))
    numbered = read_variables(meta.object_graph_def, trackables)
    return Model(
        graphs,
        {v.key: v for v in numbered.values()},
        read_entries(meta.object_graph_def, graphs, numbered),
        _signatures(meta, graphs[MAIN]),
        frozenset(c.local_name for c in meta.object_graph_def.nodes[0].children),
        op_defs={o.name: o for o in meta.meta_info_def.stripped_op_list.op},
        source=Source(path, proto, checkpoint, trackables, {v.key: n for n, v in numbered.items()}, protos),
    )


def _read_proto(path: Path) -> Any:
    file = require_model(path)
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as e:
        raise Error(f"{file} cannot be read: it is truncated, damaged or no SavedModel ({e})") from e
    if not proto.meta_graphs or not any(m.HasField("graph_def") for m in proto.meta_graphs):
        raise Error(f"{file} holds no graph: it is truncated, damaged or no SavedModel")
    return proto


def _only_meta_graph(path: Path, proto: Any) -> Any:
    if len(proto.meta_graphs) > 1:
        tags = "; ".join(",".join(m.meta_info_def.tags) for m in proto.meta_graphs)
        raise Error(f"{path} holds several meta graphs ({tags}); only models with one are supported")
    meta = proto.meta_graphs[0]
    if not meta.object_graph_def.nodes:
        raise Error(f"{path} has no object graph: it was saved in TensorFlow 1's format, which is not supported")
    return meta


def _checkpoint(path: Path) -> Checkpoint | None:
    prefix = path / "variables" / "variables"
    return Checkpoint(prefix) if prefix.parent.is_dir() else None


def _signatures(meta: Any, main: Graph) -> dict[str, Signature]:
    """The signatures that a single function computes, with input names in the order of its arguments."""
    concrete = set(meta.object_graph_def.concrete_functions)
    found = {}
    for name, signature in sorted(meta.signature_def.items()):
        if name == INIT_SIGNATURE or not signature.outputs:
            continue
        producers = {t.name.partition(":")[0] for t in signature.outputs.values()}
        producer = main.nodes.get(producers.pop()) if len(producers) == 1 else None
        if producer is None or "f" not in producer.attrs or producer.attrs["f"].func.name not in concrete:
            continue
        order = {v.node: i for i, v in enumerate(producer.inputs)}
        inputs = sorted(signature.inputs, key=lambda k: order.get(signature.inputs[k].name.partition(":")[0], -1))
        outputs = sorted(signature.outputs, key=lambda k: int(signature.outputs[k].name.partition(":")[2] or 0))
        found[name] = Signature(name, producer.attrs["f"].func.name, tuple(inputs), tuple(outputs))
    return found

"""Ops that reach beyond the model: files, the network, Python.

Source: op definitions of TensorFlow 2.21 (``tensorflow/core/ops``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rewriter import op_defs
from rewriter.dataflow import Argument, Call, call_graph, follow
from rewriter.ir import MAIN, Error, Graph, Model, Node, Value
from rewriter.savedmodel.graphs import tensors_of

# fmt: off
FILES = frozenset(
    {
        "CSVDataset", "CSVDatasetV2", "CacheDataset", "CacheDatasetV2", "CalibrationStatisticsSaver",
        "CreateSummaryDbWriter", "CreateSummaryFileWriter", "DTensorRestoreV2", "DatasetFromGraph",
        "DatasetToTFRecord", "DecodeProtoV2", "DistributedSave", "DumpTensor", "EncodeProto", "ExperimentalCSVDataset",
        "ExperimentalDatasetToTFRecord", "ExperimentalLMDBDataset", "ExperimentalMatchingFilesDataset",
        "ExperimentalSqlDataset", "FileSystemSetConfiguration", "FixedLengthRecordDataset",
        "FixedLengthRecordDatasetV2", "FixedLengthRecordReader", "FixedLengthRecordReaderV2",
        "FixedUnigramCandidateSampler", "GenerateVocabRemapping", "InitializeTableFromTextFile",
        "InitializeTableFromTextFileV2", "LMDBDataset", "LMDBReader", "ListSnapshotChunksDataset",
        "LoadAndRemapMatrix", "LoadDataset", "MatchingFiles", "MatchingFilesDataset", "MergeV2Checkpoints", "ReadFile",
        "RecordInput", "Restore", "RestoreSlice", "RestoreV2", "Save", "SaveDataset", "SaveDatasetV2", "SaveSlices",
        "SaveV2", "Skipgram", "SnapshotChunkDataset", "SnapshotDataset", "SnapshotDatasetReader", "SnapshotDatasetV2",
        "SnapshotNestedDatasetReader", "SqlDataset", "TFRecordDataset", "TFRecordDatasetV2", "TFRecordReader",
        "TFRecordReaderV2", "TensorSliceDataset", "TextLineDataset", "TextLineReader", "TextLineReaderV2",
        "WholeFileReader", "WholeFileReaderV2", "WriteFile",
    }
)
NETWORK = frozenset(
    {
        "ConfigureAndInitializeGlobalTPU", "ConfigureDistributedTPU", "DataServiceDataset", "DataServiceDatasetV2",
        "DataServiceDatasetV3", "DataServiceDatasetV4", "DebugIdentity", "DebugIdentityV2", "DebugIdentityV3",
        "DebugNanCount", "DebugNumericSummary", "DebugNumericSummaryV2", "RegisterDataset", "RegisterDatasetV2",
        "RemoteCall", "RpcCall", "RpcClient", "RpcServer", "RpcServerRegister", "RpcServerStart",
    }
)
PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
# fmt: on
REACHED = {**dict.fromkeys(FILES, "files"), **dict.fromkeys(NETWORK, "the network"), **dict.fromkeys(PYTHON, "Python")}
"""What each op reaches."""

SAVES = frozenset({"MergeV2Checkpoints", "Save", "SaveSlices", "SaveV2"})
RESTORES = frozenset({"Restore", "RestoreSlice", "RestoreV2"})
SAVER = SAVES | RESTORES
"""Ops that a saver in the main graph consists of, by which every model is saved and restored."""

INITIALIZERS = ("saved_model_main_op", "legacy_init_op")
"""Collections with the op that TensorFlow 1 runs when it has loaded a model."""


class Reach(NamedTuple):
    """A node that reaches beyond the model, and what it reaches."""

    op: str
    node: str
    graph: str
    what: str


def reaching(model: Model) -> tuple[Reach, ...]:
    """All nodes that reach files, the network or Python when they run, but for those of the model's own saver."""
    return tuple(_reaching(model))


def refuse_reaching(path: str | Path, model: Model, *, trust: bool) -> None:
    """Refuse to run a model that reaches beyond itself, unless it is trusted.

    Raises:
        Error: says which ops reach what, and where the first of each is.
    """
    found: dict[str, list[Reach]] = {}
    for reach in () if trust else reaching(model):
        found.setdefault(reach.op, []).append(reach)
    if found:
        each = (
            f"{n[0].what} by {op} ({len(n)}, first {n[0].node} in {n[0].graph or 'the main graph'})"
            for op, n in found.items()
        )
        raise Error(f"{path} would be run, and reaches {'; '.join(each)}; pass --trust if you trust it")


def _reaching(model: Model) -> Iterator[Reach]:
    saver = _Saver(model)
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            what = _reached(node)
            if what and not saver.exempts(graph, node):
                yield Reach(node.op, node.name, graph.name, what)


def _reached(node: Node) -> str:
    if node.op == "PrintV2":
        return "files" if op_defs.attribute(node, "output_stream").s.startswith(b"file://") else ""
    return REACHED.get(node.op, "")


class _Saver:
    """What the main graph saves and restores the model by.

    Loading restores, from the file that the loader names: ops are exempt that read that one, directly. Nothing saves
    but who asks for it: ops are exempt that no signature runs, nor the restoring, nor what initialises the model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        meta = model.source.proto.meta_graphs[model.source.index]
        outputs = [name for s in meta.signature_def.values() for info in s.outputs.values() for name in _nodes_of(info)]
        initial = [
            n for key in INITIALIZERS if key in meta.collection_def for n in meta.collection_def[key].node_list.value
        ]
        self.served = self._cone([*outputs, *(name.partition(":")[0] for name in initial)])
        self.restored = self._cone([meta.saver_def.restore_op_name]) - self.served
        self.file = meta.saver_def.filename_tensor_name.partition(":")[0]
        self.callers: dict[str, list[Call]] = {}
        for calls in model.analysis(call_graph).calls.values():
            for call in calls:
                self.callers.setdefault(call.callee, []).append(call)
        self.held = set(model.entries) | {name for names in model.owned.values() for name in names}

    def exempts(self, graph: Graph, node: Node) -> bool:
        """Whether a node is the saver's own, and does no more than that."""
        if node.op not in SAVER:
            return False
        calls = [] if graph.name == MAIN else self.callers.get(graph.name, [])
        places = {node.name} if graph.name == MAIN else {call.node for call in calls if call.graph == MAIN}
        if graph.name in self.held or len(places) != max(1, len(calls)) or places & self.served:
            return False
        if not places & self.restored:
            return True
        if node.op not in RESTORES:
            return False
        main, file = self.model.graphs[MAIN], node.inputs[0]
        if graph.name == MAIN:
            return self._is_file(main, file)
        origin = follow(self.model, graph, file)
        return isinstance(origin, Argument) and all(
            self._is_file(main, main.nodes[call.node].inputs[call.first + origin.position]) for call in calls
        )

    def _is_file(self, main: Graph, value: Value) -> bool:
        while value.node != self.file and main.nodes[value.node].op == "Identity":
            value = main.nodes[value.node].inputs[0]
        return bool(value.node == self.file)

    def _cone(self, names: list[str]) -> frozenset[str]:
        """Nodes of the main graph, and what runs before them."""
        nodes, found, waiting = self.model.graphs[MAIN].nodes, set[str](), names
        while waiting:
            name = waiting.pop()
            if name not in found and name in nodes:
                found.add(name)
                waiting += [*(v.node for v in nodes[name].inputs), *nodes[name].after]
        return frozenset(found)


def _nodes_of(info: Any) -> list[str]:
    """The nodes that compute an output of a signature, a ``TensorInfo``."""
    if info.WhichOneof("encoding") == "composite_tensor":
        return [name for part in info.composite_tensor.components for name in _nodes_of(part)]
    return [tensor.partition(":")[0] for tensor in tensors_of("", info).values()]

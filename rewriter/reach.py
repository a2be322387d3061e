"""Ops that reach outside the model: files, the network, Python.

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

# Some use a file only if they are told to: DecodeProtoV2 and EncodeProto for descriptors, FixedUnigramCandidateSampler
# for a vocabulary. DatasetFromGraph runs a serialised graph, which may hold any op.
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
"""Op -> the thing that it reaches, in words."""

SAVES = frozenset({"MergeV2Checkpoints", "Save", "SaveSlices", "SaveV2"})
RESTORES = frozenset({"Restore", "RestoreSlice", "RestoreV2"})
SAVER = SAVES | RESTORES
"""Ops of the main graph's saver, by which every model is saved and restored."""

INITIALIZERS = ("saved_model_main_op", "legacy_init_op")
"""Collections with the op that TensorFlow 1 runs after it has loaded a model."""


class Reach(NamedTuple):
    """A node that reaches outside the model; `what` names the thing that it reaches."""

    op: str
    node: str
    graph: str
    what: str


def reaching(model: Model) -> tuple[Reach, ...]:
    """Return all nodes that reach files, the network or Python when they run, except those of the model's own saver."""
    return tuple(_reaching(model))


def refuse_reaching(path: str | Path, model: Model, *, trust: bool) -> None:
    """Refuse to run a model that reaches outside itself, unless it is trusted.

    Raises:
        Error: the model does; the message lists the ops, what they reach, and the first node of each.
    """
    by_op: dict[str, list[Reach]] = {}
    for reach in () if trust else reaching(model):
        by_op.setdefault(reach.op, []).append(reach)
    if by_op:
        descriptions = (
            f"{reaches[0].what} by {op} ({len(reaches)}, first {reaches[0].node} "
            f"in {reaches[0].graph or 'the main graph'})"
            for op, reaches in by_op.items()
        )
        raise Error(f"{path} would be run, and reaches {'; '.join(descriptions)}; pass --trust if you trust it")


def _reaching(model: Model) -> Iterator[Reach]:
    saver = _Saver(model)
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            what = _target_of(node)
            if what and not saver.exempts(graph, node):
                yield Reach(node.op, node.name, graph.name, what)


def _target_of(node: Node) -> str:
    """Return the thing outside the model that a node reaches, in words; "" if there is none."""
    if node.op == "PrintV2":
        return "files" if op_defs.attribute(node, "output_stream").s.startswith(b"file://") else ""
    return REACHED.get(node.op, "")


class _Saver:
    """The saver of the main graph, which saves and restores the model.

    Loading restores the model from the file that the loader names: ops that read this file directly are exempt. Saving
    happens only on request: ops are exempt if neither a signature, nor the restoring, nor the initialisation runs them.

    Attributes:
        served: nodes of the main graph that signatures and initialisation run.
        restored: other nodes of the main graph that the restoring runs.
        file: the node through which the loader passes the file's name.
        callers: calls by callee.
        external_functions: concrete functions, and functions that belong to captured objects.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        meta = model.source.proto.meta_graphs[model.source.index]
        outputs = [
            name for s in meta.signature_def.values() for info in s.outputs.values() for name in _nodes_of_info(info)
        ]
        initializers = [
            n for key in INITIALIZERS if key in meta.collection_def for n in meta.collection_def[key].node_list.value
        ]
        self.served = self._cone([*outputs, *(name.partition(":")[0] for name in initializers)])
        self.restored = self._cone([meta.saver_def.restore_op_name]) - self.served
        self.file = meta.saver_def.filename_tensor_name.partition(":")[0]
        self.callers: dict[str, list[Call]] = {}
        for calls in model.analysis(call_graph).calls.values():
            for call in calls:
                self.callers.setdefault(call.callee, []).append(call)
        self.external_functions = set(model.entries) | {name for names in model.owned.values() for name in names}

    def exempts(self, graph: Graph, node: Node) -> bool:
        """Return true if a node belongs to the saver and runs only for it."""
        if node.op not in SAVER:
            return False
        calls = [] if graph.name == MAIN else self.callers.get(graph.name, [])
        places = {node.name} if graph.name == MAIN else {call.node for call in calls if call.graph == MAIN}
        # A saver's function is called by nodes of the main graph alone; any other call may run it at any time.
        if graph.name in self.external_functions or len(places) != max(1, len(calls)) or places & self.served:
            return False
        # Neither signatures nor loading run it: it saves, and only on request.
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
        """Return true if a value is the name of the loader's file, directly or through Identity."""
        while value.node != self.file and main.nodes[value.node].op == "Identity":
            value = main.nodes[value.node].inputs[0]
        return bool(value.node == self.file)

    def _cone(self, names: list[str]) -> frozenset[str]:
        """Return nodes of the main graph, and all nodes that run before them."""
        nodes, cone, waiting = self.model.graphs[MAIN].nodes, set[str](), names
        while waiting:
            name = waiting.pop()
            if name not in cone and name in nodes:
                cone.add(name)
                waiting += [*(v.node for v in nodes[name].inputs), *nodes[name].after]
        return frozenset(cone)


def _nodes_of_info(info: Any) -> list[str]:
    """Return the nodes that compute an output of a signature, a ``TensorInfo``."""
    if info.WhichOneof("encoding") == "composite_tensor":
        return [name for part in info.composite_tensor.components for name in _nodes_of_info(part)]
    return [tensor.partition(":")[0] for tensor in tensors_of("", info).values()]

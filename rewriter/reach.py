"""Ops that reach beyond the model: files, the network, Python.

Source: op definitions of TensorFlow 2.21 (``tensorflow/core/ops``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Error, Model, Node

# fmt: off
FILES = frozenset(
    {
        "CSVDataset", "CSVDatasetV2", "CacheDataset", "CacheDatasetV2", "CreateSummaryDbWriter",
        "CreateSummaryFileWriter", "DatasetFromGraph", "DatasetToTFRecord", "DecodeProtoV2", "DistributedSave",
        "EncodeProto", "ExperimentalCSVDataset", "ExperimentalDatasetToTFRecord", "ExperimentalLMDBDataset",
        "ExperimentalMatchingFilesDataset", "ExperimentalSqlDataset", "FileSystemSetConfiguration",
        "FixedLengthRecordDataset", "FixedLengthRecordDatasetV2", "FixedLengthRecordReader",
        "FixedLengthRecordReaderV2", "FixedUnigramCandidateSampler", "GenerateVocabRemapping",
        "InitializeTableFromTextFile", "InitializeTableFromTextFileV2", "LMDBDataset", "LMDBReader",
        "ListSnapshotChunksDataset", "LoadAndRemapMatrix", "LoadDataset", "MatchingFiles", "MatchingFilesDataset",
        "MergeV2Checkpoints", "ReadFile", "RecordInput", "Restore", "RestoreSlice", "RestoreV2", "Save",
        "SaveDataset", "SaveDatasetV2", "SaveSlices", "SaveV2", "SnapshotChunkDataset", "SnapshotDataset",
        "SnapshotDatasetReader", "SnapshotDatasetV2", "SnapshotNestedDatasetReader", "SqlDataset", "TFRecordDataset",
        "TFRecordDatasetV2", "TFRecordReader", "TFRecordReaderV2", "TensorSliceDataset", "TextLineDataset",
        "TextLineReader", "TextLineReaderV2", "WholeFileReader", "WholeFileReaderV2", "WriteFile",
    }
)
NETWORK = frozenset(
    {
        "ConfigureAndInitializeGlobalTPU", "ConfigureDistributedTPU", "DataServiceDataset", "DataServiceDatasetV2",
        "DataServiceDatasetV3", "DataServiceDatasetV4", "DebugIdentity", "DebugIdentityV2", "DebugIdentityV3",
        "DebugNanCount", "DebugNumericSummary", "DebugNumericSummaryV2", "RegisterDataset", "RegisterDatasetV2",
        "RemoteCall", "RpcCall", "RpcClient", "RpcServer",
    }
)
PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
# fmt: on
REACHED = {**dict.fromkeys(FILES, "files"), **dict.fromkeys(NETWORK, "the network"), **dict.fromkeys(PYTHON, "Python")}
"""What each op reaches."""

SAVER = frozenset({"MergeV2Checkpoints", "Restore", "RestoreSlice", "RestoreV2", "Save", "SaveSlices", "SaveV2"})
"""Ops that a saver in the main graph consists of, by which every model is saved and restored."""


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
    served = _served(model)
    savers = _only_saving(model, served)
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            what = _reached(node)
            own = graph.name in savers or (graph.name == MAIN and node.name not in served)
            if what and not (own and node.op in SAVER):
                yield Reach(node.op, node.name, graph.name, what)


def _reached(node: Node) -> str:
    if node.op == "PrintV2" and "output_stream" in node.attrs:
        return "files" if node.attrs["output_stream"].s.startswith(b"file://") else ""
    return REACHED.get(node.op, "")


def _served(model: Model) -> set[str]:
    """The nodes of the main graph that run when a signature does, whether or not it computes a single function."""
    nodes = model.graphs[MAIN].nodes
    meta = model.source.proto.meta_graphs[model.source.index]
    waiting = [name for s in meta.signature_def.values() for info in s.outputs.values() for name in _nodes_of(info)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and name in nodes:
            found.add(name)
            waiting += [*(v.node for v in nodes[name].inputs), *nodes[name].after]
    return found


def _nodes_of(info: Any) -> list[str]:
    """The nodes that compute an output of a signature, a ``TensorInfo``."""
    names = [info.name]
    if info.WhichOneof("encoding") == "coo_sparse":
        sparse = info.coo_sparse
        names = [sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name]
    if info.WhichOneof("encoding") == "composite_tensor":
        names = [name for part in info.composite_tensor.components for name in _nodes_of(part)]
    return [name.partition(":")[0] for name in names]


def _only_saving(model: Model, served: Collection[str]) -> frozenset[str]:
    """Functions that only the main graph's saver calls, and that no object holds."""
    callers: dict[str, set[str]] = {}
    for caller, calls in model.analysis(call_graph).calls.items():
        for call in calls:
            callers.setdefault(call.callee, set()).add("served" if call.node in served else caller)
    held = set(model.entries) | {name for names in model.owned.values() for name in names}
    return frozenset(name for name, by in callers.items() if by == {MAIN} and name not in held)

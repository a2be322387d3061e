"""Executing a model: its signatures in V1 sessions, its training function as plain loading gives it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.checkpoint.graph_view import ObjectGraphView
from tensorflow.python.eager import context
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from passes.batch_norm import batch_norms
from passes.derive_training import TRAIN
from passes.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from rewriter.dataflow import VARIABLES, call_graph
from rewriter.ir import Error, Model, unused

v1 = tf.compat.v1
T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]

SIZES = (2, 4, 32, 224, 15600)
"""What is tried for an unknown size other than the batch's, until the model runs: the last suits audio."""

BATCH = 3
OFF = 2**62
"""A step that is never reached."""

FAILURES = (tf.errors.OpError, ValueError)
"""What a session or a loaded function raises on inputs that a graph cannot work with."""


class Kernels(NamedTuple):
    """Executed kernels that contain batch norm, after Grappler.

    Attributes:
        placed: how many of each op are in the graphs that ran, both branches of a conditional included.
        training: how many of these normalise with the batch's statistics, gradients not counted.
        ran: how many were reached.
    """

    placed: Counter[str]
    training: int
    ran: int

    @property
    def forward(self) -> int:
        """How many are no gradients."""
        return sum(n for op, n in self.placed.items() if "Grad" not in op)

    @property
    def gradients(self) -> int:
        """How many are gradients."""
        return self.placed.total() - self.forward


@dataclass(frozen=True)
class Ran:
    """What one run of a signature gave, and which variables it changed."""

    outputs: dict[str, np.ndarray]
    kernels: Kernels
    changed: frozenset[str]


def kernels_in(graphs: Iterable[Any], stats: Any) -> Kernels:
    """The batch-norm kernels of partition graphs, and those of them that step stats list."""
    reached = {n.node_name for device in stats.dev_stats for n in device.node_stats}
    found = [n for graph in graphs for n in graph.node if _normalises(n)]
    training = [n for n in found if "is_training" in n.attr and n.attr["is_training"].b and "Grad" not in n.op]
    return Kernels(Counter(n.op for n in found), len(training), sum(n.name in reached for n in found))


def _normalises(node: Any) -> bool:
    fused = node.attr["fused_ops"].list.s if "fused_ops" in node.attr else ()
    return "FusedBatchNorm" in node.op or b"FusedBatchNorm" in fused


def feeds(specs: Mapping[str, Any], size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for tensors by name; unknown sizes are `size`, but for the first, the batch's."""
    rng = np.random.default_rng(seed)
    found = {}
    batched = any(s.shape.rank != 1 for s in specs.values())
    for name, spec in sorted(specs.items()):
        shape = _shape(spec.shape, BATCH if batched else size, size)
        dtype = tf.as_dtype(spec.dtype)
        if dtype == tf.string:
            found[name] = np.full(shape, b"1", dtype=object)
        elif dtype == tf.bool:
            found[name] = np.zeros(shape, dtype=bool)
        elif dtype.is_integer:
            found[name] = rng.integers(0, 3, shape).astype(dtype.as_numpy_dtype)
        else:
            found[name] = rng.normal(0.3, 1.5, shape).astype(dtype.as_numpy_dtype)
    return found


def _shape(shape: tf.TensorShape, batch: int, size: int) -> list[int]:
    if shape.rank is None:
        return [batch, size, size, 3]
    first = [s or batch for s in shape[:1]]
    return [*first, *(s or size for s in shape[1:])]


def fitted(inputs: Arrays, specs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Given arrays as what tensors by name are fed with; None where the names are others.

    Raises:
        Error: an array has another shape, or cannot have the dtype.
    """
    given = dict(zip(specs, inputs.values(), strict=True)) if len(specs) == len(inputs) == 1 else dict(inputs)
    if set(given) != set(specs):
        return None
    for name, spec in specs.items():
        value, dtype = np.asarray(given[name]), tf.as_dtype(spec.dtype)
        if not spec.shape.is_compatible_with(value.shape):
            raise Error(f"the input {name} is to have the shape {spec.shape}, not {value.shape}")
        if (value.dtype.kind in "OSU") != (dtype == tf.string):
            raise Error(f"the input {name} is to have the dtype {dtype.name}, not {value.dtype}")
        given[name] = value.astype(dtype.as_numpy_dtype)
    return given


def on_inputs(
    run: Callable[[dict[str, np.ndarray]], T], specs: Mapping[str, Any], inputs: Arrays | None = None, seed: int = 0
) -> tuple[T, dict[str, np.ndarray]]:
    """What `run` gives on the inputs, or on the first random ones that it takes, and these.

    Raises:
        Error: the inputs that are given do not fit.
    """
    if inputs is not None:
        given = fitted(inputs, specs)
        if given is None:
            raise Error(f"it takes {', '.join(specs) or 'nothing'}, not {', '.join(inputs) or 'nothing'}")
        return run(given), given
    for size in SIZES:
        fed = feeds(specs, size, seed)
        try:
            return run(fed), fed
        except (tf.errors.InvalidArgumentError, ValueError):
            if size == SIZES[-1]:
                raise
    raise AssertionError


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


class Session:
    """A model in a V1 session, which loads what plain loading does not.

    Attributes:
        signatures: the protos by name, but for the initialiser.
    """

    def __init__(self, graph: Any, session: Any, meta: Any) -> None:
        self._graph, self._session = graph, session
        self.signatures = {n: s for n, s in sorted(meta.signature_def.items()) if s.outputs and not n.startswith("__")}
        made = [op for op in graph.get_operations() if op.type in VARIABLES and op.get_attr("dtype") != tf.string]
        there = session.run([_initialised(op) for op in made])
        self._made = {op.name: op for op, initialised in zip(made, there, strict=True) if initialised}
        self._reads = {name: _read(op) for name, op in self._made.items()}

    def inputs(self, name: str) -> dict[str, Any]:
        """A signature's input tensors."""
        return self._tensors(self.signatures[name].inputs)

    def run(self, name: str, fed: Arrays) -> Ran:
        """Run a signature once; variables that it changes are put back."""
        before, metadata = self.values(), v1.RunMetadata()
        options = v1.RunOptions(output_partition_graphs=True, trace_level=v1.RunOptions.SOFTWARE_TRACE)
        tensors, fetches = self.inputs(name), self._tensors(self.signatures[name].outputs)
        outputs = self._session.run(
            fetches, {tensors[k]: v for k, v in fed.items()}, options=options, run_metadata=metadata
        )
        after = self.values()
        changed = frozenset(n for n, value in before.items() if value.tobytes() != after[n].tobytes())
        self.assign({n: before[n] for n in changed})
        return Ran(outputs, kernels_in(metadata.partition_graphs, metadata.step_stats), changed)

    def values(self) -> dict[str, np.ndarray]:
        """The variables by the names of their nodes."""
        # A reference's value may be changed in place, so it is copied.
        return {name: np.array(value) for name, value in self._session.run(self._reads).items()}

    def assign(self, values: Arrays) -> None:
        """Change variables, by the names of their nodes."""
        with self._graph.as_default():
            self._session.run([_assign(self._made[name], value) for name, value in values.items()])

    def node(self, name: str) -> str | None:
        """The node that makes the variable of this name; of several, the first."""
        return next((n for n in self._made if self.name(n) == name), None)

    def name(self, node: str) -> str:
        """The name of the variable that a node makes."""
        op = self._made[node]
        shared = op.get_attr("shared_name").decode() if op.type == "VarHandleOp" else ""
        return shared or node

    def captured(self, signature: str) -> list[str]:
        """The nodes of the variables that a signature's call takes, in order; none where it is no call."""
        first = next(iter(self._tensors(self.signatures[signature].outputs).values()))
        return [t.op.name for t in first.op.inputs if t.op.name in self._made]

    def _tensors(self, infos: Any) -> dict[str, Any]:
        found = {}
        for key, info in sorted(infos.items()):
            names = {key: info.name}
            if info.WhichOneof("encoding") == "coo_sparse":
                parts = ("values", "indices", "dense_shape")
                names = {f"{key}.{part}": getattr(info.coo_sparse, f"{part}_tensor_name") for part in parts}
            found |= {k: self._graph.get_tensor_by_name(name) for k, name in names.items()}
        return found


def _initialised(op: Any) -> Any:
    if op.type == "VarHandleOp":
        return tf.raw_ops.VarIsInitializedOp(resource=op.outputs[0])
    return tf.raw_ops.IsVariableInitialized(ref=op.outputs[0])


def _read(op: Any) -> Any:
    if op.type == "VarHandleOp":
        return tf.raw_ops.ReadVariableOp(resource=op.outputs[0], dtype=op.get_attr("dtype"))
    return op.outputs[0]


def _assign(op: Any, value: Any) -> Any:
    constant = tf.constant(value, op.get_attr("dtype"))
    if op.type == "VarHandleOp":
        return tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=constant)
    return tf.raw_ops.Assign(ref=op.outputs[0], value=constant).op


@contextmanager
def session_of(path: Path, optimize: bool = True) -> Iterator[Session]:
    """A model in a V1 session, with Grappler or without."""
    config = v1.ConfigProto()
    if not optimize:
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.graph_options.optimizer_options.opt_level = v1.OptimizerOptions.L0
    metas = parse_saved_model(str(path)).meta_graphs
    tags = list(metas[0].meta_info_def.tags) if len(metas) == 1 else ["serve"]
    with tf.Graph().as_default() as graph, v1.Session(config=config) as session:
        yield Session(graph, session, v1.saved_model.load(session, tags, str(path)))


def loaded(path: Path) -> Any:
    """What plain loading gives; of several meta graphs, the one for serving, as TensorFlow asks for tags then."""
    several = len(parse_saved_model(str(path)).meta_graphs) > 1
    return tf.saved_model.load(str(path), tags=["serve"] if several else None)


@contextmanager
def loaded_source(path: Path) -> Iterator[Any]:
    """The same, without the slot variables of an optimizer, which plain loading cannot make."""
    proto = parse_saved_model(str(path))
    slots = [n for m in proto.meta_graphs for n in m.object_graph_def.nodes if n.slot_variables]
    if not slots:
        yield loaded(path)
        return
    with TemporaryDirectory() as folder:
        bare = Path(shutil.copytree(path, Path(folder) / "model"))
        copied = saved_model_pb2.SavedModel()
        copied.CopyFrom(proto)
        for meta in copied.meta_graphs:
            for node in meta.object_graph_def.nodes:
                node.ClearField("slot_variables")
        (bare / "saved_model.pb").write_bytes(copied.SerializeToString())
        yield loaded(bare)


class Trainer(NamedTuple):
    """A loaded function as one of keywords, its inputs' specs, and the variables that it may use."""

    call: Callable[..., Any]
    specs: dict[str, Any]
    variables: list[Any]


def trainer(model: Any) -> Trainer | None:
    """The training function of a loaded result: `quantization.train`, in TensorFlow 1's format the signature."""
    quantization = getattr(model, "quantization", None)
    if hasattr(quantization, "train"):
        (concrete,) = quantization.train.concrete_functions
        return keyworded(concrete, list(quantization.variables))
    return keyworded(model.signatures["train"], list(model.variables)) if "train" in model.signatures else None


def keyworded(concrete: Any, variables: list[Any]) -> Trainer:
    """A concrete function as one of keywords; arguments that are no tensors are as it was traced with."""
    structure = concrete.structured_input_signature
    leaves = tf.nest.flatten(structure)
    specs: dict[str, Any] = {}
    named = [unused_name(leaf, specs) if isinstance(leaf, tf.TensorSpec) else None for leaf in leaves]

    def call(**fed: Any) -> Any:
        values = [leaf if name is None else tf.constant(fed[name]) for leaf, name in zip(leaves, named, strict=True)]
        positional, keywords = tf.nest.pack_sequence_as(structure, values)
        return concrete(*positional, **keywords)

    return Trainer(call, specs, variables)


def unused_name(spec: Any, specs: dict[str, Any]) -> str:
    """A name for a spec, which is added under it."""
    name = unused(spec.name, specs)
    specs[name] = spec
    return name


def with_kernels(call: Callable[[], T]) -> tuple[T, Kernels]:
    """What a call gives, and the batch-norm kernels that it executes."""
    own = context.context()
    own.enable_graph_collection()
    own.enable_run_metadata()
    try:
        result = call()
        metadata = own.export_run_metadata()
    finally:
        own.disable_graph_collection()
        own.disable_run_metadata()
    graphs = (g for function in metadata.function_graphs for g in function.partition_graphs)
    return result, kernels_in(graphs, metadata.step_stats)


def loss(outputs: Any) -> Any:
    """A sum of the float outputs, weighted, as the sum of a softmax has no gradient; None where there is none."""
    floats = [t for t in tf.nest.flatten(outputs) if t.dtype.is_floating]
    return tf.add_n([tf.reduce_sum(tf.cast(t, tf.float32) * _weights(t)) for t in floats]) if floats else None


def _weights(value: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.sin(tf.cast(tf.range(tf.size(value)), tf.float32)), tf.shape(value))


def layers(model: Model, root: Any) -> tuple[list[Any], list[Any]]:
    """Gammas and betas, and moving statistics, of the batch norms that a loaded result trains."""
    calls = model.analysis(call_graph)
    signed = model.signatures["train"].entry if "train" in model.signatures else TRAIN
    tops = [name for name in (TRAIN, signed) if name in model.graphs and name]
    trained = calls.reached(tops[0]) if tops else set(model.graphs)
    named = {v.name.partition(":")[0]: v for v in getattr(root, "variables", ())}
    found: dict[str, list[Any]] = {role: [] for role in ROLES}
    for bn in model.analysis(batch_norms):
        if any(s.training and s.graph in trained for s in bn.sites):
            for role, key in bn.variables.items():
                held = _held(root, key) if model.object_based else named[model.variables[key].node]
                found[role].append(held)
    parameters, statistics = found[GAMMA] + found[BETA], found[MEAN] + found[VARIANCE]
    return list({id(v): v for v in parameters}.values()), list({id(v): v for v in statistics}.values())


def _held(root: Any, key: str) -> Any:
    """A loaded model's variable by its checkpoint key, which is its path; names need not be unique."""
    found = root
    for part in key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").split("/"):
        found = ObjectGraphView(root).children(found)[part.replace(".S", "/").replace("..", ".")]
    return found

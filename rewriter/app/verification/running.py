"""Execution of a model: loading it, in a V1 session or plainly, and finding inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import extract_tb
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2, saved_model_pb2
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from rewriter.app.arrays import Arrays
from rewriter.app.verification.kernels import Kernels, kernels_in
from rewriter.dataflow import VARIABLES
from rewriter.ir import Error
from rewriter.savedmodel.graphs import tensors_of
from rewriter.savedmodel.source import MODEL_FILES

v1 = tf.compat.v1
T = TypeVar("T")

SIZES = (2, 4, 32, 224, 15600)
"""Sizes that are tried for an unknown dimension other than the batch, until the model runs; the last suits audio."""
LARGEST_SIDE = 224
"""Largest size of one of several unknown dimensions, which would not fit into memory otherwise."""

BATCH = 3
OFF = 2**62
"""A step that is never reached."""


@dataclass(frozen=True)
class Ran:
    """Outputs of one run of a signature, its kernels, and the nodes of the variables that it changed."""

    outputs: dict[str, np.ndarray]
    kernels: Kernels
    changed: frozenset[str]


def feeds(specs: Mapping[str, Any], size: int, seed: int = 0, flags: bool = False) -> dict[str, np.ndarray]:
    """Return random inputs for tensors by name; unknown sizes are `size`, but an unknown first size is the batch's.

    Booleans, which may choose the mode, are `flags`.
    """
    rng = np.random.default_rng(seed)
    fed = {}
    # If all inputs are vectors, their dimension is not taken for the batch: a waveform has one dimension.
    batched = any(s.shape.rank != 1 for s in specs.values())
    for name, spec in sorted(specs.items()):
        shape = _shape(spec.shape, BATCH if batched else size, size)
        dtype = tf.as_dtype(spec.dtype)
        if dtype == tf.string:
            fed[name] = np.full(shape, b"1", dtype=object)
        elif dtype == tf.bool:
            fed[name] = np.full(shape, flags)
        elif dtype.is_integer:
            fed[name] = rng.integers(0, 3, shape).astype(dtype.as_numpy_dtype)
        else:
            fed[name] = rng.normal(0.3, 1.5, shape).astype(dtype.as_numpy_dtype)
    return fed


def _shape(shape: tf.TensorShape, batch: int, size: int) -> list[int]:
    side = min(size, LARGEST_SIDE)
    if shape.rank is None:
        return [batch, side, side, 3]
    first = [s or batch for s in shape[:1]]
    if shape[1:].as_list().count(None) > 1:
        return [*first, *(s or side for s in shape[1:])]
    return [*first, *(s or size for s in shape[1:])]


def on_random(
    run: Callable[[dict[str, np.ndarray]], T], specs: Mapping[str, Any], seed: int = 0, flags: bool = False
) -> tuple[T, dict[str, np.ndarray]]:
    """Return the result of `run` on the first random inputs that it takes, and these inputs."""
    for size in SIZES:
        fed = feeds(specs, size, seed, flags)
        try:
            return run(fed), fed
        except (tf.errors.InvalidArgumentError, ValueError):
            if size == SIZES[-1]:
                raise
    raise AssertionError


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result of a call, or None and its exception in one line.

    Raises:
        Error: the call raised an error that the user can mend.
    """
    try:
        return call(), ""
    except Error:
        raise
    except Exception as e:  # noqa: BLE001  a model's graph may raise anything, and that is what is reported
        return None, first_line(e)


def first_line(error: Exception) -> str:
    """Return an error in one line: its class and text or, if it has no text, the place that raised it."""
    text, kind = str(error).strip(), type(error).__name__
    if text:
        return f"{kind}: {text.splitlines()[0][:200]}"
    frames = extract_tb(error.__traceback__)
    return f"{kind} in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else kind


def last_bits(values: Arrays, seed: int) -> dict[str, np.ndarray]:
    """Return the arrays of floats, with every element but zeros moved to its upper or lower neighbour."""
    rng = np.random.default_rng(seed)
    moved = {}
    for name, value in values.items():
        if tf.as_dtype(value.dtype).is_floating:
            infinity = np.array(np.inf, value.dtype)
            towards = np.where(rng.random(value.shape) < 0.5, infinity, -infinity).astype(value.dtype)  # noqa: PLR2004
            moved[name] = np.where(value == 0, value, np.nextafter(value, towards))
    return moved


def rows(fed: Arrays) -> int:
    """Return the number of examples in the inputs of a function."""
    return max((len(value) for value in fed.values() if value.ndim), default=1)


class Session:
    """A model in a V1 session, which also loads models that plain loading refuses.

    Attributes:
        signatures: the protos of the signatures by name, without the initialiser's.
    """

    def __init__(self, graph: Any, session: Any, meta: Any) -> None:
        self._graph, self._session = graph, session
        self.signatures = {n: s for n, s in sorted(meta.signature_def.items()) if s.outputs and not n.startswith("__")}
        # No strings: `run` compares bytes, and the bytes of an array of objects are addresses.
        variable_ops = [
            op for op in graph.get_operations() if op.type in VARIABLES and op.get_attr("dtype") != tf.string
        ]
        self._variable_ops = {op.name: op for op in variable_ops}
        self._reads = {op.name: _read(op) for op in variable_ops}
        self._assigns: dict[str, tuple[Any, Any]] = {}
        try:
            self.values()
        except tf.errors.FailedPreconditionError:
            # Loading left a variable without a value. It is asked last, as TensorFlow optimises a graph for each set of
            # fetches, and most models read.
            initialised = session.run([_initialised(op) for op in variable_ops])
            self._variable_ops = {op.name: op for op, ready in zip(variable_ops, initialised, strict=True) if ready}
            self._reads = {name: self._reads[name] for name in self._variable_ops}

    def inputs(self, name: str) -> dict[str, Any]:
        """Return a signature's input tensors."""
        return self._tensors(self.signatures[name].inputs)

    def run(self, name: str, fed: Arrays) -> Ran:
        """Run a signature once, and restore the variables that it changes."""
        before, metadata = self.values(), v1.RunMetadata()
        options = v1.RunOptions(output_partition_graphs=True, trace_level=v1.RunOptions.SOFTWARE_TRACE)
        tensors, fetches = self.inputs(name), self._tensors(self.signatures[name].outputs)
        outputs = self._session.run(
            fetches, {tensors[k]: v for k, v in fed.items()}, options=options, run_metadata=metadata
        )
        after = self.values()
        changed = [n for n, value in before.items() if value.tobytes() != after[n].tobytes()]
        self.assign({n: before[n] for n in changed})
        kernels = kernels_in(metadata.partition_graphs, metadata.step_stats)
        return Ran(outputs, kernels, frozenset(changed))

    def values(self) -> dict[str, np.ndarray]:
        """Return the values of the variables, by the names of their nodes."""
        # A reference's value may be changed in place, so it is copied.
        return {name: np.array(value) for name, value in self._session.run(self._reads).items()}

    def assign(self, values: Arrays) -> None:
        """Assign values to variables, by the names of their nodes."""
        # Values are fed, as constants would stay in the graph and let it grow.
        with self._graph.as_default():
            for name in values.keys() - self._assigns.keys():
                self._assigns[name] = _assign(self._variable_ops[name])
        value_of_assign = {self._assigns[name]: value for name, value in values.items()}
        self._session.run(
            [op for _, op in value_of_assign],
            {placeholder: value for (placeholder, _), value in value_of_assign.items()},
        )

    def node(self, name: str) -> str | None:
        """Return the first node that makes the variable of this name; saving again may have renamed the node."""
        return (
            name if name in self._variable_ops else next((n for n in self._variable_ops if self.name(n) == name), None)
        )

    def name(self, node: str) -> str:
        """Return the name of the variable that a node makes."""
        op = self._variable_ops[node]
        shared = op.get_attr("shared_name").decode() if op.type == "VarHandleOp" else ""
        return shared or node

    def captured(self, signature: str) -> list[str]:
        """Return the nodes of the variables that a signature's call takes, in order; none if it is no call."""
        first = next(iter(self._tensors(self.signatures[signature].outputs).values()))
        return [t.op.name for t in first.op.inputs if t.op.name in self._variable_ops]

    def _tensors(self, infos: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for key, info in sorted(infos.items()):
            tensors |= {k: self._graph.get_tensor_by_name(name) for k, name in tensors_of(key, info).items()}
        return tensors


def _initialised(op: Any) -> Any:
    if op.type == "VarHandleOp":
        return tf.raw_ops.VarIsInitializedOp(resource=op.outputs[0])
    return tf.raw_ops.IsVariableInitialized(ref=op.outputs[0])


def _read(op: Any) -> Any:
    if op.type == "VarHandleOp":
        return tf.raw_ops.ReadVariableOp(resource=op.outputs[0], dtype=op.get_attr("dtype"))
    return op.outputs[0]


def _assign(op: Any) -> tuple[Any, Any]:
    """Return the placeholder of a variable's new value, and the op that assigns it."""
    new_value = v1.placeholder(op.get_attr("dtype"))
    if op.type == "VarHandleOp":
        return new_value, tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=new_value)
    return new_value, tf.raw_ops.Assign(ref=op.outputs[0], value=new_value).op


@contextmanager
def session_of(path: Path, fold: bool = True) -> Iterator[Session]:
    """Open a model in a V1 session; Grappler folds constants if `fold` is true.

    Raises:
        Error: the model does not load.
    """
    config = v1.ConfigProto()
    if not fold:
        config.graph_options.rewrite_options.constant_folding = rewriter_config_pb2.RewriterConfig.OFF
        # At its default level, the runtime folds constants besides Grappler.
        config.graph_options.optimizer_options.opt_level = v1.OptimizerOptions.L0
    metas = parse_saved_model(str(path)).meta_graphs
    tags = list(metas[0].meta_info_def.tags) if len(metas) == 1 else ["serve"]
    with tf.Graph().as_default() as graph, v1.Session(config=config) as session:
        try:
            opened = Session(graph, session, v1.saved_model.load(session, tags, str(path)))
        except Exception as e:
            raise Error(f"{path} does not load in a V1 session: {first_line(e)}") from e
        yield opened


def loaded(path: Path) -> Any:
    """Load a model plainly; if it has several meta graphs, the one for serving, as TensorFlow then needs tags."""
    several = len(parse_saved_model(str(path)).meta_graphs) > 1
    return tf.saved_model.load(str(path), tags=["serve"] if several else None)


@contextmanager
def loaded_source(path: Path) -> Iterator[Any]:
    """Load a model plainly, without the slot variables of an optimizer, which plain loading cannot make."""
    proto = parse_saved_model(str(path))
    slots = [n for m in proto.meta_graphs for n in m.object_graph_def.nodes if n.slot_variables]
    if not slots:
        yield loaded(path)
        return
    with TemporaryDirectory() as folder:
        for child in path.iterdir():
            if child.name not in MODEL_FILES:
                # Links, as checkpoints may be large; resolved, as the links lie in another directory.
                (Path(folder) / child.name).symlink_to(child.resolve())
        copied = saved_model_pb2.SavedModel()
        copied.CopyFrom(proto)
        for meta in copied.meta_graphs:
            for node in meta.object_graph_def.nodes:
                node.ClearField("slot_variables")
        (Path(folder) / MODEL_FILES[0]).write_bytes(copied.SerializeToString())
        yield loaded(Path(folder))

"""One row for each SavedModel of a folder: what `bnqat rewrite` makes of it, seen by running both.

    python -m tools.survey FOLDER [--json FILE] [--unfreeze-constants]

The columns: batch-norm sites found, rewritten, and raised from single ops to the fused kernel; whether
``tf.saved_model.load`` loads the result; whether every signature gives the same bits as the source's while the
quantisers are off, or the same but for rounding where something was raised (both in V1 sessions, which load what
plain loading does not); whether `train` runs with quantisers on; whether every moving statistic of the batch norms
that it trains changes; whether a finite gradient reaches every gamma and beta. Exit code 1 if a column fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tensorflow.core.framework import types_pb2
from tensorflow.python.checkpoint.graph_view import ObjectGraphView
from tensorflow.python.saved_model.loader_impl import parse_saved_model

import bnqat
from passes.batch_norm import batch_norms
from passes.derive_training import TRAIN
from passes.roles import ROLES
from passes.sites import sites
from rewriter.dataflow import call_graph
from rewriter.savedmodel.read import load

SIZES = (2, 4, 32, 224, 15600)
"""What is tried for an unknown size other than the batch's, until the model runs: the last suits audio."""

BATCH = 3
OFF = 2**62
ROUNDING = 1e-5
"""What fusing may change, relative to the largest output."""
HALF_ROUNDING = 2e-2
"""The same where activations are half or bfloat16."""
YES, NO, NOT_APPLICABLE = "yes", "no", "-"


@dataclass
class Row:
    """What was seen of one model. A column is "yes", "no" with a reason, or "-" where it does not apply."""

    model: str
    found: int = 0
    rewritten: int = 0
    fused: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    not_fused: dict[str, int] = field(default_factory=dict)
    loads: str = NOT_APPLICABLE
    same: str = NOT_APPLICABLE
    trains: str = NOT_APPLICABLE
    moves: str = NOT_APPLICABLE
    gradients: str = NOT_APPLICABLE
    notes: list[str] = field(default_factory=list)
    declined: str = ""

    @property
    def failed(self) -> bool:
        """Whether a column that applies fails."""
        columns = (self.loads, self.same, self.trains, self.moves, self.gradients)
        return any(c not in (YES, NOT_APPLICABLE) for c in columns)


def survey(source: Path, target: Path, **options: Any) -> Row:
    """Rewrite one model to `target` and look at the result."""
    row = Row(source.name)
    try:
        report = bnqat.rewrite(source, target, start_step=OFF, **options)
    except bnqat.Error as e:
        row.declined = str(e)
        return row
    row.found, row.rewritten, row.notes = report.sites_found, report.sites_rewritten, report.notes
    for skipped in report.skipped:
        row.skipped[skipped.reason] = row.skipped.get(skipped.reason, 0) + 1
    row.fused = report.sites_fused
    for declined in report.declined:
        row.not_fused[declined.reason] = row.not_fused.get(declined.reason, 0) + 1
    tolerance = (HALF_ROUNDING if _halves(source) else ROUNDING) if row.fused else 0.0
    # Grappler folds constants into convolutions, which it cannot do with variables; unfrozen, compare without it.
    row.same = _guarded(
        partial(_serves_the_same, source, target, optimize=not options.get("unfreeze_constants"), tolerance=tolerance)
    )
    row.loads = _guarded(lambda: YES if _load(target) else NO)
    if row.loads == YES:
        _train(source, target, row)
    return row


def _load(path: Path) -> Any:
    """What plain loading gives; of several meta graphs, the one for serving, as TensorFlow asks for tags then."""
    several = len(parse_saved_model(str(path)).meta_graphs) > 1
    return tf.saved_model.load(str(path), tags=["serve"] if several else None)


def _guarded(check: Callable[[], str]) -> str:
    """The result of a check, or what went wrong in it."""
    try:
        return check()
    except Exception as e:  # noqa: BLE001  a survey reports whatever a model's graph raises
        text = str(e).strip()
        return f"{NO}: {type(e).__name__}: {text.splitlines()[0][:200] if text else ''}"


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


def _halves(path: Path) -> bool:
    """Whether a batch norm of a model may compute in less than float32."""
    model = load(path)
    found = (model.graphs[site.graph].nodes[site.node] for site in model.analysis(sites))
    return any(node.attrs["T"].type in (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16) for node in found)


def _serves_the_same(source: Path, target: Path, optimize: bool, tolerance: float) -> str:
    try:
        before = dict(_v1_outputs(source, optimize))
    except tf.errors.OpError:
        return NOT_APPLICABLE  # the source does not run on random inputs, serialised examples for one
    after = dict(_v1_outputs(target, optimize))
    for name, outputs in before.items():
        for key, value in outputs.items():
            if not _equal(value, after[name][key], tolerance):
                return f"{NO}: signature {name}, output {key}"
    return YES if before else NOT_APPLICABLE


def _equal(wanted: np.ndarray, found: np.ndarray, tolerance: float) -> bool:
    if wanted.dtype.kind != "f" or not tolerance:
        return np.array_equal(wanted, found, equal_nan=wanted.dtype.kind == "f")
    return np.allclose(wanted, found, rtol=0, atol=tolerance * np.abs(wanted).max(initial=0), equal_nan=True)


def _v1_outputs(path: Path, optimize: bool) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The outputs of every signature but `train`, in a V1 session."""
    config = tf.compat.v1.ConfigProto()
    if not optimize:
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.graph_options.optimizer_options.opt_level = tf.compat.v1.OptimizerOptions.L0
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(config=config) as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        for name, signature in sorted(meta.signature_def.items()):
            if name.startswith("__") or name == "train":
                continue
            tensors = {k: graph.get_tensor_by_name(t.name) for k, t in signature.inputs.items()}
            fetches = {k: t.name for k, t in signature.outputs.items()}
            yield name, _first_that_runs(_runner(session, fetches, tensors), tensors)


def _runner(session: Any, fetches: Any, tensors: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda fed: session.run(fetches, {tensors[k]: v for k, v in fed.items()})


def _first_that_runs(run: Callable[[dict[str, np.ndarray]], Any], specs: Mapping[str, Any]) -> Any:
    for size in SIZES:
        try:
            return run(feeds(specs, size))
        except (tf.errors.InvalidArgumentError, ValueError):
            if size == SIZES[-1]:
                raise
    raise AssertionError


def _train(source: Path, target: Path, row: Row) -> None:
    """Run `train` with quantisers on and see what it does."""
    loaded = _load(target)
    function, specs, variables = _training(loaded)
    if function is None:
        return
    for v in variables:
        if v.name.startswith("quantization/start_step"):
            v.assign(0)
    parameters, statistics = _layers(target, loaded)
    before = [v.numpy() for v in statistics]

    def run(fed: dict[str, np.ndarray]) -> Any:
        return function(**{k: tf.constant(v) for k, v in fed.items()})

    def differentiate(fed: dict[str, np.ndarray]) -> Any:
        with tf.GradientTape() as tape:
            loss = _loss(run(fed))
        return None if loss is None else tape.gradient(loss, parameters)

    row.trains = _guarded(partial(_ran, run, specs))
    if row.trains != YES and row.same == NOT_APPLICABLE:
        row.trains = NOT_APPLICABLE
        row.notes.append("neither the source nor the result runs on random inputs")
        return
    still = [v.name for v, b in zip(statistics, before, strict=True) if np.array_equal(v.numpy(), b)]
    row.moves = f"{NO}: {len(still)} of {len(statistics)} do not change, {still[0]} for one" if still else YES
    row.moves = row.moves if statistics else NOT_APPLICABLE
    row.gradients = _guarded(lambda: _gradients(parameters, _first_that_runs(differentiate, specs)))
    if row.gradients.startswith(NO) and _raises(source, row.gradients):
        row.notes.append(f"neither the source nor the result can be differentiated: {row.gradients}")
        row.gradients = NOT_APPLICABLE


def _loss(outputs: Any) -> tf.Tensor | None:
    floats = [t for t in tf.nest.flatten(outputs) if t.dtype.is_floating]
    return tf.add_n([tf.reduce_sum(tf.cast(t, tf.float32) * _weights(t)) for t in floats]) if floats else None


def _raises(source: Path, failure: str) -> bool:
    """Whether differentiating the source's own signatures fails in the same way."""
    signatures = _load(source).signatures
    kind = failure.split(": ")[1]

    def differentiate(name: str, fed: dict[str, np.ndarray]) -> Any:
        with tf.GradientTape() as tape:
            inputs = {k: tf.constant(v) for k, v in fed.items()}
            tape.watch([t for t in inputs.values() if t.dtype.is_floating])
            loss = _loss(signatures[name](**inputs))
        return tape.gradient(loss, list(inputs.values()))

    for name, signature in signatures.items():
        specs = signature.structured_input_signature[1]
        run = partial(differentiate, name)
        if kind not in _guarded(partial(_ran, run, specs)):
            return False
    return True


def _ran(run: Callable[[dict[str, np.ndarray]], Any], specs: Mapping[str, Any]) -> str:
    return YES if _first_that_runs(run, specs) is not None else NO


def _weights(value: tf.Tensor) -> tf.Tensor:
    """Different weights for outputs, as the sum of a softmax has no gradient."""
    return tf.reshape(tf.sin(tf.cast(tf.range(tf.size(value)), tf.float32)), tf.shape(value))


def _gradients(parameters: list[Any], gradients: list[Any] | None) -> str:
    if gradients is None or not parameters:
        return NOT_APPLICABLE
    for v, g in zip(parameters, gradients, strict=True):
        if g is None:
            return f"{NO}: none for {v.name}"
        if not np.all(np.isfinite(tf.convert_to_tensor(g).numpy())):
            return f"{NO}: not finite for {v.name}"
    return YES


def _training(loaded: Any) -> tuple[Any, Mapping[str, Any], list[Any]]:
    """The training function as one of keywords, its inputs' specs, and the model's variables."""
    if hasattr(loaded, "quantization") and hasattr(loaded.quantization, "train"):
        (concrete,) = loaded.quantization.train.concrete_functions
        positional = concrete.structured_input_signature[0]
        specs = {f"{i}_{s.name}": s for i, s in enumerate(tf.nest.flatten(positional))}

        def train(**fed: Any) -> Any:
            return concrete(*tf.nest.pack_sequence_as(positional, [fed[name] for name in specs]))

        return train, specs, list(loaded.quantization.variables)
    if "train" not in loaded.signatures:
        return None, {}, []
    signed = loaded.signatures["train"]
    return signed, signed.structured_input_signature[1], list(loaded.variables)


def _layers(target: Path, loaded: Any) -> tuple[list[Any], list[Any]]:
    """Gammas and betas, and moving statistics, of the batch norms that the result trains."""
    read = load(target)
    trained = read.analysis(call_graph).reached(TRAIN) if TRAIN in read.graphs else set(read.graphs)
    named = {v.name.partition(":")[0]: v for v in getattr(loaded, "variables", ())}
    found: dict[str, list[Any]] = {role: [] for role in ROLES}
    for bn in read.analysis(batch_norms):
        if any(s.training and s.graph in trained for s in bn.sites):
            for role, key in bn.variables.items():
                found[role].append(_held(loaded, key) if read.object_based else named[read.variables[key].node])
    parameters, statistics = found["gamma"] + found["beta"], found["moving_mean"] + found["moving_variance"]
    return list({id(v): v for v in parameters}.values()), list({id(v): v for v in statistics}.values())


def _held(root: Any, key: str) -> Any:
    """A loaded model's variable by its checkpoint key, which is its path; names need not be unique."""
    found = root
    for part in key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").split("/"):
        found = ObjectGraphView(root).children(found)[part.replace(".S", "/").replace("..", ".")]
    return found


def models(folder: Path) -> list[Path]:
    """The SavedModels of a folder."""
    return sorted({p.parent for kind in ("pb", "pbtxt") for p in folder.glob(f"*/saved_model.{kind}")})


def show(rows: list[Row]) -> None:
    """Print the table and, below it, what did not go through."""
    table = Table()
    for column in ("model", "found", "rewritten", "fused", "loads", "same off", "trains", "stats move", "gradients"):
        table.add_column(column, overflow="fold")
    for row in rows:
        columns = (row.loads, row.same, row.trains, row.moves, row.gradients)
        table.add_row(
            row.model, str(row.found), str(row.rewritten), str(row.fused), *(c.partition(":")[0] for c in columns)
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in rows:
        for note in row.notes:
            print(f"{row.model}: note: {note}")
        if row.declined:
            print(f"{row.model}: declined: {row.declined}")
        for reason, count in row.skipped.items():
            print(f"{row.model}: {count} skipped: {reason}")
        for reason, count in row.not_fused.items():
            print(f"{row.model}: {count} not fused: {reason}")
        for name in ("loads", "same", "trains", "moves", "gradients"):
            if ":" in getattr(row, name):
                print(f"{row.model}: {name}: {getattr(row, name)}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--unfreeze-constants", action="store_true", help="as of bnqat rewrite")
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose name holds this")
    arguments = parser.parse_args()
    found = [m for m in models(arguments.folder) if arguments.only in m.name]
    if not found:
        parser.error(f"{arguments.folder} holds no folder with a SavedModel")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in found:
            target = Path(scratch) / model.name
            rows.append(survey(model, target, unfreeze_constants=arguments.unfreeze_constants))
            print(f"{model.name}: {'declined' if rows[-1].declined else 'done'}", file=sys.stderr)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(r.failed for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

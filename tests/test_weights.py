"""Every model with weights: what is quantised and what is declined, off and on, trained and finalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.entries.serving import entries_of_root
from passes.weights.kernels import CONVOLUTIONS
from passes.weights.layers import weight_layers
from passes.weights.uses import GRADIENT_SCOPE, weight_uses
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN
from rewriter.savedmodel.read import load
from tests.models.all import ALL
from tests.models.weights import WEIGHT_MODELS
from tests.models.weights.case import WeightModel, drawn

MODELS = {name: model for name, model in WEIGHT_MODELS.items() if model.weights}
WITHOUT_VARIABLES = {
    "mixed_bfloat16",
    "mixed_float16",
    "shared_transposed",
    "spectral",
    "standardised",
    "v1_weights_frozen",
    "weights_frozen",
}
"""Models whose weights are cast, transformed, constant or used in two ways: other variables hold them quantised."""
NEVER = 2**40

Paths = Callable[[str], Path]

Results = Mapping[str, np.ndarray]


def run(path: Path, model: WeightModel) -> Results:
    """Return what the default signature gives for the model's inputs."""
    loaded = tf.saved_model.load(str(path))
    outputs = loaded.signatures["serving_default"](**{name: tf.constant(x) for name, x in model.draw().items()})
    return {name: value.numpy() for name, value in outputs.items()}


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rewritten(source: Path, target: Path, **options: Any) -> Path:
    """Rewrite a model's weights to 4 bits, and leave batch norms float."""
    bnqat.rewrite(source, target, bits={"weight": 4}, scheme={"batch_norm": "none"}, **options)
    return target


@pytest.mark.parametrize("name", MODELS)
def test_what_is_quantised_and_what_is_declined(name: str, weight_model: Paths) -> None:
    model, source = MODELS[name], load(weight_model(name))
    uses, skips = source.analysis(weight_uses)
    layers, numbers = source.analysis(weight_layers)
    found: dict[tuple[str, tuple[int, ...], tuple[int, ...]], set[int]] = {}
    for use in uses:
        layer = layers[numbers[use.edges[0]]]
        keys = {source.variables[k].name for m in layer.members for k in m.variables.values()} or {""}
        for key in keys:
            found.setdefault((key, use.whole_shape, use.whole_axes), set()).add(numbers[use.edges[0]])
    assert set(found) == {(w.name, w.shape, w.axes) for w in model.weights}
    # One identity, however often a weight is used; constants are told apart by their values.
    assert all(len(ids) == 1 for (key, *_), ids in found.items() if key)
    assert len(skips) >= len(model.declined)
    assert bool(skips) == bool(model.declined), [s.reason for s in skips]


@pytest.mark.parametrize("name", MODELS)
def test_off_and_on_and_finalised(name: str, weight_model: Paths, tmp_path: Path) -> None:
    model, source = MODELS[name], weight_model(name)
    before = run(source, model)
    assert same(run(rewritten(source, tmp_path / "off", start_step=NEVER), model), before)
    quantized = rewritten(source, tmp_path / "on")
    on = run(quantized, model)
    assert not same(on, before)
    report = bnqat.finalize(in_format_2(quantized, tmp_path / "saved"), tmp_path / "final")
    assert {baked.role for baked in report.baked} == {"weight"}
    assert same(run(tmp_path / "final", model), on)
    final, first = stored(tmp_path / "final"), stored(source)
    # A weight that is transformed, cast or used in two ways has no variable of its own that holds it quantised.
    kept = [w for w in model.weights if w.name in final and not np.array_equal(final[w.name], first[w.name])]
    assert bool(kept) != (name in WITHOUT_VARIABLES)
    new = [value for key, value in final.items() if key not in first]
    assert kept or new
    for value in new:  # 4 bits, on each side of zero, by channel
        ways = [channels(value, w.axes) for w in model.weights if w.shape == value.shape]
        assert any(all(len(np.unique(np.abs(channel))) <= 8 for channel in way) for way in ways)


TRAINED = {name: model for name, model in MODELS.items() if not model.untrained}
IN_SESSIONS = {"v1_weights_loop", "v1_weights_loop_references"}
"""Models whose loops TensorFlow differentiates in V1 sessions alone."""


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in IN_SESSIONS])
def test_training_moves_every_weight(name: str, weight_model: Paths, tmp_path: Path) -> None:
    """A gradient reaches every weight through its quantiser, and one call counts one step."""
    model = TRAINED[name]
    loaded = tf.saved_model.load(str(rewritten(weight_model(name), tmp_path / "q", unfreeze_constants=True)))
    train = loaded.signatures["train"]
    variables = {v.name.removesuffix(":0"): v for v in train.graph.variables}
    weights = {name: v for name, v in variables.items() if name in {w.name for w in model.weights} and v.trainable}
    assert weights or not any(w.name for w in model.weights)
    reached = dict.fromkeys(weights, 0.0)
    for step, sign in enumerate((1, -1)):  # each way of a conditional
        inputs = {name: tf.constant(x * sign if x.dtype == np.float32 else x) for name, x in model.draw().items()}
        with tf.GradientTape() as tape:
            tape.watch(list(weights.values()))
            loss = tf.add_n([tf.reduce_sum(tf.cast(y, tf.float32) ** 2) for y in train(**inputs).values()])
        assert int(variables["quantization/step"]) == step + 1
        for (key, weight), gradient in zip(weights.items(), tape.gradient(loss, list(weights.values())), strict=True):
            dense = tf.convert_to_tensor(gradient).numpy().astype(np.float32)
            assert np.isfinite(dense).all(), key
            before = weight.numpy()
            weight.assign_sub(tf.cast(1e-2 / max(np.abs(dense).max(), 1e-9) * dense, weight.dtype))
            reached[key] = max(reached[key], float(np.abs(weight.numpy() - before).max()))
    assert all(reached.values()), reached


@pytest.mark.parametrize("name", sorted(IN_SESSIONS))
def test_gradients_of_loops_in_sessions(name: str, weight_model: Paths, tmp_path: Path) -> None:
    model = MODELS[name]
    path = rewritten(weight_model(name), tmp_path / "q")
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        signature = meta.signature_def["train"]
        (output,), (fed,) = (list(part.values()) for part in (signature.outputs, signature.inputs))
        variables = {v.op.name: v for v in tf.compat.v1.trainable_variables()}
        weights = [variables[w.name] for w in model.weights]
        logits = graph.get_tensor_by_name(output.name)
        gradients = tf.gradients(tf.reduce_sum(logits**2), weights)
        x = model.draw()["x"]
        for_both = [session.run(gradients, {fed.name: x * sign}) for sign in (1, -1)]
    for w, *both in zip(model.weights, *for_both, strict=True):
        assert np.isfinite(both).all()
        assert np.abs(both).max() > 0, w.name


def channels(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the channels of a weight as rows."""
    kept = [axis % value.ndim for axis in axes]
    order = (*kept, *(axis for axis in range(value.ndim) if axis not in kept))
    return value.transpose(order).reshape(int(np.prod([value.shape[axis] for axis in kept])), -1)


def in_format_2(path: Path, target: Path) -> Path:
    """Return a model that `finalize` takes: of TensorFlow 1's format, what TensorFlow 2 saves again."""
    if load(path).object_based:
        return path
    loaded = tf.saved_model.load(str(path))
    serving = {name: f for name, f in loaded.signatures.items() if name != "train"}
    tf.saved_model.save(loaded, str(target), signatures=serving)
    return target


def stored(path: Path) -> dict[str, np.ndarray]:
    """Return the values of a SavedModel's variables by name."""
    model = load(path)
    return {v.name: np.asarray(model.value_of(key)) for key, v in model.variables.items()}


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_convolution_of_the_other_models_has_a_weight(name: str, model: Paths) -> None:
    source = load(model(name))
    uses, skips = source.analysis(weight_uses)
    assert not skips
    taken = {(use.edges[0].graph, use.node) for use in uses}
    calls = source.analysis(call_graph)
    served = {MAIN, *(s.entry for s in source.signatures.values()), *(e.function for e in entries_of_root(source))}
    for graph in sorted({g for top in served if top in source.graphs for g in calls.reached(top)}):
        for node in source.graphs[graph].nodes.values():
            if node.op in CONVOLUTIONS and not GRADIENT_SCOPE.search(node.name):
                assert (graph, node.name) in taken


class Product(tf.Module):
    """One function that multiplies by a weight, and by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = drawn("kernel", 4, 4)
        self.head = drawn("head", 4, 3)

    @tf.function(input_signature=[tf.TensorSpec((4, 4), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        product = tf.function(tf.matmul)
        return tf.matmul(product(product(x, self.kernel.read_value()), tf.transpose(x)), self.head)


def test_a_function_that_takes_a_weight_once_is_named(tmp_path: Path) -> None:
    module = Product()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.serve)
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits={"weight": 4})
    assert [q.layer_name for q in report.quantizers] == ["head"]
    reasons = {skip.reason for skip in report.skipped}
    assert reasons == {"its function is called with a weight, and with what the model is given"}

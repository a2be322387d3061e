"""Fused kernels against the single ops of the source: outputs, gradients, moving statistics.

The tolerance is 1e-5 of the largest element, for float32: the kernel adds in another order, and a step repeats the
rounding of the ones before. A wrong epsilon or a variance that stays corrected is far outside of it, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm import kernel
from passes.batch_norm.decomposed import FORMS as PATTERNS
from passes.batch_norm.sites import sites
from rewriter.pattern import Pattern
from rewriter.savedmodel.read import load
from tests.models.chosen import NORMS, Chosen
from tests.models.forms import FORMS, IMAGE, Form, Variables, save

Paths = Callable[[str], Path]
FUSING = ["split-modes", "select-to-branch", "merge-choices", "fuse-batch-norm", "choose-branch"]
TOLERANCE = 1e-5
STEPS = 50
TURNS = 10
"""Steps by turns in training and inference; `trained` takes more, in training alone."""


def difference(values: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of any element, relative to the largest element of its array; NaN if there is any."""
    assert [a.shape for a in values] == [b.shape for b in expected]
    return float(np.max([np.abs(a - b).max() / (np.abs(b).max() or 1) for a, b in zip(values, expected, strict=True)]))


def batch(index: int, shape: Any) -> tf.Tensor:
    rng = np.random.default_rng(index)
    return tf.constant(rng.normal(0.3, 1.5, [8, *shape]).astype("float32"))


def step(module: Any, call: Any, *inputs: Any, rate: float = 0.01) -> list[np.ndarray]:
    """Make a training step, and return its outputs, gradients and moving statistics."""
    layers = list(module.layers)
    trained = [module.mix, *(p for v in layers for p in (v.gamma, v.beta))]
    with tf.GradientTape() as tape:
        y = call(*inputs)
        loss = tf.reduce_mean(tf.square(y - 0.3))
    gradients = tape.gradient(loss, trained)
    for variable, gradient in zip(trained, gradients, strict=True):
        variable.assign_sub(rate * gradient)
    moving = [s.numpy() for v in layers for s in (v.moving_mean, v.moving_variance)]
    return [y.numpy(), *(g.numpy() for g in gradients), *moving]


class Every(tf.Module):
    """Every pattern once, on one set of variables; `train` uses the batch's statistics."""

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        super().__init__()
        self.patterns = patterns
        self.v = Variables(6)
        spec = tf.TensorSpec((None, *IMAGE), name="x")
        options = {"input_signature": [spec], "autograph": False}
        self.serve = tf.function(lambda x: self.call(x, training=False), **options)
        self.train = tf.function(lambda x: self.call(x, training=True), **options)

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        values = {"x": x, "epsilon": 1e-3, "one": 1.0, "half": 0.5, "minus_half": -0.5}
        values |= {r: tf.convert_to_tensor(getattr(self.v, r)) for r in ("gamma", "beta")}
        mean, variance = (tf.convert_to_tensor(s) for s in (self.v.moving_mean, self.v.moving_variance))
        if training:
            mean, variance = tf.nn.moments(x, [0, 1, 2])
            for average, new in ((self.v.moving_mean, mean), (self.v.moving_variance, variance)):
                average.assign_sub((average - new) * 0.1)
        values |= {"moving_mean": mean, "moving_variance": variance}
        return tf.stack([computed(p, values, {}) for p in self.patterns])


def computed(pattern: Pattern, values: dict[str, Any], results: dict[str, Any]) -> Any:
    """Compute a pattern by the raw ops of a graph."""
    if not pattern.ops:
        return values[pattern.name]
    if pattern.name not in results or not pattern.name:
        op = sorted(pattern.ops)[-1].removesuffix("Inv")
        inputs = [computed(p, values, results) for p in pattern.inputs]
        names = {1: ("x",), 2: ("x", "y")}[len(inputs)]
        output = getattr(tf.raw_ops, op)(**dict(zip(names, inputs, strict=True)))
        if not pattern.name:
            return output
        results[pattern.name] = output
    return results[pattern.name]


def test_every_pattern_is_fused_and_computes_the_same(tmp_path: Path) -> None:
    module = Every(PATTERNS)
    assert len(PATTERNS) > 100
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    assert (report.sites_found, report.sites_fused) == (2 * len(PATTERNS), 2 * len(PATTERNS))
    loaded, x = tf.saved_model.load(str(tmp_path / "f")), batch(0, IMAGE)
    assert difference([loaded.serve(x).numpy()], [module.serve(x).numpy()]) < TOLERANCE
    assert difference([loaded.train(x).numpy()], [module.train(x).numpy()]) < TOLERANCE
    moving = [[m.v.moving_mean.numpy(), m.v.moving_variance.numpy()] for m in (loaded, module)]
    assert difference(*moving) < TOLERANCE


TRAINED = ["library_sequence", "library_video", "channels_first_train", "divided", "powers"]


def trained(name: str, tmp_path: Path) -> float:
    """Return the largest difference over 50 steps of the source's own training, with fusing alone."""
    module = FORMS[f"form_{name}"]()
    save(module, tmp_path / "m")
    bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    loaded = tf.saved_model.load(str(tmp_path / "f"))
    shape = module.serve.input_signature[0].shape[1:]
    worst = difference([loaded.serve(batch(0, shape)).numpy()], [module.serve(batch(0, shape)).numpy()])
    for index in range(STEPS):
        x = batch(index, shape)
        expected, actual = (step(m, m.train, x) for m in (module, loaded))
        worst = float(np.maximum(worst, difference(actual, expected)))
    return worst


@pytest.mark.parametrize("wrong", [np.full(3, np.nan), np.ones(3) * (1 + 1e-3)])
def test_the_yardstick_sees_what_is_wrong(wrong: np.ndarray) -> None:
    right = np.ones(3)
    assert difference([right, right], [right, right]) == 0
    for pair in ([wrong, right], [right, wrong]):
        assert not difference(pair, [right, right]) < TOLERANCE
    with pytest.raises(AssertionError):
        difference([right[:1]], [right])


@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_are_the_sources(name: str, tmp_path: Path) -> None:
    assert trained(name, tmp_path) < TOLERANCE


def _other_epsilon(*args: Any, **kwargs: Any) -> Any:
    x, vectors, layout, epsilon = args
    return kernel.normalised(x, vectors, layout, 1.05 * epsilon, **kwargs)


MUTATIONS = {
    "epsilon": ("passes.fusing.fuse_batch_norm.normalised", _other_epsilon),
    "correction": ("passes.batch_norm.kernel.population", lambda corrected, *_: corrected),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_tolerance_finds_a_wrong_kernel(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, replacement = MUTATIONS[mutation]
    monkeypatch.setattr(target, replacement)
    assert trained("divided", tmp_path) > 2 * TOLERANCE


@pytest.mark.parametrize("name", NORMS)
def test_a_mode_that_is_chosen_while_running(name: str, tmp_path: Path) -> None:
    """Training and inference by turns, with fusing alone; then the kernels that run in each mode."""
    module = Chosen(NORMS[name])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    assert (report.declined, report.skipped) == ([], [] if report.sites_fused else report.skipped)
    loaded = tf.saved_model.load(str(tmp_path / "f"))
    for index in range(TURNS):
        x, training = batch(index, IMAGE), tf.constant(index % 2 == 0)
        expected, actual = (step(m, m.serve, x, training) for m in (module, loaded))
        assert difference(actual, expected) < TOLERANCE
    kinds = {(s.kind, s.mode) for s in load(tmp_path / "f").analysis(sites)}
    assert kinds == {("fused", "training"), ("fused", "inference")}
    always = 2 if "kernels_always" in name else 0
    flags = executed(tmp_path / "f", *({"x": batch(0, IMAGE).numpy(), "training": mode} for mode in (True, False)))
    assert flags == [[True] * 2, [False] * 2 + [True] * always]


def executed(path: Path, *feeds: dict[str, Any]) -> list[list[bool]]:
    """Return for each feed `is_training` of each fused kernel that runs in a V1 session, sorted."""
    v1 = tf.compat.v1
    flags = []
    options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE, output_partition_graphs=True)
    with tf.Graph().as_default(), v1.Session() as session:
        signature = v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
        fetches = [t.name for t in signature.outputs.values()]
        for values in feeds:
            metadata = v1.RunMetadata()
            feed = {signature.inputs[k].name: v for k, v in values.items()}
            session.run(fetches, feed, options=options, run_metadata=metadata)
            executed_names = {n.node_name for d in metadata.step_stats.dev_stats for n in d.node_stats}
            nodes = [n for g in metadata.partition_graphs for n in g.node if n.op.startswith("FusedBatchNorm")]
            flags.append(sorted(n.attr["is_training"].b for n in nodes if n.name in executed_names))
    return flags


def _moments(x: tf.Tensor, axes: list[int]) -> Any:
    return tf.nn.moments(x, axes, keepdims=True)


def instance_norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    return tf.nn.batch_normalization(x, *_moments(x, [1, 2]), v.beta, v.gamma, 1e-3)


def group_norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    grouped = tf.reshape(x, [-1, 4, 4, 3, 2])
    mean, variance = _moments(grouped, [1, 2, 4])
    normalised = (grouped - mean) * tf.math.rsqrt(variance + 1e-3)
    return tf.reshape(normalised, [-1, *IMAGE]) * v.gamma + v.beta


def layer_norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    return tf.nn.batch_normalization(x, *_moments(x, [1, 2, 3]), v.beta, v.gamma, 1e-3)


def l2_norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    return x * tf.math.rsqrt(tf.reduce_sum(x**2, -1, keepdims=True) + 1e-3) * v.gamma + v.beta


def whitening(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    mean, variance = _moments(x, [0, 1, 2])
    return (x - mean) / tf.sqrt(variance + 1e-3)


def spectral(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    return x / tf.sqrt(tf.reduce_sum(tf.square(v.gamma)) + 1e-3)


OTHERS = (instance_norm, group_norm, layer_norm, l2_norm, whitening, spectral)


@pytest.mark.parametrize("norm", OTHERS)
def test_other_normalisations_are_left_alone(norm: Any, tmp_path: Path) -> None:
    source = save(Form(norm, IMAGE), tmp_path / "m")
    assert load(source).analysis(sites) == ()
    with pytest.raises(bnqat.NothingToRewriteError, match="holds no batch norm"):
        bnqat.rewrite(source, tmp_path / "f")
    assert not (tmp_path / "f").exists()

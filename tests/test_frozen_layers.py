"""Batch norms that a source leaves frozen, options that say which train, and momenta by layer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.batch_norms import batch_norms
from passes.training.frozen_layers import frozen_layers
from rewriter.savedmodel.read import load
from tests import harness
from tests.conftest import once
from tests.models import (
    FusedBatchNorm,
    Net,
    Shared,
    Trainable,
    export_keras,
    perturb,
    save_keras,
    save_module,
    small_keras,
)
from tests.models.v1 import save_v1, two_fused

OFF = 10**9
X = (None, 8, 8, 3)


class Marked(Net):
    """The first batch norm's gamma and beta are not trainable."""

    def __init__(self) -> None:
        super().__init__()
        norm = self.norms[0]
        norm.gamma = tf.Variable(norm.gamma, trainable=False, name="gamma")
        norm.beta = tf.Variable(norm.beta, trainable=False, name="beta")


class Beside(Trainable):
    """The source's own training function runs the first batch norm in inference mode, and has dropout."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        x = tf.nn.relu(self.norms[0](tf.nn.conv2d(x, self.kernels[0], 1, "SAME"), training=False))
        x = tf.nn.dropout(x, 0.5) if training else x
        x = tf.nn.relu(self.norms[1](tf.nn.conv2d(x, self.kernels[1], 1, "SAME"), training))
        return tf.reduce_mean(x, [1, 2])


class ByMode(Beside):
    """`Beside` in one function that takes its mode."""

    @tf.function(input_signature=[tf.TensorSpec(X, name="x"), tf.TensorSpec([], tf.bool, name="training")])
    def serve(self, x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
        return tf.cond(training, lambda: self.call(x, training=True), lambda: self.call(x, training=False))

    train = None


def keras2(path: Path, save: Callable[[Any, Path], Path]) -> Path:
    model = small_keras(0.5)
    model.layers[1].trainable = False
    return save(model, path)


def keras3(path: Path) -> Path:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    stack = [layers.Input(X[1:]), layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten()]
    model = keras.Sequential([*stack, layers.Dense(4), layers.BatchNormalization()])
    perturb(model.weights)
    model.layers[1].trainable = False
    with contextlib.redirect_stdout(io.StringIO()):
        model.export(str(path), verbose=False)
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "marked": lambda p: save_module(Marked(), p),
    "keras2_save": lambda p: keras2(p, save_keras),
    "keras2_export": lambda p: keras2(p, export_keras),
    "keras3_export": keras3,
    "own_train": lambda p: save_module(Beside(), p),
    "by_mode": lambda p: save_module(ByMode(), p),
}
TRACES = ("keras2_save", "own_train", "by_mode")
"""Sources with a training function of their own."""
VERIFIED = ("marked", "keras2_save", "keras3_export", "by_mode")
"""Sources of each kind that `verify` tells apart: with and without training of their own, one function for both."""
VERIFIED_OTHERWISE = ("marked", "own_train")
"""Sources without and with training of their own, which `verify` sees with each option."""


@pytest.fixture
def frozen(shared: Path) -> Callable[[str], Path]:
    """Path of a source by name, written when first asked for."""
    return lambda name: once(shared / "frozen" / name, SOURCES[name])


def statistics(loaded: Any, source: Path) -> list[list[Any]]:
    """The moving mean and variance of each layer of a loaded result."""
    if hasattr(loaded, "norms"):
        return [[n.moving_mean, n.moving_variance] for n in loaded.norms]
    named = {v.name.partition(":")[0]: v for v in loaded.quantization.variables}
    norms = bnqat.inspect(source).batch_norms
    return [[named[bn.variables[role]] for role in ("moving_mean", "moving_variance")] for bn in norms]


def trained(result: Path, source: Path) -> tuple[list[bool], Any]:
    """Run two training steps.

    Returns:
        For each layer, true if the first step moves both its statistics; and the outputs of both steps.
    """
    loaded = tf.saved_model.load(str(result))
    pairs = statistics(loaded, source)
    before = [[v.numpy() for v in pair] for pair in pairs]
    takes_mode = len(harness.concrete(loaded.quantization.train).structured_input_signature[0]) > 1
    mode = [tf.constant(value=True)] if takes_mode else []
    output = loaded.quantization.train(harness.images(X), *mode)
    assert loaded.quantization.step.numpy() == 1
    moved = [
        [not np.array_equal(v, b) for v, b in zip(vs, bs, strict=True)] for vs, bs in zip(pairs, before, strict=True)
    ]
    assert all(len(set(pair)) == 1 for pair in moved)
    return [pair[0] for pair in moved], [output, loaded.quantization.train(harness.images(X), *mode)]


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_source_leaves_frozen_stays_so(name: str, frozen: Callable[[str], Path], tmp_path: Path) -> None:
    source = frozen(name)
    report = bnqat.rewrite(source, tmp_path / "out", bits=4)
    (note,) = [n for n in report.notes if "stays frozen in train" in n]
    assert "1 batch norm stays frozen in train, as " in note
    assert "--train-batch-norm all" in note
    assert any("train is the source's" in n for n in report.notes) == (name in TRACES)
    assert trained(tmp_path / "out", source)[0] == [False, True]
    if name in VERIFIED:
        assert bnqat.verify(source, tmp_path / "out").ok
    tags = [t for bn in bnqat.inspect(tmp_path / "out").batch_norms for s in bn.sites for t in s.quantizers]
    assert {(t["layer"], t["role"]) for t in tags} >= {(n, r) for n in (0, 1) for r in ("gamma", "moving_mean")}


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "by_mode"])
@pytest.mark.parametrize(("option", "wanted"), [("all", [True, True]), ("none", [False, False])])
def test_an_option_decides_otherwise(
    name: str, option: str, wanted: list[bool], frozen: Callable[[str], Path], tmp_path: Path
) -> None:
    source = frozen(name)
    report = bnqat.rewrite(source, tmp_path / "out", train_batch_norm=option, start_step=OFF)  # type: ignore[arg-type]
    assert any("frozen in train, as --train-batch-norm says" in n for n in report.notes) == (option == "none")
    assert any("train is the source's" in n for n in report.notes) == (name in TRACES)
    moved, outputs = trained(tmp_path / "out", source)
    assert moved == wanted
    alike = np.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)  # nothing but dropout tells them apart
    assert alike == (name not in ("keras2_save", "own_train"))
    claims = bnqat.verify(source, tmp_path / "out").claims if name in VERIFIED_OTHERWISE else []
    assert [c.detail for c in claims if c.status == "fails"] == []


def test_by_mode_cannot_train_what_both_modes_freeze(frozen: Callable[[str], Path], tmp_path: Path) -> None:
    source = frozen("by_mode")
    with pytest.raises(bnqat.Error, match="runs it in inference mode in both; leave --train-batch-norm away"):
        bnqat.rewrite(source, tmp_path / "out", train_batch_norm="all")
    bnqat.rewrite(source, tmp_path / "out", train_batch_norm="none")
    assert trained(tmp_path / "out", source)[0] == [False, False]


def test_rules_freeze_single_layers(tmp_path: Path) -> None:
    source = save_keras(small_keras(), tmp_path / "m")
    rules = [{"match": "batch_normalization_1", "train_batch_norm": "none"}]
    report = bnqat.rewrite(source, tmp_path / "out", config={"rules": rules}, start_step=OFF)
    assert any("1 batch norm stays frozen in train, as a rule says" in n for n in report.notes)
    moved, (output, _) = trained(tmp_path / "out", source)
    assert moved == [True, False]
    model = small_keras()
    model.layers[4].trainable = False
    np.testing.assert_allclose(output, model(harness.images(X), training=True), rtol=1e-5, atol=1e-6)
    rules = [{"match": "batch_normalization", "train_batch_norm": "none"}, {"match": "_1", "train_batch_norm": "all"}]
    bnqat.rewrite(source, tmp_path / "out", config={"rules": rules}, start_step=OFF, overwrite=True)
    assert trained(tmp_path / "out", source)[0] == [False, True]
    rules = [{"match": "nowhere", "train_batch_norm": "none"}]
    with pytest.raises(bnqat.Error, match="'nowhere' matches no layer"):
        bnqat.rewrite(source, tmp_path / "out", config={"rules": rules}, overwrite=True)


def test_marks_say_nothing_where_nothing_is_trainable(tmp_path: Path) -> None:
    model = small_keras()
    model.trainable = False
    loaded = load(export_keras(model, tmp_path / "m"))
    assert all(v.frozen for v in loaded.variables.values())
    assert frozen_layers(loaded) == {}
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "out")
    assert any("batch norms are assumed to train" in n for n in report.notes)
    assert trained(tmp_path / "out", tmp_path / "m")[0] == [True, True]


def test_lists_of_nested_objects_are_read(tmp_path: Path) -> None:
    model = small_keras()
    model.layers[1].trainable = False
    module = tf.Module()
    module.net = model
    serve = tf.function(lambda x: model(x, training=False), input_signature=[tf.TensorSpec(X, name="x")])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": serve})
    loaded = load(tmp_path / "m")
    names = {bn.name: bn for bn in loaded.analysis(batch_norms)}
    assert list(frozen_layers(loaded)) == [next(iter(names))]


def test_tensorflow_1_format(tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", two_fused, training=False)
    rules = [{"match": "norm_0", "train_batch_norm": "none"}]
    report = bnqat.rewrite(source, tmp_path / "out", config={"rules": rules}, start_step=OFF)
    assert any("1 batch norm stays frozen in train, as a rule says: norm_0" in n for n in report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    moving = {v.name: v for v in loaded.variables if "moving" in v.name and "quantization" not in v.name}
    before = {name: v.numpy() for name, v in moving.items()}
    loaded.signatures["train"](x=harness.images(X))
    moved = {name for name, v in moving.items() if not np.array_equal(v, before[name])}
    assert moved == {name for name in moving if name.startswith("norm_1")}
    assert bnqat.verify(source, tmp_path / "out").ok
    own_training = save_v1(tmp_path / "own", two_fused)
    with pytest.raises(bnqat.Error, match="train is the source's own graph, which trains it"):
        bnqat.rewrite(own_training, tmp_path / "out", train_batch_norm="none", overwrite=True)
    report = bnqat.rewrite(own_training, tmp_path / "own_out", momentum=0.3)
    assert "the momentum given has no influence: the source's own graph has its own" in report.notes


def averages(path: Path) -> list[float]:
    """The weight of a batch's mean in each layer's moving mean, as one training step shows it."""
    loaded = tf.saved_model.load(str(path))
    norm = FusedBatchNorm(8, factor=1.0)
    x = tf.nn.conv2d(harness.images(X), loaded.kernels[0], 1, "SAME")
    y = norm_of(loaded.norms[0], x, norm)
    norms = [norm, FusedBatchNorm(16, factor=1.0)]
    norm_of(loaded.norms[1], tf.nn.conv2d(tf.nn.relu(y), loaded.kernels[1], 1, "SAME"), norms[1])
    old = [n.moving_mean.numpy() for n in loaded.norms]
    loaded.quantization.train(harness.images(X))
    new = [n.moving_mean.numpy() for n in loaded.norms]
    batch = [n.moving_mean.numpy() for n in norms]
    return [float(np.median((b - a) / (c - a))) for a, b, c in zip(old, new, batch, strict=True)]


def norm_of(variables: Any, x: tf.Tensor, norm: FusedBatchNorm) -> tf.Tensor:
    """The output of a layer for x in training; the batch's statistics go to `norm`."""
    norm.gamma.assign(variables.gamma)  # type: ignore[union-attr]
    norm.beta.assign(variables.beta)  # type: ignore[union-attr]
    return norm(x, training=True)


class TrainedInPart(Net):
    """A function that is no training trace trains the first batch norm, with a momentum of 0.8."""

    def __init__(self) -> None:
        super().__init__(factor=0.2)

    @tf.function(input_signature=[tf.TensorSpec(X, name="x")])
    def warm_up(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        y = self.norms[0](tf.nn.conv2d(x, self.kernels[0], 1, "SAME"), training=True)
        return {"sum": tf.reduce_sum(y), "largest": tf.reduce_max(y)}


def test_momenta_by_rules(tmp_path: Path) -> None:
    source = save_module(Net(), tmp_path / "m")
    names = [bn.name for bn in bnqat.inspect(source).batch_norms]
    config: dict[str, Any] = {"momentum": 0.7, "rules": [{"match": f"^{names[1]}$", "momentum": 0.6}]}
    bnqat.rewrite(source, tmp_path / "out", config=config, start_step=OFF)
    np.testing.assert_allclose(averages(tmp_path / "out"), [0.3, 0.4], rtol=1e-4)
    norms = bnqat.inspect(tmp_path / "out").batch_norms
    assert [(round(bn.momentum or 0, 6), bn.momentum_of) for bn in norms] == [(0.7, "given"), (0.6, "given")]
    bnqat.rewrite(source, tmp_path / "out", config=config, momentum=0.5, start_step=OFF, overwrite=True)
    np.testing.assert_allclose(averages(tmp_path / "out"), [0.5, 0.5], rtol=1e-4)
    del config["momentum"]
    report = bnqat.rewrite(source, tmp_path / "out", config=config, start_step=OFF, overwrite=True)
    assert any(f"momentum 0.99 is assumed for {names[0]} (--momentum sets it)" in n for n in report.notes)


def test_whose_a_momentum_is(tmp_path: Path) -> None:
    source = save_module(TrainedInPart(), tmp_path / "m")
    first, second = bnqat.inspect(source).batch_norms
    assert (round(first.momentum or 0, 6), first.momentum_of, second.momentum, second.momentum_of) == (
        0.8,
        "source",
        None,
        "",
    )
    report = bnqat.rewrite(source, tmp_path / "out", start_step=OFF)
    assert any("momentum 0.8, which the source's other batch norms have, is assumed" in n for n in report.notes)
    np.testing.assert_allclose(averages(tmp_path / "out"), [0.2, 0.2], rtol=1e-4)
    norms = bnqat.inspect(tmp_path / "out").batch_norms
    assert [(round(bn.momentum or 0, 6), bn.momentum_of) for bn in norms] == [(0.8, "source"), (0.8, "assumed")]
    rules = [{"match": "", "momentum": 0.4}]
    report = bnqat.rewrite(source, tmp_path / "out", config={"rules": rules}, start_step=OFF, overwrite=True)
    assert any("the momentum given for" in n and "has no influence" in n for n in report.notes)
    np.testing.assert_allclose(averages(tmp_path / "out"), [0.2, 0.6], rtol=1e-4)
    tf.saved_model.save(tf.saved_model.load(str(tmp_path / "out")), str(tmp_path / "again"))
    norms = bnqat.inspect(tmp_path / "again").batch_norms
    assert [bn.momentum_of for bn in norms] == ["source", "given"]


def test_without_any_hint_it_is_assumed(tmp_path: Path) -> None:
    bnqat.rewrite(save_module(Net(), tmp_path / "m"), tmp_path / "out")
    norms = bnqat.inspect(tmp_path / "out").batch_norms
    assert [(round(bn.momentum or 0, 6), bn.momentum_of) for bn in norms] == [(0.99, "assumed")] * 2


@pytest.mark.parametrize("option", [{"momentum": 0.5}, {"train_batch_norm": "none"}])
def test_layers_that_share_a_function_train_alike(option: dict[str, Any], tmp_path: Path) -> None:
    source = save_module(Shared(), tmp_path / "m")
    names = [bn.name for bn in bnqat.inspect(source).batch_norms]
    with pytest.raises(bnqat.Error, match=f"share a function, so rules must give them the same {next(iter(option))}"):
        bnqat.rewrite(source, tmp_path / "out", config={"rules": [{"match": f"^{names[1]}$", **option}]})

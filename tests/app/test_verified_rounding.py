"""Tests of the rounding that `verify` allows, and of sound but unusual models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import bnqat
from passes.batch_norm.sites import FUSED
from passes.quantization.training_functions import FROZEN
from rewriter import op_defs, protos
from rewriter.app.verification.claims import FAILS, HOLDS, NOT_APPLICABLE, Claim, Verification, verify
from rewriter.app.verification.rounding import CHAOS, CONDITIONING, ROUNDING, rounding
from rewriter.app.verification.running import first_line, last_bits
from rewriter.edit import Edit, Rewire, SetAttr
from rewriter.expr import Use, constant
from rewriter.ir import Model
from rewriter.pipeline import Pass, Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save
from tests.models import Net, export_keras, perturb, save_keras, save_module, small_keras

Paths = Callable[..., Path]
ROWS = 3
"""The number of examples that `verify` makes."""


def claim(verification: Verification, name: str) -> Claim:
    return next(c for c in verification.claims if c.name == name)


def failing(verification: Verification) -> list[str]:
    return [c.name for c in verification.claims if c.status == FAILS]


def edited(by: Pass, model: Path, target: Path) -> Path:
    save(Pipeline([by]).run(load(model))[0], target)
    return target


@dataclass(frozen=True)
class OtherEpsilon:
    """Let every kernel have another epsilon, in some functions."""

    factor: float
    training: bool = False

    def edits(self, model: Model) -> Iterable[Edit]:
        for name, graph in model.graphs.items():
            for node in graph.nodes.values():
                if node.op in FUSED and op_defs.get(model, node, "is_training") is self.training:
                    epsilon = op_defs.get(model, node, "epsilon") * self.factor
                    yield SetAttr(name, node.name, "epsilon", protos.attr(float(epsilon)))


@dataclass(frozen=True)
class WithoutCorrection:
    """Let every variance that enters an average be times n / (n - 1), as if Bessel's correction had been forgotten."""

    pixels: int

    def edits(self, model: Model) -> Iterable[Edit]:
        n = ROWS * self.pixels
        for graph in model.graphs.values():
            for value, edge in graph.edges():
                if value.port == 2 and graph.nodes[value.node].op in FUSED:
                    yield Rewire(edge, Use("float32", value) * constant(n / (n - 1), "float32"), "test")


def amplifying(path: Path) -> Path:
    """Return a net in single ops in which every layer amplifies small differences without limit."""
    keras.utils.set_random_seed(0)
    layers: list[Any] = [keras.Input((64,))]
    for _ in range(6):
        layers += [keras.layers.Dense(64), keras.layers.BatchNormalization(), keras.layers.Activation(keras.ops.sin)]
    net = keras.Sequential([*layers, keras.layers.Dense(4)])
    perturb(net.weights)
    for layer in net.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(3 * layer.gamma)
    net.export(str(path), verbose=False)
    return path


@pytest.fixture(scope="module")
def amplified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The paths of an amplifying net and of its rewritten form."""
    folder = tmp_path_factory.mktemp("amplified")
    source = amplifying(folder / "a")
    bnqat.rewrite(source, folder / "b")
    return source, folder / "b"


def test_what_a_net_multiplies_is_rounding(amplified: tuple[Path, Path]) -> None:
    """The difference exceeds the rounding that a single batch norm may have."""
    verification = verify(*amplified)
    assert verification.ok, verification.claims
    off = claim(verification, "off")
    assert float(off.detail.partition("but for ")[2].split()[0]) > ROUNDING
    assert "4 times what the source changes by other last bits" in off.detail


def test_a_wrong_epsilon_is_more_than_a_net_multiplies(amplified: tuple[Path, Path], tmp_path: Path) -> None:
    source, result = amplified
    verification = verify(source, edited(OtherEpsilon(1.05), result, tmp_path / "c"))
    assert failing(verification) == ["off"]
    assert (
        "times what the source changes by other last bits in inputs and variables" in claim(verification, "off").detail
    )


@pytest.mark.parametrize("name", ["keras3", "module_train"])
def test_a_wrong_epsilon_in_a_net_as_most_are(name: str, model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    """Epsilon is wrong by 5 %, the smallest error of a formula that has occurred so far."""
    verification = verify(model(name), edited(OtherEpsilon(1.05), rewritten(name), tmp_path / "c"))
    assert failing(verification) == ["off"]
    assert "of its largest element" in claim(verification, "off").detail


TRAINED = {"module_train": 64, "keras_save": 36}
"""Models with a training function of their own, and the number of pixels that their first batch norm sees."""


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_training_is_compared_with_the_sources_own(name: str, model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    source, result = model(name), rewritten(name)
    assert claim(verify(source, result), "training").status == HOLDS
    wrong = verify(source, edited(WithoutCorrection(TRAINED[name]), result, tmp_path / "variance"))
    assert failing(wrong) == ["training"]
    assert "the change of " in claim(wrong, "training").detail
    assert "moving_variance" in claim(wrong, "training").detail
    assert "moving_mean" not in claim(wrong, "training").detail
    wrong = verify(source, edited(OtherEpsilon(1.05, training=True), result, tmp_path / "epsilon"))
    assert failing(wrong) == ["training"]
    assert claim(wrong, "training").detail.startswith("output 0: differs by")


class Drawn(Net):
    """A generator: it draws noise besides taking its input."""

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x + tf.random.normal(tf.shape(x)), training=False)


def test_a_source_that_draws_noise_is_recognised(tmp_path: Path) -> None:
    source = save_module(Drawn(), tmp_path / "a")
    bnqat.rewrite(source, tmp_path / "b")
    verification = verify(source, tmp_path / "b")
    assert verification.ok, verification.claims
    for name in ("off", "on"):
        assert claim(verification, name).status == NOT_APPLICABLE
        assert "draws it at random" in claim(verification, name).detail


def test_values_that_quantisers_keep(tmp_path: Path) -> None:
    """A net that was never trained holds ones and zeros."""
    net = Net()
    for norm in net.norms:
        for variable in norm.variables:
            filled = np.ones if "gamma" in variable.name or "variance" in variable.name else np.zeros
            variable.assign(filled(variable.shape, "float32"))
    source = save_module(net, tmp_path / "a")
    bnqat.rewrite(source, tmp_path / "b")
    verification = verify(source, tmp_path / "b")
    assert verification.ok, verification.claims
    assert "variables hold what quantisers keep as it is" in claim(verification, "on").detail


def test_outputs_that_nothing_changes(tmp_path: Path) -> None:
    """A softmax of one class far above the others gives zeros and ones, whatever the batch norms hold."""
    net = small_keras()
    net.layers[-1].kernel.assign(np.zeros(net.layers[-1].kernel.shape))
    net.layers[-1].bias.assign(1000.0 * np.eye(10)[3])
    outputs = tf_keras.layers.Softmax()(net.output)
    source = export_keras(tf_keras.Model(net.input, outputs), tmp_path / "a")
    bnqat.rewrite(source, tmp_path / "b")
    on_claim = claim(verify(source, tmp_path / "b"), "on")
    assert on_claim.status == NOT_APPLICABLE
    assert on_claim.detail.startswith("outputs stay the same whatever the variables hold")


class EverySecond(tf_keras.layers.Layer):
    """A stand-in for stochastic depth: it drops its input in every second call, or in all calls."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def build(self, shape: Any) -> None:  # noqa: ARG002
        self.calls = self.add_weight("calls", (), tf.int64, "zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if not training:
            return x
        return x * tf.cast(self.calls.assign_add(1) % (1 << 40 if self.always else 2) == 0, x.dtype)


@pytest.mark.parametrize("always", [False, True])
def test_a_block_that_is_left_out_for_a_whole_batch(always: bool, tmp_path: Path) -> None:
    layers = tf_keras.layers
    inputs = layers.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    block = EverySecond(always)(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x)))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(layers.ReLU()(x + block)))
    net = tf_keras.Model(inputs, outputs)
    perturb(net.weights)
    source = save_keras(net, tmp_path / "a")
    bnqat.rewrite(source, tmp_path / "b")
    gradients_claim = claim(verify(source, tmp_path / "b"), "gradients")
    assert gradients_claim.status == (FAILS if always else HOLDS), gradients_claim.detail
    assert not always or "which has no influence then" in gradients_claim.detail


def dense(path: Path) -> Path:
    """Save a net of Keras 2 whose batch norms, except the first, are in single ops."""
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    net = tf_keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(8, 3), layers.BatchNormalization()])
    for added in (layers.Flatten(), layers.Dense(16), layers.BatchNormalization(), layers.ReLU(), layers.Dense(4)):
        net.add(added)
    perturb(net.weights)
    return save_keras(net, path)


@dataclass(frozen=True)
class Unnormalised:
    """Let the second phase normalise nothing."""

    def edits(self, model: Model) -> Iterable[Edit]:
        for name, graph in model.graphs.items():
            for value, edge in graph.edges() if name.endswith(FROZEN) else ():
                kernel = graph.nodes[value.node]
                if kernel.op in FUSED and value.port == 0:
                    yield Rewire(edge, Use("float32", kernel.inputs[0]), "test")


def test_each_phase_has_its_kernels(tmp_path: Path) -> None:
    source = dense(tmp_path / "a")
    bnqat.rewrite(source, tmp_path / "b", freeze_step=5)
    verification = verify(source, tmp_path / "b")
    assert verification.ok, verification.claims
    assert "of which one runs: 2 are reached" in claim(verification, "kernels in training").detail
    wrong = verify(source, edited(Unnormalised(), tmp_path / "b", tmp_path / "c"))
    assert failing(wrong) == ["kernels in training"]


def test_last_bits_are_the_least_change() -> None:
    value = np.array([1.0, -2.0, 0.0, 3.5], np.float32)
    (moved,) = last_bits({"a": value, "b": np.arange(3)}, 0).values()
    assert (np.abs(moved.view(np.int32) - value.view(np.int32)) == [1, 1, 0, 1]).all()


def test_rounding_is_bounded() -> None:
    assert rounding(ROUNDING, 0, 1e-7) == (ROUNDING, "")
    assert rounding(ROUNDING, 0, 1e-5).allowed == CONDITIONING * 1e-5
    assert rounding(0, 0, 1e-5) == (0, "")  # where the bits should be the same, they are
    assert rounding(0, 1e-6, 1e-5).allowed == CONDITIONING * 1e-5  # but for a source whose bits are not
    for unknown in (rounding(ROUNDING, 0, 2 * CHAOS), rounding(ROUNDING, 2 * ROUNDING, 0)):
        assert unknown.allowed is None


def test_an_error_without_a_text_is_told_by_its_place() -> None:
    def fails() -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    assert first_line(caught.value).startswith("AssertionError in fails (test_verified_rounding.py:")
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    assert first_line(ValueError()) == "ValueError"

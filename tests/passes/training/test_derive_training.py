from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.entries.serving import serving_signature
from passes.quantization.training_functions import TRAIN
from passes.training.derive_training import DeriveTraining
from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.ir import Error
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests import harness
from tests.models import FusedBatchNorm, Net, perturb, save_keras, save_module
from tests.models.chosen import CHOSEN_MODELS
from tests.models.forms import IMAGE
from tests.models.handwritten.form import Form
from tests.models.handwritten.nets import Module
from tests.models.handwritten.nets import save_module as save_handwritten

SPEC = tf.TensorSpec((None, 8, 8, 3), name="x")
OFF = 10**9


def rewrite(module: tf.Module, tmp_path: Path, signatures: Any = None, **options: Any) -> tuple[Any, Any]:
    """Save and rewrite a module; return the loaded result and the report."""
    tf.saved_model.save(module, str(tmp_path / "source"), signatures=signatures)
    report = bnqat.rewrite(tmp_path / "source", tmp_path / "out", **options)
    return tf.saved_model.load(str(tmp_path / "out")), report


class Norms(tf.Module):
    """Base class with batch norms."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.norms = [FusedBatchNorm(3) for _ in range(count)]
        perturb(v for n in self.norms for v in n.variables)


def moved(module: Any, call: Callable[[], Any]) -> list[bool]:
    """Return, for each layer, true if a call changes its moving mean."""
    before = [n.moving_mean.numpy() for n in module.norms]
    call()
    return [not np.array_equal(a, n.moving_mean) for a, n in zip(before, module.norms, strict=True)]


def test_text_and_counts(model: Callable[[str], Path]) -> None:
    before = load(model("module"))
    after, (step,) = Pipeline([DeriveTraining()]).run(before)
    graph = after.graphs[TRAIN]
    ops = [n.op for n in graph.nodes.values()]
    assert ops.count("FusedBatchNormV3") == 2
    assert ops.count("AssignVariableOp") == 4
    assert ops.count("AssignAddVariableOp") == 1
    assert all("is_training" not in n.attrs for n in graph.nodes.values() if n.op == "FusedBatchNormV3")
    assert len(step.notes) == 1
    assert "0.99 is assumed" in step.notes[0]
    assert after.graphs.keys() - before.graphs.keys() == {TRAIN, "__inference_bnqat_train_signature_0"}
    again, _ = Pipeline([DeriveTraining()]).run(after)
    assert again is after


class Conditional(Norms):
    @tf.function(input_signature=[SPEC, tf.TensorSpec([], tf.int32, name="which")])
    def serve(self, x: tf.Tensor, which: tf.Tensor) -> tf.Tensor:
        return tf.switch_case(which, [lambda n=n: n(x, training=False) for n in self.norms])


class Either(Norms):
    @tf.function(input_signature=[SPEC, tf.TensorSpec([], tf.int32, name="which")])
    def serve(self, x: tf.Tensor, which: tf.Tensor) -> tf.Tensor:
        return tf.cond(which == 0, lambda: self.norms[0](x, training=False), lambda: self.norms[1](x, training=False))


class Loop(Norms):
    @tf.function(input_signature=[SPEC, tf.TensorSpec([], tf.int32, name="which")])
    def serve(self, x: tf.Tensor, which: tf.Tensor) -> tf.Tensor:
        x = self.norms[0](x, training=False)
        return tf.while_loop(lambda i, _: i < which, lambda i, x: (i + 1, self.norms[1](x, training=False)), (0, x))[1]


@pytest.mark.parametrize("make", [Conditional, Either, Loop])
def test_batch_norms_in_branches_and_loops(make: Any, tmp_path: Path) -> None:
    module = make()
    loaded, report = rewrite(module, tmp_path, {"serving_default": module.serve}, bits=4)
    assert report.sites_rewritten == report.sites_found == 2
    x = harness.images(SPEC.shape)
    assert moved(loaded, lambda: loaded.train(x, tf.constant(0))) == [True, False]
    assert moved(loaded, lambda: loaded.train(x, tf.constant(1))) == [make is Loop, True]
    assert loaded.quantization.step.numpy() == 2
    loaded.quantization.start_step.assign(OFF)
    np.testing.assert_array_equal(
        loaded.signatures["serving_default"](x=x, which=tf.constant(0))["output_0"], loaded.serve(x, tf.constant(0))
    )


class Twice(Norms):
    """A model that applies one layer twice in one graph."""

    @tf.function(input_signature=[SPEC])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norms[0](self.norms[0](x, training=False) * 2, training=False)


class Nested(Norms):
    """A model with a function that is called twice with the same variables."""

    def __init__(self) -> None:
        super().__init__(1)
        self.inner = tf.function(lambda x: self.norms[0](x, training=False) * 2)

    @tf.function(input_signature=[SPEC])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.inner(self.inner(x))


@pytest.mark.parametrize("make", [lambda: Twice(1), Nested], ids=["one graph", "two calls"])
def test_a_layer_used_twice_is_updated_in_order(make: Callable[[], Any], tmp_path: Path) -> None:
    module = make()
    loaded, _ = rewrite(module, tmp_path, {"serving_default": module.serve}, momentum=0.9, start_step=OFF)
    x = harness.images(SPEC.shape)
    loaded.train(x)
    norm = module.norms[0]
    norm.factor = 0.1
    norm(norm(x, training=True) * 2, training=True)
    np.testing.assert_allclose(loaded.norms[0].moving_mean, norm.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(loaded.norms[0].moving_variance, norm.moving_variance, rtol=1e-5)


class TwoInputs(Norms):
    """A model whose inputs differ in positional and alphabetical order."""

    @tf.function(input_signature=[SPEC, tf.TensorSpec((None, 8, 8, 3), name="a")])
    def serve(self, x: tf.Tensor, a: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"q": self.norms[0](x, training=False), "p": self.norms[1](a, training=False) * 100}


def test_inputs_and_outputs_go_by_name(tmp_path: Path) -> None:
    module = TwoInputs()
    loaded, _ = rewrite(module, tmp_path, {"serving_default": module.serve}, start_step=OFF)
    x, a = harness.images(SPEC.shape, seed=1), harness.images(SPEC.shape, seed=2)
    expected = loaded.train(x, a)
    got = loaded.signatures["train"](x=x, a=a)
    for key in ("p", "q"):
        np.testing.assert_array_equal(got[key], expected[key])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "out")).signature_def["train"]
        feed = {signature.inputs["x"].name: x.numpy(), signature.inputs["a"].name: a.numpy()}
        for key in ("p", "q"):
            got = session.run(signature.outputs[key].name, feed)
            np.testing.assert_allclose(got, expected[key], rtol=1e-5, atol=1e-5)


def test_several_outputs_of_keras_keep_their_names(tmp_path: Path) -> None:
    """The training trace returns a list in the model's order, the signature a dict in that of the names."""
    import tf_keras

    layers = tf_keras.layers
    tf_keras.backend.clear_session()
    image = layers.Input((8, 8, 3))
    y = layers.BatchNormalization()(image)
    outputs = [layers.Conv2D(3, 1, name="zz")(y), layers.Dropout(0.5, name="aa")(layers.Conv2D(3, 1)(y))]
    source = save_keras(tf_keras.Model(image, outputs), tmp_path / "source")
    report = bnqat.rewrite(source, tmp_path / "out", start_step=OFF)
    assert any("training trace" in note for note in report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = harness.images(SPEC.shape)
    trained = [loaded.train(x), loaded.signatures["train"](x)]
    for named_outputs in trained:
        assert set(named_outputs) == {"aa", "zz"}
        assert np.mean(named_outputs["aa"] == 0) > 0.3
        assert np.mean(named_outputs["zz"] == 0) < 0.1


class OwnSignature(Norms):
    @tf.function(input_signature=[SPEC])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norms[0](x, training=False)

    @tf.function(input_signature=[SPEC])
    def fit(self, x: tf.Tensor) -> tf.Tensor:
        return self.norms[0](x, training=True) + 1


def test_a_signature_train_of_the_source_is_kept(tmp_path: Path) -> None:
    module = OwnSignature(1)
    signatures = {"serving_default": module.serve, "train": module.fit}
    loaded, report = rewrite(module, tmp_path, signatures, start_step=OFF)
    x = harness.images(SPEC.shape)
    np.testing.assert_array_equal(loaded.signatures["train"](x)["output_0"], loaded.fit(x))
    assert loaded.quantization.step.numpy() == 0
    loaded.quantization.train(x)
    assert loaded.quantization.step.numpy() == 1
    assert any("signature 'train' of its own" in note for note in report.notes)


class KeywordOnly(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [FusedBatchNorm(3)]

    @tf.function(input_signature=None)
    def __call__(self, x: tf.Tensor, *, scale: tf.Tensor) -> tf.Tensor:
        return self.norms[0](x, training=False) * scale


def test_without_signatures_train_is_a_function_of_the_root(tmp_path: Path) -> None:
    module = KeywordOnly()
    module(tf.zeros([1, 8, 8, 3]), scale=tf.constant(2.0))
    module.__call__.get_concrete_function(SPEC, scale=tf.TensorSpec([], name="scale"))
    loaded, report = rewrite(module, tmp_path)
    assert "train" not in loaded.signatures
    assert any("no signature 'train'" in note for note in report.notes)
    assert moved(loaded, lambda: loaded.train(harness.images(SPEC.shape, 1), tf.constant(2.0))) == [True]


class Predict(Norms):
    @tf.function(input_signature=[SPEC])
    def predict(self, x: tf.Tensor) -> tf.Tensor:
        return self.norms[0](x, training=False)


def test_any_function_of_the_root_can_serve(tmp_path: Path) -> None:
    loaded, _ = rewrite(Predict(1), tmp_path)
    assert moved(loaded, lambda: loaded.train(harness.images(SPEC.shape))) == [True]


def test_a_momentum_without_influence_is_said(model: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(model("module_train"), tmp_path / "out", momentum=0.5, dry_run=True)
    assert any("momentum given has no influence" in note for note in report.notes)


class ByValue(Norms):
    """A model whose statistics are read in one function and used in another."""

    def __init__(self) -> None:
        super().__init__(1)

        def norm(x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
            n = self.norms[0]
            return tf.raw_ops.FusedBatchNormV3(
                x=x, scale=n.gamma, offset=n.beta, mean=mean, variance=variance, is_training=False
            )[0]

        self.norm = tf.function(norm)

    @tf.function(input_signature=[SPEC])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, self.norms[0].moving_mean.read_value(), self.norms[0].moving_variance.read_value())


def test_what_cannot_be_trained_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    module = ByValue()
    with pytest.raises(bnqat.Error, match=r"read in another function.*--passes quantize"):
        rewrite(module, tmp_path, {"serving_default": module.serve})
    assert not (tmp_path / "out").exists()
    bnqat.rewrite(tmp_path / "source", tmp_path / "out", passes=["quantize"], bits=2)
    loaded, source = (tf.saved_model.load(str(tmp_path / name)) for name in ("out", "source"))
    x = harness.images(SPEC.shape)
    assert not np.array_equal(loaded.serve(x), source.serve(x))


def test_a_source_with_an_attribute_quantization_is_declined(tmp_path: Path) -> None:
    module = Net()
    module.quantization = tf.Variable(1.0)
    with pytest.raises(bnqat.Error, match="attribute 'quantization' of its own"):
        bnqat.rewrite(save_module(module, tmp_path / "m"), tmp_path / "out")


def test_the_signature_that_computes_a_batch_norm_is_chosen(tmp_path: Path) -> None:
    module = Norms(1)
    module.plain = tf.function(lambda x: x + 1, input_signature=[SPEC])
    module.normal = tf.function(lambda x: module.norms[0](x, training=False), input_signature=[SPEC])
    signatures = {"serving_default": module.plain, "other": module.normal}
    loaded, _ = rewrite(module, tmp_path, signatures)
    signature = serving_signature(load(tmp_path / "source"))
    assert signature is not None
    assert signature.name == "other"
    assert moved(loaded, lambda: loaded.signatures["train"](harness.images(SPEC.shape))) == [True]


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(Error, match="momentum = "):
        DeriveTraining(momentum)


@pytest.mark.parametrize("name", ["keras_save", "keras_export"])
def test_a_phase_is_seen_in_order_within_one_function(name: str, rewritten: Callable[..., Path]) -> None:
    """Serving between two training steps sees the phase between them, not the next one."""
    loaded = tf.saved_model.load(str(rewritten(name, bits=2, start_step=2)))
    x = harness.images(SPEC.shape)
    moving = [v for v in loaded.quantization.variables if "moving" in v.name]
    start = [v.numpy() for v in moving]

    def reset() -> None:
        loaded.quantization.step.assign(0)
        for v, value in zip(moving, start, strict=True):
            v.assign(value)

    def run() -> Any:
        outputs = []
        for _ in range(3):
            outputs.append(loaded.serve(x))
            loaded.train(x)
        return outputs, loaded.quantization.step.read_value()

    reset()
    expected, _ = run()
    compiled = tf.function(run)
    for _ in range(10):
        reset()
        got, step = compiled()
        assert step.numpy() == 3
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["chosen_updates_inside", "chosen_moments_inside"])
def test_serving_and_training_are_both_differentiated(name: str, fuse: bool, tmp_path: Path) -> None:
    """If both ran the same functions in a conditional, TensorFlow could not differentiate both in one process."""
    CHOSEN_MODELS[name](tmp_path / "m")
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", fuse=fuse, start_step=100)
    loaded = tf.saved_model.load(str(tmp_path / "q"))
    slopes = []
    for function in (loaded.serve, loaded.quantization.train):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(harness.images((None, *IMAGE)), tf.constant(value=True)) ** 2)
        slopes.append(tape.gradient(loss, loaded.layers[0].gamma))
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-6)
    assert np.any(slopes[0])


def test_an_update_in_the_caller_of_a_branch_gives_way(tmp_path: Path) -> None:
    """The source averages what its conditional chose; both updates at once would race."""
    form = Form(chosen="output", branches="inside", averaged="chosen", placement="output", mode="false", control_flow=2)
    save_handwritten(Module(replace(form, api="function")), tmp_path / "m")
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", fuse=False)
    model = load(tmp_path / "q")
    assigned = Counter(
        origin.key
        for name in model.analysis(call_graph).reached(TRAIN)
        for node in model.graphs[name].nodes.values()
        if node.op.startswith("Assign")
        for origin in origins(model, name, node.inputs[0])
        if isinstance(origin, VariableKey)
    )
    averages = [key for key, variable in model.variables.items() if variable.name.startswith("moving")]
    assert {assigned[key] for key in averages} == {1}
    assert len(averages) == 4


class UpdatedByFunction(tf.Module):
    """A batch norm whose averages are updated by one function, which is called for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedBatchNorm(3)
        self.update = tf.function(lambda average, batch: average.assign(average * 0.8 + batch * 0.2))

    @tf.function(input_signature=[SPEC])
    def training(self, x: tf.Tensor) -> tf.Tensor:
        batch = tf.nn.moments(x, [0, 1, 2])
        for average, statistic in zip((self.norm.moving_mean, self.norm.moving_variance), batch, strict=True):
            self.update(average, statistic)
        return tf.nn.batch_normalization(x, *batch, self.norm.beta, self.norm.gamma, 1e-3)

    @tf.function(input_signature=[SPEC])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, training=False)


def test_a_function_that_updates_both_averages_is_told_apart_by_its_calls(tmp_path: Path) -> None:
    module = UpdatedByFunction()
    loaded, report = rewrite(module, tmp_path, module.serve, start_step=OFF)
    assert any(note.startswith("train is the source's training trace") for note in report.notes)
    (described,) = bnqat.inspect(tmp_path / "source").batch_norms
    assert len(set(described.variables.values())) == 4
    x = harness.images(SPEC.shape)
    module.training(x)
    loaded.train(x)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(getattr(loaded.norm, name), getattr(module.norm, name), rtol=1e-6)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.sites import sites
from passes.frontend.split_modes import SplitModes
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.chosen import CHOSEN_MODELS, NORMS, Chosen
from tests.models.forms import IMAGE
from tests.reliability.forks import Server
from tests.test_fused import FUSING, TOLERANCE, batch, difference

Paths = Callable[[str], Path]


@pytest.mark.parametrize("name", ["chosen_updates_inside", "chosen_selected"])
def test_the_function_calls_one_of_two_that_choose_nothing(name: str, tmp_path: Path) -> None:
    before = load(CHOSEN_MODELS[name](tmp_path / "m"))
    (serve,) = (e.function for e in before.root_entries("serve"))
    after, _ = Pipeline([SplitModes()]).run(before)
    graph = after.graphs[serve]
    (node,) = (n for n in graph.nodes.values() if n.op != "Arg")
    assert (node.op, node.inputs[0].node) == ("If", "training")
    assert [r.value.node for r in graph.results] == [node.name]
    assert [e.node for e in graph.effects] == [node.name]
    for key, suffix in (("then_branch", "when"), ("else_branch", "unless")):
        branch = after.graphs[node.attrs[key].func.name]
        assert branch.name == f"{serve}_{suffix}_training"
        ops = {n.op for n in branch.nodes.values()}
        assert not ops & {"If", "StatelessIf", "Select", "SelectV2"}
        assert ("Mean" in ops) == (suffix == "when")
        assert ("AssignSubVariableOp" in ops) == (suffix == "when")
    again, _ = Pipeline([SplitModes()]).run(after)
    assert again is after


def test_an_argument_that_decides_something_else_is_left(tmp_path: Path) -> None:
    class Flipped(Chosen):
        def call(self, x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
            x = tf.cond(training, lambda: tf.reverse(x, [1]), lambda: tf.identity(x))
            return super().call(tf.ensure_shape(x, (None, *IMAGE)) + 1.0, tf.constant(value=False))

    module = Flipped(NORMS["chosen_two_kernels"])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    before = load(tmp_path / "m")
    after, _ = Pipeline([SplitModes()]).run(before)
    assert after.graphs.keys() == before.graphs.keys()
    (serve,) = (after.graphs[e.function] for e in before.root_entries("serve"))
    assert [n.inputs[0].node for n in serve.nodes.values() if n.op.endswith("If")] == ["training"]
    assert {s.mode for s in after.analysis(sites)} == {"inference"}  # which a constant chooses


class Twice(Chosen):
    """A model with two modes, one for each of its two layers."""

    def __init__(self) -> None:
        super().__init__(NORMS["chosen_updates_inside"])
        flag = tf.TensorSpec([], tf.bool)
        specs = [tf.TensorSpec((None, *IMAGE), name="x"), flag, flag]
        self.serve = tf.function(self.both, input_signature=specs)

    def both(self, x: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        return self.norm(tf.nn.relu(self.norm(x, self.layers[0], first)), self.layers[1], second)


def test_two_modes_of_one_function_are_chosen_and_differentiated(plain_forks: Server, tmp_path: Path) -> None:
    """It runs in a process of its own, because TensorFlow keeps the functions that differentiation makes."""
    module = Twice()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "q", start_step=2**40)
    assert (report.sites_found, report.sites_fused) == (2, 2)
    done = plain_forks.python(DIFFERENTIATED, tmp_path)
    assert done.out == "fine\n", done.err[-2000:]


class Nested(Chosen):
    """A model in which one layer also runs under a condition other than its mode."""

    def call(self, x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
        def norm() -> tf.Tensor:
            return tf.cond(tf.reduce_max(x) > 1.0, lambda: self.norm(x, self.layers[0], training), lambda: x + 1.0)

        y = tf.cond(tf.reduce_mean(x) > 0.0, norm, lambda: x + 2.0)
        return self.norm(tf.ensure_shape(y, x.shape), self.layers[1], training)


@pytest.mark.parametrize("name", ["chosen_moments_inside", "chosen_two_kernels_updated"])
def test_a_layer_under_another_condition(name: str, tmp_path: Path) -> None:
    module = Nested(NORMS[name])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    loaded = tf.saved_model.load(str(tmp_path / "f"))
    for index in range(6):
        x, training = batch(index, IMAGE) * [1.0, -1.0, 0.01][index % 3], tf.constant(index < 3)
        results = []
        for model in (loaded, module):
            y = model.serve(x, training).numpy()
            results.append([y, *(s.numpy() for v in model.layers for s in (v.moving_mean, v.moving_variance))])
        assert difference(*results) < TOLERANCE


DIFFERENTIATED = """
import itertools, sys
import numpy as np, tensorflow as tf
models = [tf.saved_model.load(f"{sys.argv[1]}/{name}") for name in "mq"]
x = tf.random.stateless_normal((4, 4, 4, 6), (1, 2))
for modes in itertools.product((tf.constant(True), tf.constant(False)), repeat=2):
    seen = []
    for model in models:
        trained = [v for layer in model.layers for v in (layer.gamma, layer.beta)]
        with tf.GradientTape() as tape:
            y = model.serve(x, *modes)
            loss = tf.reduce_sum(y * tf.random.stateless_normal(tf.shape(y), (3, 4)))
        held = [v for layer in model.layers for v in (layer.moving_mean, layer.moving_variance)]
        seen.append([y, *tape.gradient(loss, trained), *held])
    for a, b in zip(*seen, strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
print("fine")
"""


def with_modes(module: Twice, first: bool, second: bool) -> Any:
    def call(x: tf.Tensor) -> tf.Tensor:
        return module.both(x, tf.constant(first), tf.constant(second))

    return tf.function(call, module.serve.input_signature[:1])


@pytest.mark.parametrize("fuse", [False, True])
def test_of_two_training_functions_the_one_that_trains_most_is_train(fuse: bool, tmp_path: Path) -> None:
    chosen, module = Twice(), tf.Module()
    module.layers = chosen.layers
    for name, modes in (("a_part", (True, False)), ("b_train", (True, True)), ("serve", (False, False))):
        setattr(module, name, with_modes(chosen, *modes))
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", start_step=2**40, fuse=fuse)
    loaded, x = tf.saved_model.load(str(tmp_path / "q")), batch(0, IMAGE)
    output, expected = loaded.quantization.train(x), module.b_train(x)
    assert difference([output.numpy()], [expected.numpy()]) < TOLERANCE


FIXED = {
    "in a call": lambda m: tf.function(lambda x: m.serve(x, tf.constant(value=False)), m.serve.input_signature[:1]),
    "inside": lambda m: tf.function(lambda x: m.call(x, tf.constant(value=False)), m.serve.input_signature[:1]),
}


@pytest.mark.parametrize("where", FIXED)
@pytest.mark.parametrize("name", ["chosen_moments_inside", "chosen_two_kernels", "chosen_two_by_hand"])
def test_what_a_constant_fixes_to_inference_is_derived(name: str, where: str, tmp_path: Path) -> None:
    """`train` is the layer's training, though serving fixes the mode; without fusing, that is an error."""
    chosen, module = Chosen(NORMS[name]), tf.Module()
    module.layers, module.mix, module.chosen, module.infer = (
        chosen.layers,
        chosen.mix,
        chosen.serve,
        FIXED[where](chosen),
    )
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.infer})
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", start_step=2**40, momentum=0.9)
    loaded, x = tf.saved_model.load(str(tmp_path / "q")), batch(0, IMAGE)
    output, expected = loaded.train(x), module.chosen(x, tf.constant(value=True))
    averages = [[s.numpy() for v in m.layers for s in (v.moving_mean, v.moving_variance)] for m in (loaded, module)]
    assert difference([output.numpy(), *averages[0]], [expected.numpy(), *averages[1]]) < TOLERANCE
    try:
        bnqat.rewrite(tmp_path / "m", tmp_path / "n", fuse=False, momentum=0.9)
    except bnqat.Error as e:
        assert "no training function can be derived" in str(e)  # noqa: PT017  else it has to train
    else:
        loaded = tf.saved_model.load(str(tmp_path / "n"))
        before = loaded.layers[0].moving_mean.numpy()
        loaded.train(x)
        assert np.abs(loaded.layers[0].moving_mean.numpy() - before).max() > 0


def test_the_function_that_takes_its_mode_is_train(tmp_path: Path) -> None:
    source = CHOSEN_MODELS["chosen_moments_inside"](tmp_path / "m")
    report = bnqat.rewrite(source, tmp_path / "q", start_step=2)
    assert any("which chooses its mode itself" in note for note in report.notes)
    loaded, x = tf.saved_model.load(str(tmp_path / "q")), tf.ones((2, *IMAGE))
    before = loaded.layers[0].moving_mean.numpy()
    loaded.train(x, tf.constant(value=True))
    assert loaded.quantization.step.numpy() == 1
    assert (loaded.layers[0].moving_mean.numpy() != before).all()
    before = loaded.layers[0].moving_mean.numpy()
    loaded.serve(x, tf.constant(value=False))
    assert (loaded.quantization.step.numpy(), (loaded.layers[0].moving_mean.numpy() == before).all()) == (1, True)


def test_a_function_that_serves_with_the_mode_fixed_is_trained_by_derivation(tmp_path: Path) -> None:
    """`serve(x)` calls the function that takes the mode with False; no trace of it trains."""
    module = Chosen(NORMS["chosen_moments_inside"])
    body = module.serve
    module.serve = tf.function(
        lambda x: body(x, tf.constant(value=False)), input_signature=[tf.TensorSpec((None, *IMAGE), name="x")]
    )
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "q", start_step=9)
    assert (report.sites_found, report.sites_rewritten, report.sites_fused, report.skipped) == (2, 2, 2, [])
    assert any("derived from serving" in note for note in report.notes)
    loaded, x = tf.saved_model.load(str(tmp_path / "q")), tf.random.stateless_normal((4, *IMAGE), (1, 2))
    before = [v.numpy() for layer in loaded.layers for v in (layer.moving_mean, layer.moving_variance)]
    assert (loaded.train(x).numpy() != loaded.serve(x).numpy()).any()
    moved = [v.numpy() for layer in loaded.layers for v in (layer.moving_mean, layer.moving_variance)]
    assert all((a != b).any() for a, b in zip(moved, before, strict=True))

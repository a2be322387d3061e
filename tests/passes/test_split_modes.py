from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

import bnqat
from passes.split_modes import SplitModes
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.chosen import CHOSEN_MODELS, NORMS, Chosen
from tests.models.forms import IMAGE

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
    assert after is before


def test_the_function_that_takes_its_mode_is_train(tmp_path: Path) -> None:
    source = CHOSEN_MODELS["chosen_moments_inside"](tmp_path / "m")
    report = bnqat.rewrite(source, tmp_path / "q", start_step=2)
    assert any("which chooses its mode itself" in note for note in report.notes)
    loaded, x = tf.saved_model.load(str(tmp_path / "q")), tf.ones((2, *IMAGE))
    held = loaded.layers[0].moving_mean.numpy()
    loaded.train(x, tf.constant(value=True))
    assert loaded.quantization.step.numpy() == 1
    assert (loaded.layers[0].moving_mean.numpy() != held).all()
    held = loaded.layers[0].moving_mean.numpy()
    loaded.serve(x, tf.constant(value=False))
    assert (loaded.quantization.step.numpy(), (loaded.layers[0].moving_mean.numpy() == held).all()) == (1, True)


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
    held = [v.numpy() for layer in loaded.layers for v in (layer.moving_mean, layer.moving_variance)]
    assert (loaded.train(x).numpy() != loaded.serve(x).numpy()).any()
    moved = [v.numpy() for layer in loaded.layers for v in (layer.moving_mean, layer.moving_variance)]
    assert all((a != b).any() for a, b in zip(moved, held, strict=True))

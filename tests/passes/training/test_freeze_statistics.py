from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.sites import sites
from passes.quantization.training_functions import TRAIN
from passes.training.derive_training import DeriveTraining
from passes.training.freeze_statistics import FreezeStatistics
from rewriter.ir import MAIN, Entry, Error, Graph, Model, Spec, Variable
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from rewriter.text import from_text, to_text
from tests import harness
from tests.models.structures import STRUCTURES

Paths = Callable[[str], Path]

BEFORE = f"""\
stateful function {TRAIN}(x: float32, g: resource, m: resource, v: resource) -> (y = bn: float32) {{
  gamma = ReadVariableOp(g) {{dtype: float32}}
  bn = FusedBatchNormV3(x, gamma, gamma, gamma, gamma) {{T: float32, U: float32}}
  mean = ReadVariableOp(m) {{dtype: float32}}
  difference = Sub(mean, bn:1) {{T: float32}}
  delta = Mul(difference, gamma) {{T: float32}}
  new_mean = AssignSubVariableOp(m, delta) {{dtype: float32}}
  new_variance = AssignVariableOp(v, bn:2) {{dtype: float32}}
  effect new_mean = new_mean
  effect new_variance = new_variance
}}
"""
FROZEN = """\
gamma = ReadVariableOp(g)
bn = FusedBatchNormV3(x, gamma, gamma, bn/moving_mean/ReadVariableOp, bn/moving_variance/ReadVariableOp)
mean = ReadVariableOp(m)
difference = Sub(mean, bn:1)
delta = Mul(difference, gamma)
new_mean = NoOp()
new_variance = NoOp()
bn/moving_mean/ReadVariableOp = ReadVariableOp(m)
bn/moving_variance/ReadVariableOp = ReadVariableOp(v)
effect new_mean = new_mean
effect new_variance = new_variance
"""


def frozen(model: Model, freeze_step: int | None = 5) -> Model:
    return Pipeline([FreezeStatistics(freeze_step)]).run(model)[0]


def lines(graph: Graph) -> list[str]:
    return [re.sub(r" \{.*| -> .*", "", line).strip() for line in to_text(graph).splitlines()]


def test_text_before_and_after() -> None:
    """The frozen copy reads the averages and assigns nothing; the function itself chooses between two."""
    keys = ("gamma", "moving_mean", "moving_variance")
    variables = {k: Variable(k, f"layer/{k}", "float32", (3,)) for k in keys}
    spec = (Spec("x", "float32", None),)
    before = Model(
        {MAIN: Graph(MAIN, {}), TRAIN: from_text(BEFORE)}, variables, {TRAIN: Entry(TRAIN, spec, spec, keys)}
    )
    after = frozen(before)
    assert lines(after.graphs[f"{TRAIN}_frozen"])[1:-1] == FROZEN.splitlines()
    kernel = after.graphs[f"{TRAIN}_frozen"].nodes["bn"]
    assert kernel.attrs["is_training"].b is False
    assert lines(after.graphs[f"{TRAIN}_learning"])[1:] == lines(before.graphs[TRAIN])[1:]
    (chosen,) = (n for n in after.graphs[TRAIN].nodes.values() if n.op == "If")
    assert chosen.inputs[0].node == "statistics_frozen/GreaterEqual"
    branches = [chosen.attrs[k].func.name for k in ("then_branch", "else_branch")]
    assert branches == [f"{TRAIN}_frozen", f"{TRAIN}_learning"]
    assert frozen(after) is after
    assert frozen(before, None) is before


def test_every_training_site_has_one_that_infers(model: Paths) -> None:
    trained = Pipeline([DeriveTraining()]).run(load(model("keras_save")))[0]
    after = frozen(trained)
    modes: dict[bool, list[str]] = {}
    for site in after.analysis(sites):
        modes.setdefault(site.graph.endswith("_frozen"), []).append(site.mode)
    assert modes[True] == ["inference"] * len(modes[True])
    before = [s for s in trained.analysis(sites) if s.training]
    assert len([m for m in modes[False] if m == "training"]) == len(before)


@pytest.mark.parametrize("name", ["nested", "if", "case", "while", "arguments", "module_shared"])
def test_in_branches_loops_and_shared_functions(name: str, tmp_path: Path, model: Paths) -> None:
    source = STRUCTURES[name](tmp_path / "m") if name in STRUCTURES else model(name)
    report = bnqat.rewrite(source, tmp_path / "out", freeze_step=2, bits=4)
    assert not any("stay as they are" in note for note in report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    train = loaded.quantization.train
    (x,) = (harness.images(t.shape) for t in harness.concrete(train).inputs if t.dtype == tf.float32)
    averages = [
        v for v in loaded.quantization.variables if "moving" in v.name and not v.name.startswith("quantization/")
    ]
    for step in range(4):
        before, served = [v.numpy() for v in averages], tf.nest.flatten(loaded.serve(x))
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(train(x))
            loss = tf.add_n([tf.reduce_sum(y**2) for y in outputs if y.dtype.is_floating])
        gradients = tape.gradient(loss, list(loaded.quantization.trainable_variables))
        assert any(g is not None and np.any(g) for g in gradients)
        moved = [not np.array_equal(v, old) for v, old in zip(averages, before, strict=True)]
        assert any(moved) is (step < 2)
        if step >= 2:
            for a, b in zip(outputs, served, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_model_without_training_function_is_declined(model: Paths) -> None:
    with pytest.raises(Error, match="there is no training function with two phases to make"):
        frozen(load(model("module")))


@pytest.mark.parametrize("step", [-1, 2**63])
def test_steps_out_of_range(step: int) -> None:
    with pytest.raises(Error, match="freeze_step = "):
        FreezeStatistics(step)


def test_training_that_is_not_fused(model: Paths, tmp_path: Path) -> None:
    """Moments in single ops stay in single ops."""
    bnqat.rewrite(model("form_library_video"), tmp_path / "out", freeze_step=1, bits=4, fuse=False)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    train = loaded.quantization.train
    x = harness.images(harness.concrete(train).inputs[0].shape)
    assert not np.array_equal(train(x), loaded.serve(x))
    for _ in range(2):
        np.testing.assert_allclose(train(x), loaded.serve(x), rtol=1e-5, atol=1e-6)

"""Moving statistics under `tf.distribute`; tests/training/test_distributed.py tests their use by replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

import bnqat
from passes.quantization.controls import MEAN, ON_READ
from passes.training.aggregate_statistics import AggregateStatistics
from rewriter.apply import apply
from rewriter.edit import Synchronize
from rewriter.ir import Error, Model
from rewriter.savedmodel.read import load
from tests.models import Trainable, save_module

Paths = Callable[..., Path]


def changed(model: Model) -> set[str]:
    return {e.key.partition("/.")[0] for e in AggregateStatistics().edits(model) if isinstance(e, Synchronize)}


MOVING = {f"norms/{i}/moving_{what}" for i in (0, 1) for what in ("mean", "variance")}


def test_a_module_asks_for_nothing_and_keras_2_for_the_same(model: Paths) -> None:
    assert changed(load(model("module_train"))) == MOVING
    assert changed(load(model("keras_save"))) == set()  # as it is there already
    assert changed(load(model("module"))) == set()  # inference alone
    assert changed(load(model("v1_two_fused"))) == set()
    variables = load(model("keras_save")).variables.values()
    assert sum((v.synchronization, v.aggregation) == (ON_READ, MEAN) for v in variables) == 4


def test_after_a_rewrite_they_are_loaded_so_and_it_is_the_rewrites_own_change(rewritten: Paths, model: Paths) -> None:
    path = rewritten("module", bits=4)
    loaded = tf.saved_model.load(str(path))
    for norm in loaded.norms:
        for variable in (norm.moving_mean, norm.moving_variance):
            assert variable.synchronization == tf.VariableSynchronization.ON_READ
            assert variable.aggregation == tf.VariableAggregation.MEAN
        assert norm.gamma.aggregation == tf.VariableAggregation.NONE
    assert changed(load(path)) == set()
    report = bnqat.diff(model("module"), path).report
    variable_changes = [c for c in report.changes if c.kind == "variable" and c.what == "changed"]
    assert {c.name.partition("/.")[0] for c in variable_changes} == MOVING
    details = {(d.aspect, d.old, d.new) for c in variable_changes for d in c.details}
    assert details == {("synchronization", "AUTO", "ON_READ"), ("aggregation", "NONE", "MEAN")}
    assert {c.by for c in variable_changes} == {("aggregate-statistics",)}
    assert report.verdict.other_changes == 0


def test_a_trainable_one_is_left(tmp_path: Path) -> None:
    """TensorFlow loads no trainable variable that is synchronised on reading."""
    module = Trainable()
    module.norms[0].moving_mean = tf.Variable(module.norms[0].moving_mean, trainable=True, name="moving_mean")
    save_module(module, tmp_path / "m")
    assert changed(load(tmp_path / "m")) == MOVING - {"norms/0/moving_mean"}
    bnqat.rewrite(tmp_path / "m", tmp_path / "q")
    assert tf.saved_model.load(str(tmp_path / "q")).norms[0].moving_mean.trainable


def test_alone_it_is_written_too(model: Paths, tmp_path: Path) -> None:
    bnqat.rewrite(model("module_train"), tmp_path / "m", passes=["aggregate-statistics"])
    after = load(tmp_path / "m")
    assert changed(after) == set()
    assert sum(v.synchronization == ON_READ for v in after.variables.values()) == 4


def test_a_variable_that_is_not_there(model: Paths) -> None:
    with pytest.raises(Error, match="there is no variable nowhere to synchronise"):
        apply(load(model("module")), [Synchronize("nowhere", ON_READ, MEAN)])

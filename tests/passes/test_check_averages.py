"""Averages that a training function leaves as they are: an error or a note, by name; nothing where all move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import bnqat
from passes.branches import Branches
from passes.check_averages import CheckAverages
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.v1 import DECAY, EPSILON, by_hand, save_v1, v1, variables

NAMED = "moving averages"


def notes(report: Any) -> list[str]:
    return [note for note in report.notes if NAMED in note]


def normalised(x: tf.Tensor, training: Any, update: Callable[[Any, Any], Any]) -> tf.Tensor:
    """A batch norm that chooses its statistics; `update` makes an op of a variable and a batch's statistic."""
    gamma, beta, *moving = variables(x.shape[-1])
    batch = tf.nn.moments(x, [0, 1, 2])
    for variable, statistic in zip(moving, batch, strict=True):
        update(variable, statistic)
    mean, variance = (
        v1.cond(training, lambda b=b: tf.identity(b), lambda m=m: tf.identity(m))
        for b, m in zip(batch, moving, strict=True)
    )
    found: tf.Tensor = v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
    return found


def never(x: tf.Tensor, training: Any) -> tf.Tensor:
    return normalised(x, training, lambda *_: None)


def at_times(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Updated behind a condition of its own, of which the mode says nothing."""
    often = tf.reduce_sum(x) > -1e9

    def update(variable: Any, batch: Any) -> None:
        moved = v1.cond(often, lambda: v1.assign(variable, DECAY * variable + (1 - DECAY) * batch), lambda: variable)
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, moved)

    return normalised(x, training, update)


def test_an_update_that_is_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here updates cannot take the statistics that a branch computes, and stay with those of single ops."""
    source = save_v1(tmp_path / "m", by_hand, training="placeholder", control_flow_v2=True)
    assert notes(bnqat.rewrite(source, tmp_path / "q")) == []
    monkeypatch.setattr(Branches, "serves", lambda *_: False)
    with pytest.raises(bnqat.Error, match=r"train would leave norm_0/moving_mean as it is, which the source updates"):
        bnqat.rewrite(source, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_what_the_source_never_moves_is_named(fuse: bool, control_flow_v2: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", never, training="placeholder", control_flow_v2=control_flow_v2)
    (note,) = notes(bnqat.rewrite(source, tmp_path / "q", fuse=fuse))
    assert note == "nothing in the source updates the moving averages of norm_0, norm_1, so train does not either"


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_what_the_source_moves_at_times_is_named(fuse: bool, control_flow_v2: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", at_times, training="placeholder", control_flow_v2=control_flow_v2)
    (note,) = notes(bnqat.rewrite(source, tmp_path / "q", fuse=fuse))
    assert note == "train updates the moving averages of norm_0, norm_1 under a condition of the source's own"


@pytest.mark.parametrize("name", ["module", "module_train", "keras_save", "v1_two_fused", "v1_loop_updates"])
def test_nothing_is_said_where_all_move(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(model(name), tmp_path / "q", freeze_step=None if name.startswith("v1") else 5)
    assert notes(report) == []
    again, (step,) = Pipeline([CheckAverages()]).run(load(tmp_path / "q"))
    assert step.edits == ()
    assert again is step.before

"""Averages that a training function does not move: an error or a note names them; nothing is said if all move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.control_flow.branches import Branches
from passes.training.check_averages import CheckAverages
from passes.training.main_graph import MainGraphTraining
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.v1 import DECAY, EPSILON, by_hand, save_v1, v1, variables
from tests.test_v1 import session_of

NAMED = ("nothing in the source updates", "train updates")
ALL = ", ".join(f"norm_{layer}/moving_{statistic}" for layer in (0, 1) for statistic in ("mean", "variance"))


def notes(report: Any) -> list[str]:
    return [note for note in report.notes if note.startswith(NAMED)]


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
    y: tf.Tensor = v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
    return y


def never(x: tf.Tensor, training: Any) -> tf.Tensor:
    return normalised(x, training, lambda *_: None)


def at_times(x: tf.Tensor, training: Any) -> tf.Tensor:
    """A batch norm whose updates are behind a condition that is independent of the mode."""
    often = tf.reduce_sum(x) > -1e9

    def update(variable: Any, batch: Any) -> None:
        moved = v1.cond(often, lambda: v1.assign(variable, DECAY * variable + (1 - DECAY) * batch), lambda: variable)
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, moved)

    return normalised(x, training, update)


def test_an_update_that_is_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates stay with the statistics of single ops; the test disables the searches there and by variable."""
    source = save_v1(tmp_path / "m", by_hand, training="placeholder", control_flow_v2=True)
    assert notes(bnqat.rewrite(source, tmp_path / "q")) == []
    monkeypatch.setattr(Branches, "serves", lambda *_: False)
    monkeypatch.setattr("passes.batch_norm.sites.updates_beside", lambda *_: {})
    monkeypatch.setattr(MainGraphTraining, "_unlinked", lambda *_: [])
    with pytest.raises(bnqat.Error, match=r"train would leave norm_0/moving_mean as it is, which the source updates"):
        bnqat.rewrite(source, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def apart(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Compute moments twice: in the branch that normalises with them, and for the averages."""
    gamma, beta, *moving = variables(x.shape[-1])
    for variable, batch in zip(moving, tf.nn.moments(x, [0, 1, 2]), strict=True):
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign(variable, DECAY * variable + (1 - DECAY) * batch))
    mean, variance = v1.cond(
        training,
        lambda: tuple(tf.nn.moments(x, [0, 1, 2])),
        lambda: tuple(tf.identity(variable) for variable in moving),
    )
    y: tf.Tensor = v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
    return y


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_updates_with_moments_of_their_own_run_in_train(fuse: bool, control_flow_v2: bool, tmp_path: Path) -> None:
    """The updates equal the source's; the report says if they may stay float, as they do in single ops."""
    source = save_v1(tmp_path / "m", apart, training="placeholder", control_flow_v2=control_flow_v2)
    report = bnqat.rewrite(source, tmp_path / "q", fuse=fuse, bits=2)
    assert any(n.endswith("they stay float") for n in report.notes) is not fuse
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    fed = {"x:0": x, "is_training:0": True}
    with session_of(source) as (session, _):
        session.run(v1.get_collection(v1.GraphKeys.UPDATE_OPS), fed)
        expected = moving_of(session)
    with session_of(tmp_path / "q") as (session, meta):
        before = moving_of(session)
        session.run(meta.signature_def["train"].outputs["logits"].name, fed)
        averages = moving_of(session)
    assert all(np.any(new != old) for new, old in zip(averages, before, strict=True))
    if not fuse:  # of the first layer, before which nothing is quantised
        np.testing.assert_allclose(averages[0], expected[0], rtol=1e-5, atol=1e-6)


def moving_of(session: Any) -> list[np.ndarray]:
    """Return the moving averages of a session's graph, in the order of their names."""
    averages = {v.op.name: v for v in v1.global_variables() if v.op.name.startswith("norm_") and "moving" in v.op.name}
    values: list[np.ndarray] = session.run([averages[name] for name in sorted(averages)])
    return values


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_what_the_source_never_moves_is_named(fuse: bool, control_flow_v2: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", never, training="placeholder", control_flow_v2=control_flow_v2)
    (note,) = notes(bnqat.rewrite(source, tmp_path / "q", fuse=fuse))
    assert note == f"nothing in the source updates {ALL}, so train does not either"


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_what_the_source_moves_at_times_is_named(fuse: bool, control_flow_v2: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", at_times, training="placeholder", control_flow_v2=control_flow_v2)
    (note,) = notes(bnqat.rewrite(source, tmp_path / "q", fuse=fuse))
    assert note == f"train updates {ALL} under a condition of the source's own"


@pytest.mark.parametrize(
    "name", ["module", "module_train", "module_silu", "keras_save", "v1_two_fused", "v1_loop_updates"]
)
def test_nothing_is_said_where_all_move(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(model(name), tmp_path / "q", freeze_step=None if name.startswith("v1") else 5)
    assert notes(report) == []
    again, (step,) = Pipeline([CheckAverages()]).run(load(tmp_path / "q"))
    assert step.edits == ()
    assert again is step.before

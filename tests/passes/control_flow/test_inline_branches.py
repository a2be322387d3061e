from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from passes.control_flow.inline_branches import InlineBranches
from rewriter.ir import MAIN, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.v1 import Options, settings, v1, write
from tests.passes.control_flow.test_settle_choices import Chosen
from tests.passes.layered import computing, saved


def choosing(path: Path, *, constant: bool) -> Model:
    """Save a TensorFlow 1 graph with an ``If`` on a constant or on a placeholder."""
    with settings(Options(control_flow_v2=True)):
        x = v1.placeholder(tf.float32, [None], name="x")
        flag = tf.constant(value=True) if constant else v1.placeholder_with_default(True, [], name="flag")
        y = v1.cond(flag, lambda: x * 2.0, lambda: x + 1.0, name="chosen")
        write(path, {"x": x}, {"y": y})
    return load(path)


def test_the_branch_that_is_always_taken_takes_the_place_of_the_if(tmp_path: Path) -> None:
    before = choosing(tmp_path / "m", constant=True)
    assert computing(before.graphs[MAIN]) == ["x = Placeholder()", "chosen = StatelessIf(Const, x)"]
    after, _ = Pipeline([InlineBranches()]).run(before)
    assert computing(after.graphs[MAIN]) == ["x = Placeholder()", "chosen/mul_0 = Mul(x, chosen/mul/y)"]
    again, _ = Pipeline([InlineBranches()]).run(after)
    assert again is after


def test_an_if_on_what_is_fed_stays_and_so_do_functions(tmp_path: Path) -> None:
    for before in (
        choosing(tmp_path / "fed", constant=False),
        saved(tmp_path / "functions", Chosen(flag=True)),
    ):
        after, _ = Pipeline([InlineBranches()]).run(before)
        assert after is before

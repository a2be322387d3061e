from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.sites import sites
from passes.frontend.unfreeze_constants import UnfreezeConstants
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load

Paths = Callable[[str], Path]


@pytest.mark.parametrize("name", ["frozen", "frozen_v1"])
def test_constants_become_variables_with_their_values(name: str, model: Paths, tmp_path: Path) -> None:
    before = load(model(name))
    constants = {
        n.attrs["value"].tensor.tensor_content
        for g in before.graphs.values()
        for n in g.nodes.values()
        if n.op == "Const" and n.attrs["value"].tensor.tensor_content
    }
    report = bnqat.rewrite(model(name), tmp_path / "out", unfreeze_constants=True, start_step=2**40)
    assert report.sites_rewritten == 2
    weights = {"frozen": 2, "frozen_v1": 3}[name]
    assert len(report.variables_added) == 8 + weights + 11
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    all_variables = loaded.variables if name == "frozen_v1" else loaded.quantization.variables
    variables = {v.name: v for v in all_variables if "quantization" not in v.name}
    assert len(variables) == 8 + weights
    for variable in variables.values():
        assert variable.numpy().tobytes() in constants
        assert variable.trainable == ("moving" not in variable.name)


@pytest.mark.parametrize("name", ["frozen", "frozen_v1"])
def test_constant_weights_are_trained(name: str, model: Paths, tmp_path: Path) -> None:
    bnqat.rewrite(model(name), tmp_path / "out", unfreeze_constants=True, bits={"weight": 4})
    with_weights = [q.layer_name for q in bnqat.inspect(tmp_path / "out").quantizers if q.role == "weight"]
    assert len(with_weights) == {"frozen": 2, "frozen_v1": 3}[name]
    after = load(tmp_path / "out")
    names = {v.name for v in after.variables.values() if v.trainable}
    assert set(with_weights) <= names


def test_without_the_option_the_advice_is_given(model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="; --unfreeze-constants makes it a variable again"):
        bnqat.rewrite(model("frozen"), tmp_path / "out")


def test_variables_are_left_alone(model: Paths) -> None:
    before = load(model("module"))
    after, (step,) = Pipeline([UnfreezeConstants()]).run(before)
    assert after is before
    assert step.edits == ()


def test_a_constant_scale_of_ones_stays_one(model: Paths) -> None:
    before = load(model("form_v3_no_scale"))
    after, _ = Pipeline([UnfreezeConstants()]).run(before)
    assert after is before
    assert np.all(["gamma" not in s.binding.parameters for s in after.analysis(sites)])

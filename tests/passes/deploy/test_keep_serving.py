from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

import bnqat
from passes.deploy.keep_serving import KeepServing
from rewriter.ir import Error, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models import Net, save_module


def exposed(model: Model) -> list[str]:
    """Return the paths of all functions."""
    return sorted(path for entry in model.entries.values() for path in entry.paths)


def test_only_what_serves_is_kept(tmp_path: Path) -> None:
    bnqat.rewrite(save_module(Net(), tmp_path / "m"), tmp_path / "q")
    before = load(tmp_path / "q")
    assert exposed(before) == ["serve", "signatures.serving_default", "signatures.train", "train"]
    after, (step,) = Pipeline([KeepServing()]).run(before)
    assert exposed(after) == ["serve", "signatures.serving_default"]
    assert step.notes == ("the signature train trains, or changes its mode or variables, and is left out",)
    assert {n for n in before.graphs if "bnqat_train" in n}
    assert not {n for n in after.graphs if "bnqat_train" in n}
    again, (step,) = Pipeline([KeepServing()]).run(after)
    assert (again.graphs, again.variables) == (after.graphs, after.variables)
    assert step.notes == ()


def test_a_signature_is_made_where_there_is_none(tmp_path: Path) -> None:
    tf.saved_model.save(Net(), str(tmp_path / "m"), signatures={})
    after, (step,) = Pipeline([KeepServing()]).run(load(tmp_path / "m"))
    assert step.notes == ("the signature serving_default is made from the model's serve",)
    assert list(after.new_signatures) == ["serving_default"]
    assert after.new_signatures["serving_default"].inputs == ("x",)


def test_the_first_format_and_what_only_trains_are_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(Error, match="in TensorFlow 1's format"):
        Pipeline([KeepServing()]).run(load(model("v1_two_fused")))

    class Training(Net):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
        def serve(self, x: tf.Tensor) -> tf.Tensor:
            return self.call(x, training=True)

    with pytest.raises(Error, match="normalises with the moving statistics alone"):
        Pipeline([KeepServing()]).run(load(save_module(Training(), tmp_path / "m")))

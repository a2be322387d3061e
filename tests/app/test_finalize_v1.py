"""Tests of ``bnqat finalize`` on graphs of TensorFlow 1 whose mode is an input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.sites import sites
from passes.deploy.inline_decided_calls import InlineDecidedCalls
from rewriter.savedmodel.read import load
from tests import harness

Rewritten = Callable[..., Path]


def saved_for_serving(path: Path, target: Path) -> Path:
    """Save a loaded graph with a signature that calls its own with ``is_training=False``."""
    model = tf.saved_model.load(str(path))
    graph = model.signatures["serving_default"]

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
    def serve(x: tf.Tensor) -> Any:
        return graph(x=x, is_training=tf.constant(value=False))

    tf.saved_model.save(model, str(target), signatures={"serving_default": serve})
    return target


@pytest.mark.parametrize(
    ("name", "folded"), [("v1_by_hand_references", 0), ("v1_two_fused_if", 2)], ids=["single_ops", "kernels"]
)
def test_a_mode_that_a_caller_fixes_is_the_only_one_left(
    name: str, folded: int, rewritten: Rewritten, tmp_path: Path
) -> None:
    """The constant decides a choice in another graph. Without it, moving statistics would be stored twice."""
    tuned = saved_for_serving(rewritten(name, bits=5), tmp_path / "tuned")
    report = bnqat.finalize(tuned, tmp_path / "final", fold=True)
    assert len(report.baked) == 8
    assert not any(baked.added for baked in report.baked)
    assert len(report.folded) == folded
    assert not any("still holds ops that train" in note for note in report.notes)
    x = harness.images((None, 8, 8, 3))
    before, after = (
        tf.saved_model.load(str(path)).signatures["serving_default"](x=x)["logits"].numpy()
        for path in (tuned, tmp_path / "final")
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    final = load(tmp_path / "final")
    assert not any(site.training for site in final.analysis(sites))
    ops = {node.op for graph in final.graphs.values() for node in graph.nodes.values()}
    assert not ops & {"Switch", "Merge", "If", "StatelessIf"}
    assert not any(variable.name.startswith("quantiz") for variable in final.variables.values())


def test_a_note_says_if_ops_for_training_stay(
    rewritten: Rewritten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note is given if a call cannot be inlined: the constant and the choice stay in two graphs."""
    tuned = saved_for_serving(rewritten("v1_by_hand_references", bits=5), tmp_path / "tuned")
    monkeypatch.setattr(InlineDecidedCalls, "edits", lambda *_: [])
    report = bnqat.finalize(tuned, tmp_path / "final", dry_run=True)
    assert any("what serves still holds ops that train batch norms" in note for note in report.notes)


def test_what_a_graph_of_tensorflow_1_lacks_is_named(rewritten: Rewritten, tmp_path: Path) -> None:
    path = rewritten("v1_two_fused", bits=5)
    x = harness.images((None, 8, 8, 3), batch=64)
    with pytest.raises(bnqat.Error, match=r"run the inputs with: a graph of TensorFlow 1 has none"):
        bnqat.finalize(path, tmp_path / "final", inputs={"x": x.numpy()})
    model = tf.saved_model.load(str(path))
    with pytest.raises(bnqat.Error, match=r"is a graph of TensorFlow 1, which has no function train"):
        bnqat.reestimate_statistics(model, [x], 1)
    tf.saved_model.save(model, str(tmp_path / "nothing"))
    with pytest.raises(bnqat.NothingToRewriteError, match="holds no signature and no function that could serve"):
        bnqat.finalize(tmp_path / "nothing", tmp_path / "final")

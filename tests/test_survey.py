"""Every model of every maker, and every public one, through all columns of the survey."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bnqat
from rewriter.app.diff import Diff
from rewriter.app.verification.serving import Pair
from rewriter.savedmodel.read import load
from tests import harness
from tests.models import MODELS
from tests.models.all import ALL
from tests.models.forms import FORM_MODELS
from tests.models.structures import STRUCTURES
from tests.models.v1 import V1_MODELS
from tools.survey import NOT_APPLICABLE, YES, Row, models, same, survey

LOOPS = ("v1_loop", "v1_loop_by_hand", "v1_loop_updates")
"""TensorFlow 2 cannot differentiate a V1 while loop; tests/test_v1.py does so in sessions."""

NO_TRAIN = {"function_op": "which TensorFlow 1's format cannot differentiate"}
SKIPPED = {
    "mapped_batch_norm": "its function is used by an op other than a call, so the switch cannot be brought to it",
    "module_shared": "its moving mean is an input of its function, not a variable",
    "kupcimat+tello+1": "nothing calls its function, so it never runs",
}
GRADIENT = "is computed on the way, so nothing would be saved"
HELD = "the graph holds its gradient, which runs in both modes"
ALWAYS = "its batch's statistics are used whatever the mode is"
NOT_FUSED = {
    "form_float64": "it computes in float64, which the fused kernel does not have",
    "keras_two_axes": "has the shapes [1, 4, 1, 8]",
    **dict.fromkeys(("v1_by_hand", "v1_by_hand_references", "v1_by_hand_if"), GRADIENT),
    **dict.fromkeys(("v1_layers_plain", "v1_layers_plain_if"), GRADIENT),
}
"""What stays in single ops, by model, and how the reason ends."""
NOT_DIFFERENTIABLE = ("MaybeShewill-CV+CRNN_Tensorflow+1",)
"""Its outputs are those of a decoder, which has no gradient."""


def assert_passes(row: Row) -> None:
    assert not row.declined
    assert row.fused == (0 if row.model in NOT_FUSED else row.single)
    ends = (NOT_FUSED.get(row.model, HELD), ALWAYS)
    assert [r for r in row.not_fused if not r.endswith(ends)] == []
    assert set(row.skipped) == ({SKIPPED[row.model]} if row.model in SKIPPED else set())
    assert row.found == row.rewritten + sum(row.skipped.values()) > 0
    assert (row.loads, row.same) == (YES, YES)
    if row.model in NO_TRAIN:
        assert any(NO_TRAIN[row.model] in note for note in row.notes)
        assert (row.trains, row.moves, row.gradients) == (NOT_APPLICABLE,) * 3
        return
    assert (row.trains, row.moves) == (YES, YES)
    bare = row.model == "form_library_bare"  # it has no gamma and no beta
    applies = not (bare or row.model in (*LOOPS, *NOT_DIFFERENTIABLE))
    assert row.gradients == (YES if applies else NOT_APPLICABLE)


def assert_differs_by_nothing_else(row: Row, diff: Diff) -> None:
    verdict = diff.report.verdict
    assert diff.report.other == []
    assert diff.report.changes
    assert all(change.by for change in diff.report.changes)
    assert verdict.other_changes == 0
    assert (verdict.sites_found, verdict.sites_rewritten) == (row.found, row.rewritten)
    assert verdict.sites_added == row.added
    assert diff.report.skipped == row.skipped
    assert verdict.signatures_intact == verdict.signatures_found > 0


SMALL = [name for name in MODELS if not name.startswith("mobilenet")]


@pytest.mark.parametrize("name", [*SMALL, *V1_MODELS, *FORM_MODELS, *STRUCTURES])
def test_every_form_passes_every_column(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    source = model(name)
    before = harness.digest(source)
    row = survey(source, tmp_path / name, unfreeze_constants=name.startswith("frozen"))
    assert_passes(row)
    written = harness.digest(tmp_path / name)
    assert_differs_by_nothing_else(row, bnqat.diff(source, tmp_path / name, values=True))
    assert (harness.digest(source), harness.digest(tmp_path / name)) == (before, written)


@pytest.mark.corpus
def test_every_public_model_passes_every_column(corpus_model: Path, tmp_path: Path) -> None:
    before = harness.digest(corpus_model)
    row = survey(corpus_model, tmp_path / "out")
    assert_passes(row)
    written = harness.digest(tmp_path / "out")
    diff = bnqat.diff(corpus_model, tmp_path / "out", values=True)
    assert_differs_by_nothing_else(row, diff)
    assert len(diff.to_html()) < 5_000_000
    assert (harness.digest(corpus_model), harness.digest(tmp_path / "out")) == (before, written)


def test_a_column_that_fails_is_seen(model: Callable[[str], Path], tmp_path: Path) -> None:
    """A result whose weights are not the source's, and a model in which nothing can be rewritten."""
    source, other = model("form_library_image"), model("form_library_no_scale")
    _, verdict = same(Pair(source, other, load(source), load(other)))
    assert verdict.startswith("no: signature serving_default")
    assert "--unfreeze-constants" in survey(model("frozen"), tmp_path / "frozen").declined


def test_models_of_a_folder_are_found(model: Callable[[str], Path]) -> None:
    source = model("as_text")
    assert source in models(source.parent)
    assert {m.name for m in models(source.parent)} <= set(ALL)

"""`verify` of models whose weights are quantised: the claim on gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnqat
from passes.quantization.training_functions import TRAIN
from rewriter.app.verification.claims import FAILS, HOLDS, NOT_APPLICABLE, Claim
from rewriter.edit import Edit, Rewire
from rewriter.expr import Expr, Use, constant, op, stop_gradient
from rewriter.ir import Edge, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save
from tests.models.normalized import save_normalized
from tests.models.weights import WEIGHT_MODELS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_normalized(tmp_path_factory.mktemp("normalized") / "m")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    bnqat.rewrite(source, source.with_name("q"), bits={"weight": 4})
    return source.with_name("q")


def gradients(before: Path, after: Path) -> Claim:
    return next(c for c in bnqat.verify(before, after).claims if c.name == "gradients")


def test_weights_are_counted_beside_gammas_and_betas(source: Path, quantized: Path, tmp_path: Path) -> None:
    verification = bnqat.verify(source, quantized)
    assert verification.ok
    details = {claim.name: (claim.status, claim.detail) for claim in verification.claims}
    assert details["gradients"] == (HOLDS, "finite for 2 gammas and betas and 2 weights")
    assert details["off"][0] == details["on"][0] == HOLDS
    bnqat.rewrite(source, tmp_path / "w", bits={"weight": 4}, scheme={"batch_norm": "none"})
    assert gradients(source, tmp_path / "w").detail == "finite for 2 gammas and betas and 2 weights"


@dataclass(frozen=True)
class Cut:
    """Insert a node between the matrix and the op that takes it in training."""

    through: Callable[[Expr], Expr]

    def edits(self, model: Model) -> Iterable[Edit]:
        node = next(n for n in model.graphs[TRAIN].nodes.values() if n.op == "MatMul")
        yield Rewire(Edge(TRAIN, node.name, 1), self.through(Use("float32", node.inputs[1])), "test")


def infinite(value: Expr) -> Expr:
    """Make gradients NaN: a root's gradient is infinite at zero, and infinity times zero is NaN."""
    return value + op("Sqrt", op("Relu", -value - constant(1e3, "float32")) * value)


@pytest.mark.parametrize(
    ("through", "detail"),
    [(stop_gradient, "none"), (infinite, "not finite")],
)
def test_a_weight_that_no_gradient_reaches(
    through: Callable[[Expr], Expr], detail: str, source: Path, quantized: Path, tmp_path: Path
) -> None:
    save(Pipeline([Cut(through)]).run(load(quantized))[0], tmp_path / "b")
    claim = gradients(source, tmp_path / "b")
    assert (claim.status, claim.detail) == (FAILS, f"{detail} for matrix:0, which has a finite one in the source")


@pytest.mark.parametrize(
    ("name", "options", "status", "detail"),
    [
        ("weights_frozen", {}, NOT_APPLICABLE, "no output is a float, or no variable is trained"),
        ("weights_frozen", {"unfreeze_constants": True}, HOLDS, "finite for 3 weights"),
        ("keras3_lstm", {}, HOLDS, "finite for 3 weights and 2 other variables"),
    ],
)
def test_constants_and_other_variables(
    name: str, options: dict[str, Any], status: str, detail: str, tmp_path: Path
) -> None:
    path = WEIGHT_MODELS[name].make(tmp_path / "m")
    bnqat.rewrite(path, tmp_path / "q", bits={"weight": 4}, **options)
    claim = gradients(path, tmp_path / "q")
    assert (claim.status, claim.detail) == (status, detail)


def test_a_branch_that_is_not_taken(tmp_path: Path) -> None:
    """No gradient reaches its weight in the source either, which is no fault of the rewrite."""
    path = WEIGHT_MODELS["in_functions"].make(tmp_path / "m")
    bnqat.rewrite(path, tmp_path / "q", bits={"weight": 4})
    claim = gradients(path, tmp_path / "q")
    assert claim.status == HOLDS
    assert claim.detail in {
        f"finite for 3 weights; none reaches {name}, in the source either" for name in ("up", "down")
    }
    assert np.isfinite(bnqat.verify(path, tmp_path / "q").claims[2].table[0].rms)

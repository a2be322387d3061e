"""Hand-written batch norms that cover every pair of style choices, against the source's own run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from random import Random
from typing import Any

import numpy as np
import pytest

import bnqat
from tests.covering import Exclusion, assert_covering, completed, covering
from tests.handwritten import check as checks
from tests.handwritten.behaviour import difference
from tests.handwritten.check import WrongSourceError, check
from tests.handwritten.expected import expected
from tests.handwritten.reasons import REASONS
from tests.models.handwritten.form import EXCLUSIONS, OPTIONS, Form, pairwise, random_form

FORMS = list(pairwise())


def test_the_forms_cover_all_pairs() -> None:
    assert_covering([asdict(form) for form in FORMS], OPTIONS, EXCLUSIONS)
    assert len(FORMS) <= 35


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_every_pair_of_choices(form: Form) -> None:
    """Switched off, a form serves and trains as the source. Each batch norm is one kernel, or the report says why."""
    assert check(form).failures == [], form


def test_a_form_is_rebuilt_from_its_text() -> None:
    random = Random(3)  # noqa: S311  no secret
    for form in (Form(), *(random_form(random) for _ in range(50))):
        assert Form.parsed(repr(form)) == form


@pytest.mark.parametrize("listed", [*EXCLUSIONS, *REASONS], ids=lambda listed: listed.why)
def test_exclusions_and_reasons_are_of_values_that_exist(listed: Any) -> None:
    """A misspelled value would exclude or excuse nothing."""
    for name, values in listed.where.items():
        assert set(values) <= set(OPTIONS[name])
        assert set(values) != set(OPTIONS[name]) or name == "api"


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.why)
def test_reasons_are_of_forms_that_can_be(reason: Any) -> None:
    first = {name: next(iter(values)) for name, values in reason.where.items()}
    assert completed(first, OPTIONS, EXCLUSIONS, set()) is not None


def test_a_covering_finds_what_three_exclusions_leave() -> None:
    """Each value of c is excluded with a = 1 by another option's value, so the choice of b and d is taken back."""
    options: Mapping[str, tuple[Any, ...]] = {"a": (1, 2), "b": (1, 2), "c": (1, 2), "d": (1, 2)}
    exclusions = (
        Exclusion("", {"a": (1,), "b": (1,), "c": (1,)}),
        Exclusion("", {"a": (1,), "c": (2,), "d": (1,)}),
        Exclusion("", {"a": (1,), "b": (2,), "d": (2,)}),
    )
    cases = list(covering(options, exclusions))
    assert_covering(cases, options, exclusions)
    assert {"a": 1, "b": 1, "c": 2, "d": 2} in cases
    assert completed({"a": 1, "b": 1, "c": 1}, options, exclusions, set()) is None


BROKEN: Mapping[str, Form] = {
    "graph": Form(rank=2),
    "function": Form(api="function", control_flow=2, packing="cond", rank=2),
}


@pytest.mark.parametrize("form", BROKEN.values(), ids=BROKEN)
def test_the_check_sees_a_wrong_rewrite(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantisers that act at once change outputs, gradients and averages, of serving and of training."""
    monkeypatch.setattr(checks, "OFF", 0)
    failures = check(form, ["fused"]).failures
    for claim in ("serving", "outputs of train", "gradients of train", "averages of train"):
        assert any(failure.startswith(f"fused: {claim}: ") for failure in failures), (claim, failures)


def test_the_check_sees_kernels_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = bnqat.rewrite
    monkeypatch.setattr(bnqat, "rewrite", lambda *args, **options: rewrite(*args, **{**options, "fuse": False}))
    failures = check(Form(rank=2), ["fused"]).failures
    assert failures
    assert all(failure.startswith("fused: kernels: ") for failure in failures)


def test_the_check_sees_a_source_that_is_not_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "expected", lambda form: expected(replace(form, scale=not form.scale)))
    with pytest.raises(WrongSourceError, match=r"Form\(rank=2\): the source differs by"):
        check(Form(rank=2), [])


@pytest.mark.parametrize("wrong", [np.full(3, np.nan), np.ones(3) * (1 + 1e-3), np.ones(2)])
def test_differences_are_seen(wrong: np.ndarray) -> None:
    right = {"y": np.ones(3)}
    assert difference(right, right) == 0
    assert not difference({"y": wrong}, right) < 1e-5
    assert not difference({"z": np.ones(3)}, right) < 1e-5

"""Pairwise test of quantiser options in real graphs: every pair of two options' values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.covering import Exclusion, assert_covering, covering
from tests.ports import assert_equal, ports
from tests.reference import ema

Paths = Callable[..., Path]
EPSILON = 1e-3
LIMITS = [0.0, 0.9]
STATISTICS = ("moving_mean", "moving_variance")
OPTIONS: Mapping[str, list[Any]] = {
    "scheme": ["affine", "symmetric", "power_of_two", "log"],
    "range": ["dynamic", "ema", "learned", "fixed"],
    "role": ["gamma", "beta", *STATISTICS],
    "average": ["statistic", "none", "stored"],
    "rounding": ["nearest", "stochastic"],
    "narrow": [True, False],
}
X = harness.images((None, 8, 8, 3))


EXCLUSIONS = (
    Exclusion("log is for variances", {"scheme": ["log"], "role": ["gamma", "beta", "moving_mean"]}),
    Exclusion("no gradient reaches moving statistics", {"range": ["learned"], "role": STATISTICS}),
    Exclusion("a stored average needs a range", {"range": ["dynamic"], "role": STATISTICS, "average": ["stored"]}),
)
"""Options that do not go together, as the errors say."""

CASES = list(covering(OPTIONS, EXCLUSIONS))


def test_the_cases_cover_all_pairs() -> None:
    assert_covering(CASES, OPTIONS, EXCLUSIONS)
    assert len(CASES) < 40


Cases = list[dict[str, Any]]


def side_by_side(cases: Cases) -> Iterator[Cases]:
    """Yield cases of one average and of different roles, which one model can have together."""
    for average in OPTIONS["average"]:
        by_role = [[c for c in cases if (c["average"], c["role"]) == (average, role)] for role in OPTIONS["role"]]
        for row in itertools.zip_longest(*by_role):
            yield [case for case in row if case is not None]


def options_of(cases: Cases) -> dict[str, Any]:
    (average,) = {case["average"] for case in cases}
    defaults: dict[str, Any] = {r: {"range": "ema"} for r in STATISTICS if average == "stored"}
    for case in cases:
        range_ = LIMITS if case["range"] == "fixed" else case["range"]
        role_options = {"scheme": case["scheme"], "rounding": case["rounding"], "narrow_range": case["narrow"]}
        defaults[case["role"]] = {**role_options, "range": range_, "bits": 4}
    return {"config": {"defaults": defaults}, "quantize_average": average}


def assert_ports(all_ports: list[Any], case: Mapping[str, Any], training: bool) -> None:
    role_ports = [p for p in all_ports if p.tag["role"] == case["role"]]
    absent = training and case["role"] in STATISTICS and case["average"] == "none"
    assert len(role_ports) == (0 if absent else 2)
    assert all((p.noise is not None) is (training and case["rounding"] == "stochastic") for p in role_ports)
    assert all(p.tag["range"] == case["range"] and not np.array_equal(p.got, p.raw) for p in role_ports)


def states(variables: Mapping[str, Any], case: Mapping[str, Any]) -> list[Any]:
    """Return the variables of a case's range."""
    names = [f"quantization/{s}/{case['role']}" for s in ("range", "scale", "low")]
    state = [variables[name] for name in names if name in variables]
    lows = case["range"] == "learned" and case["scheme"] in ("affine", "log")
    assert len(state) == {"ema": 1, "learned": 2 if lows else 1}.get(case["range"], 0)
    return state


def assert_moved(state: list[Any], before: list[np.ndarray], case: Mapping[str, Any]) -> None:
    moved = [not np.array_equal(v, old) for v, old in zip(state, before, strict=True)]
    assert all(moved) if case["range"] == "ema" else not any(moved)


@pytest.mark.parametrize(
    "cases", list(side_by_side(CASES)), ids=lambda cases: "+".join("-".join(map(str, c.values())) for c in cases)
)
def test_every_pair_of_options(cases: Cases, model: Paths, tmp_path: Path) -> None:
    """Ports equal the reference, ema ranges move, gradients reach learned ranges, and saving keeps all."""
    report = bnqat.rewrite(model("module_train"), tmp_path / "out", **options_of(cases))
    assert report.skipped == []
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    names = {v.name.partition(":")[0]: v for v in loaded.quantization.variables}
    state = [states(names, case) for case in cases]
    for function in (loaded.serve, loaded.quantization.train):
        all_ports = ports(harness.concrete(function), [X])
        for port in all_ports:
            assert_equal(port, EPSILON)
        for case in cases:
            assert_ports(all_ports, case, training=function is loaded.quantization.train)
    for norm in loaded.norms:  # as an optimizer might
        for case in cases:
            getattr(norm, case["role"]).assign(1.5 * getattr(norm, case["role"]))
    before = [[v.numpy() for v in variables] for variables in state]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loaded.quantization.train(X) ** 2)
    variables = list(loaded.quantization.trainable_variables)
    gradients = dict(zip((v.name for v in variables), tape.gradient(loss, variables), strict=True))
    assert all(g is not None and np.isfinite(g).all() for g in gradients.values())
    assert all(np.any(g) for k, g in gradients.items() if not k.startswith("quantization/low"))
    for case, variables, old in zip(cases, state, before, strict=True):
        scale = f"quantization/scale/{case['role']}"
        assert (case["range"] == "learned") is any(k.startswith(scale) for k in gradients)
        assert_moved(variables, old, case)
    served = loaded.serve(X)
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    again = tf.saved_model.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(again.serve(X), served)


@pytest.mark.parametrize("scheme", ["affine", "power_of_two"])
def test_moving_averages_of_a_range_follow_what_is_quantised(scheme: str, model: Paths, tmp_path: Path) -> None:
    """Ranges of both layers and all roles follow from the checkpoint's limits on; serving changes none."""
    schemes = dict.fromkeys(("gamma", "beta", "moving_mean"), scheme)
    options: dict[str, Any] = {"scheme": schemes, "range": "ema", "range_momentum": 0.75}
    bnqat.rewrite(model("module_train"), tmp_path / "out", start_step=2, **options)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    ranges = {role: getattr(loaded.quantization.range, role) for role in OPTIONS["role"]}
    for role in ("gamma", "beta", "moving_mean"):
        values = [getattr(n, role).numpy() for n in loaded.norms]
        limits = [[min(v.min(), 0), max(v.max(), 0)] for v in values]
        np.testing.assert_array_equal(ranges[role], np.array(limits, np.float32))
    for _ in range(4):
        old: dict[str, np.ndarray] = {role: v.numpy() for role, v in ranges.items()}
        loaded.serve(X)
        assert all(np.array_equal(v, old[role]) for role, v in ranges.items())
        raw: dict[tuple[str, int], np.ndarray] = {
            (p.tag["role"], p.tag["layer"]): p.raw for p in ports(harness.concrete(loaded.quantization.train), [X])
        }
        for role, v in ranges.items():  # looking at the ports has run the function
            v.assign(old[role])
        loaded.quantization.train(X)
        for (role, layer), vector in raw.items():
            kind = "log" if role == "moving_variance" else scheme
            moved = ema(kind, vector, old[role][layer], 0.75, EPSILON)
            np.testing.assert_allclose(ranges[role][layer], moved, rtol=1e-6, atol=1e-7)


def test_a_learned_scale_learns(model: Paths, tmp_path: Path) -> None:
    """Gradient descent on scales that are three times too wide brings the output nearer to the float model's."""
    bnqat.rewrite(model("module_train"), tmp_path / "out", bits=2, range={"gamma": "learned", "beta": "learned"})
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    bits = loaded.quantization.bits
    widths = [getattr(bits, role) for role in OPTIONS["role"]]
    for width in widths:
        width.assign(0)
    target = loaded.quantization.train(X)
    for width in widths[:2]:
        width.assign(2)
    scales = [v for v in loaded.quantization.trainable_variables if v.name.startswith("quantization/")]
    assert len(scales) == 4
    for variable in scales:
        variable.assign(3 * variable)
    losses = []
    for _ in range(60):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((loaded.quantization.train(X) - target) ** 2)
        losses.append(float(loss))
        for variable, gradient in zip(scales, tape.gradient(loss, scales), strict=True):
            variable.assign_sub(0.5 * gradient)
    assert min(losses[-10:]) < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": {"gamma": "log"}}, "gamma: the scheme log is for moving_variance"),
        ({"range": {"moving_mean": "learned"}}, "moving_mean: no gradient reaches moving statistics"),
        ({"quantize_average": "stored"}, "moving_mean: a stored average needs a range"),
        ({"range": {"moving_variance": [-1, 0]}}, "variances are not negative"),
        ({"config": {"rules": [{"match": "nowhere", "bits": 4}]}}, "the rule 'nowhere' matches no layer"),
        ({"config": {"rules": [{"match": "", "scheme": "log"}]}}, "gamma: the scheme log"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str, model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match=match):
        bnqat.rewrite(model("module_train"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

"""TensorFlow 1's graphs with a mode placeholder: fusing alone, compared with the source in V1 sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnqat
from tests.models.handwritten.nets import assign
from tests.models.v1 import (
    Norm,
    by_hand,
    layers,
    save_v1,
    selected,
    two_fused,
    two_fused_selected,
    two_fused_waiting,
    updated_first,
    v1,
)
from tests.test_fused import FUSING, TOLERANCE, difference, executed
from tests.test_v1 import session_of

NORMS: dict[str, Norm] = {
    "by_hand": by_hand,
    "two_fused": two_fused,
    "selected": selected,
    "two_fused_selected": two_fused_selected,
    "updated_first": updated_first,
    "layers_plain": layers(fused=False),
}


GRADIENTS = range(1, 8)
CANCELLED = 2e-4
"""For gradients in training: logits average over the image, so what comes back is nearly the same everywhere, and
batch norm subtracts its mean. What is left is small against the terms that are rounded: against float64, the
gradient of norm_0/beta is off by 1.1e-5 in the source and by 7.1e-5 in the kernel."""


def seen(path: Path) -> dict[tuple[bool, bool], list[np.ndarray]]:
    """Logits, gradients of all trainable variables, and all variables after one run, by mode and with updates or not.

    The session's variables are those of the source again before each mode.
    """
    x_ = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3))
    results = {}
    with session_of(path) as (session, _):
        graph = session.graph
        x, mode, logits = (graph.get_tensor_by_name(f"{name}:0") for name in ("x", "is_training", "logits"))
        gradients = v1.gradients(v1.reduce_sum(logits**2), v1.trainable_variables())
        variables = v1.global_variables()
        before = session.run(variables)
        for training in (True, False):
            feed = {x: x_, mode: training}
            values = session.run([logits, *gradients], feed)
            results[training, False] = [*values, *session.run(variables)]
            for update_op in v1.get_collection(v1.GraphKeys.UPDATE_OPS):
                session.run(update_op, feed)  # apart, as a read and an update of one run come in any order
            results[training, True] = [*values, *session.run(variables)]
            assign(session, list(zip(variables, before, strict=True)))
    return results


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_each_mode_computes_and_updates_what_it_did(name: str, references: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", NORMS[name], training="placeholder", references=references)
    report = bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    assert (report.declined, report.sites_fused) == ([], 0 if "two_fused" in name else 2)
    expected, actual = seen(source), seen(tmp_path / "f")
    for (training, update), values in actual.items():
        right = expected[training, update]
        exact = [index for index in range(len(values)) if not (training and index in GRADIENTS)]
        assert difference([values[i] for i in exact], [right[i] for i in exact]) < TOLERANCE
        assert difference(values, right) < CANCELLED, (training, update)
    assert kernels(tmp_path / "f") == [[True, True], [False, False]]


def ran(path: Path, training: bool) -> list[np.ndarray]:
    """Logits, and all variables after each update has been run by itself."""
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    with session_of(path) as (session, _):
        fed = {"x:0": x, "is_training:0": training}
        logits = session.run("logits:0", fed)
        for each in v1.get_collection(v1.GraphKeys.UPDATE_OPS):
            session.run(each, fed)
        return [logits, *session.run(v1.global_variables())]


@pytest.mark.parametrize("name", NORMS)
def test_each_mode_computes_and_updates_what_it_did_where_conditionals_are_functions(name: str, tmp_path: Path) -> None:
    """Gradients are not compared, as a V1 session cannot differentiate an If that it loaded."""
    source = save_v1(tmp_path / "m", NORMS[name], training="placeholder", control_flow_v2=True)
    report = bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    assert (report.declined, report.sites_fused) == ([], 0 if "two_fused" in name else 2)
    for training in (True, False):
        assert difference(ran(tmp_path / "f", training), ran(source, training)) < TOLERANCE
    assert kernels(tmp_path / "f") == [[True, True], [False, False]]


@pytest.mark.parametrize("control_flow_v2", [False, True])
def test_updates_that_the_output_waits_for_need_no_kernel_in_inference(control_flow_v2: bool, tmp_path: Path) -> None:
    """Such updates move the averages in inference too, by the batch's statistics; the output then depends on a race."""
    source = save_v1(tmp_path / "m", two_fused_waiting, training="placeholder", control_flow_v2=control_flow_v2)
    bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    assert kernels(source)[1] == [False, False, True, True]
    assert kernels(tmp_path / "f") == [[True, True], [False, False]]
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    for training in (True, False):
        after = []
        for path in (source, tmp_path / "f"):
            with session_of(path) as (session, _):
                session.run("logits:0", {"x:0": x, "is_training:0": training})
                after.append(moving(session)[: None if training else 2])  # of the first layer, before which none races
        assert difference(after[1], after[0]) < TOLERANCE


@pytest.mark.parametrize("name", sorted(set(NORMS) - {"layers_plain", "updated_first"}))
def test_the_training_signature_makes_the_updates_of_a_collection(name: str, tmp_path: Path) -> None:
    """With conditionals as functions, averages equal those after the source's own updates."""
    source = save_v1(tmp_path / "m", NORMS[name], training="placeholder", control_flow_v2=True)
    bnqat.rewrite(source, tmp_path / "q", start_step=100)
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    with session_of(source) as (session, _):
        before = moving(session)
        feed = {"x:0": x, "is_training:0": True}
        session.run(["logits:0", *v1.get_collection(v1.GraphKeys.UPDATE_OPS)], feed)
        expected = moving(session)
    with session_of(tmp_path / "q") as (session, meta):
        session.run(meta.signature_def["train"].outputs["logits"].name, feed)
        actual = moving(session)
    assert difference(actual, expected) < TOLERANCE
    assert all(np.any(old != new) for old, new in zip(before, actual, strict=True))


def moving(session: Any) -> list[np.ndarray]:
    """The moving averages of a session's graph, in the order of their names."""
    by_name = {v.op.name: v for v in v1.global_variables() if "moving" in v.op.name and "quantization" not in v.op.name}
    values: list[np.ndarray] = session.run([by_name[name] for name in sorted(by_name)])
    return values


def kernels(path: Path) -> list[list[bool]]:
    """Return `is_training` of the fused kernels that run: in training, then in inference."""
    x = np.zeros((2, 8, 8, 3), "float32")
    return executed(path, *({"x": x, "is_training": training} for training in (True, False)))

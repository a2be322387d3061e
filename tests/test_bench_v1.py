"""The nets and steps of `tools.bench_v1`: each row trains, serves, and moves its averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tools import bench_v1

v1 = tf.compat.v1
SIZE, CHANNELS = (24, 24, 3), (16, 24)
"""Of the first two blocks of the net, smaller; the others repeat them."""
X = np.random.default_rng(0).normal(size=(2, *SIZE)).astype("float32")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tool make a small net."""
    monkeypatch.setattr(bench_v1, "SIZE", SIZE)
    monkeypatch.setattr(bench_v1, "CHANNELS", CHANNELS)
    monkeypatch.setattr(bench_v1, "STRIDES", bench_v1.STRIDES[: len(CHANNELS)])


def averages(path: Path, session: Any) -> list[np.ndarray]:
    with session.graph.as_default():
        by_name = {
            v.name: v for v in v1.global_variables() if "moving_" in v.name and not v.name.startswith("quantization/")
        }
    values: list[np.ndarray] = session.run([by_name[name] for name in sorted(by_name)])
    assert len(values) == 2 * (1 + 2 * len(CHANNELS)), path
    return values


@pytest.mark.parametrize(("norm", "references"), [("two conds", False), ("two kernels", True)])
def test_hand_written_norms_train_alike_before_and_after(norm: str, references: bool, tmp_path: Path) -> None:
    """In a V1 session, layers after quantised ones average statistics that 8 bits have changed."""
    rows = [norm, f"{norm}, rewritten"]
    paths = bench_v1.prepared(references, rows, tmp_path)
    moved = []
    for path in paths.values():
        runner = bench_v1.InSession(path, X)
        before = averages(path, runner.session)
        assert runner("training") > 0
        assert runner("inference") > 0
        moved.append([new - old for old, new in zip(before, averages(path, runner.session), strict=True)])
    for source, result in zip(*moved, strict=True):
        assert np.abs(source).min() > 0
        assert np.abs(source - result).max() <= 0.01 * np.abs(source).max()  # 0.0067: a level is 1/255 of the range


def test_what_plain_loading_can_train(tmp_path: Path) -> None:
    """Plain loading trains every rewritten model, but of the sources only the library's layer without conditionals."""
    rows = ["library", "two conds", "two conds, rewritten"]
    paths = bench_v1.prepared(False, rows, tmp_path)
    steps = {row: set(bench_v1.Loaded(path, X).steps) for row, path in paths.items()}
    assert steps == {rows[0]: {"training", "inference"}, rows[1]: {"inference"}, rows[2]: {"training", "inference"}}

"""The rows of `tools.bench_step` that quantise weights, on a short net."""

from __future__ import annotations

import importlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from rewriter.savedmodel.read import load
from tests.models import mobilenet_short
from tools import bench_nets

SIZE = (32, 32, 3)
ROWS = ("fused", "weights off", "weights on")
X = np.random.default_rng(0).normal(size=(2, *SIZE)).astype("float32")


@pytest.fixture
def bench_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the tool's module, which makes a short net; what it sets in the environment ends with the test."""
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    monkeypatch.setattr(bench_nets, "SIZE", SIZE)
    monkeypatch.setattr(bench_nets, "keras_application", lambda _: mobilenet_short())
    return importlib.import_module("tools.bench_step")


def test_rows_of_weights_quantise_weights_alone(bench_step: Any, tmp_path: Path) -> None:
    paths = bench_step.prepared("short", ROWS, tmp_path)
    runners: dict[str, Any] = {
        row: bench_step.Runner(path, bench_step.VARIANTS[row], tf.constant(X)) for row, path in paths.items()
    }
    bits = runners["weights on"].model.quantization.bits
    assert bits.weight.numpy() == 8
    assert not any(hasattr(bits, role) for role in ("gamma", "beta", "moving_mean", "moving_variance"))
    outputs = {row: np.array(runner.steps["inference"]()) for row, runner in runners.items()}
    assert np.array_equal(outputs["fused"], outputs["weights off"])
    assert 0 < np.abs(outputs["fused"] - outputs["weights on"]).max() < 0.05
    rows = bench_step.measured(runners, 0.01)["training"]["rows"]
    assert list(rows) == list(ROWS)
    assert rows["fused"]["median"] == 1


def test_command_line_knows_which_rows_need_a_package(
    bench_step: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_step, "find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["bench_step", "--only", "weights, TFMOT"])
    with pytest.raises(SystemExit):
        bench_step.main()
    assert "the row weights, TFMOT needs tensorflow_model_optimization: pip install" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("tensorflow_model_optimization"), reason="TFMOT is in the extra `bench` only")
def test_tfmot_quantises_every_kernel_and_no_activation(bench_step: Any, tmp_path: Path) -> None:
    path = bench_step.prepared("short", ["weights, TFMOT"], tmp_path)["weights, TFMOT"]
    convolutions = ("Conv2D", "DepthwiseConv2dNative")
    counted = 0
    for graph in load(path).graphs.values():
        ops = Counter(node.op for node in graph.nodes.values())
        if not ops["MatMul"]:
            continue
        counted += 1
        assert ops["FakeQuantWithMinMaxVarsPerChannel"] == sum(ops[op] for op in convolutions) == 9
        assert ops["FakeQuantWithMinMaxVars"] == ops["MatMul"] == 1
    assert counted == 2  # serving and training

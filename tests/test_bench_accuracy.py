"""`tools.bench_accuracy`: its measurements of quantised weights on a small net, and its table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """Return the tool's module; what it sets in the environment ends with these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_USE_LEGACY_KERAS", "1")
        yield importlib.import_module("tools.bench_accuracy")


@pytest.fixture(scope="module")
def start(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a trained net of two small convolutions."""

    def small(seed: int) -> Any:
        task = tool.digits(seed)
        return task._replace(channels=(4, 8), epochs=(3, 1))

    return next(tool.starts(small, 1, tmp_path_factory.mktemp("nets")))


def test_weights_are_quantised_and_tuned(tool: Any, start: Any) -> None:
    whole = tool.accuracy(partial(start.net, training=False), start.task)
    before, after = tool.WEIGHTS["mse"](start, 2)
    assert before < whole - 10
    assert after > before + 10


BESIDE_QKERAS = """
import json, sys
from pathlib import Path
from tools import bench_accuracy as tool

small = lambda seed: tool.digits(seed)._replace(channels=(4, 8), epochs=(3, 1))
start = next(tool.starts(small, 1, Path(sys.argv[1])))
print(json.dumps([tool.WEIGHTS[system](start, 3) for system in ("dynamic", "QKeras auto")]))
"""


@pytest.mark.skipif(not find_spec("qkeras"), reason="QKeras is in the extra `bench` only")
def test_dynamic_ranges_begin_as_qkeras_scales_of_the_greatest_weight(tmp_path: Path) -> None:
    """QKeras needs a process in which nothing has used Keras 3 as TensorFlow's Keras."""
    command = [sys.executable, "-c", BESIDE_QKERAS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (before, after), (peer_before, peer_after) = json.loads(result.stdout.splitlines()[-1])
    assert before == peer_before
    assert after > before
    assert peer_after > peer_before


def test_table_has_mean_and_deviation_over_seeds(
    tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = [tool.Start(None, seed, lambda _: None, tmp_path) for seed in (0, 1)]
    monkeypatch.setattr(tool, "starts", lambda *_: seeds)
    monkeypatch.setattr(tool, "accuracy", lambda *_: 90.0)
    monkeypatch.setattr(tool, "WEIGHTS", {"mse": lambda start, bits: (10.0 * bits, 80.0 + start.seed), "other": None})
    figures = tmp_path / "figures.json"
    arguments = "--weights --task digits --seeds 2 --bits 4 2 --system mse --json"
    monkeypatch.setattr("sys.argv", ["bench_accuracy", *arguments.split(), str(figures)])
    tool.main()
    assert "40.0 ± 0.0 -> 80.5 ± 0.7" in capsys.readouterr().out
    cells = {
        bits: {"after rewriting": [before, 0], "after fine-tuning": [80.5, 0.707]}
        for bits, before in (("4", 40), ("2", 20))
    }
    assert json.loads(figures.read_text()) == {"digits": {"float": [90, 0], "systems": {"mse": cells}}}


def test_unknown_column_is_refused_by_name(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_accuracy", "--weights", "--system", "affine"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "there is no system 'affine'; there are dynamic, mse, learned, QKeras auto" in capsys.readouterr().err

"""`inspect` of weights: their shapes, channels and expected errors, and what cannot be quantised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser

import bnqat
from rewriter.app.blocks import text_of
from rewriter.app.cli import main
from rewriter.app.report_schema import Inspection, WeightReport
from rewriter.app.show_inspection import ROWS, inspection_blocks
from tests import weight_reference
from tests.browsing import opened
from tests.models.normalized import Normalized, save_normalized
from tests.models.weights import WEIGHT_MODELS
from tests.mutate import with_value

WIDTHS = (8, 6, 4, 3, 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_normalized(tmp_path_factory.mktemp("normalized") / "m")


def test_errors_are_those_of_the_reference(source: Path) -> None:
    report, net = bnqat.inspect(source), Normalized()
    assert report.headline == "m, 1 batch norm: 1 float; 2 weights, 256 values"
    for weight, variable in zip(report.weights, (net.kernel, net.matrix), strict=True):
        value = variable.numpy()
        assert (weight.name, weight.shape, weight.axes) == (variable.name.removesuffix(":0"), [*value.shape], [-1])
        assert (weight.channels, weight.parameters) == (value.shape[-1], value.size)
        assert tuple(weight.expected_error) == WIDTHS
        for bits, error in weight.expected_error.items():
            quantized = weight_reference.quantize_weight("symmetric", value, bits, (-1,)).value
            assert error == pytest.approx(np.linalg.norm(quantized - value) / np.linalg.norm(value), rel=1e-5)


def test_a_table_json_and_a_page(source: Path, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    done = CliRunner().invoke(main, ["inspect", str(source), "--html", str(page)])
    assert done.exit_code == 0, done.output
    report = json.loads(CliRunner().invoke(main, ["inspect", str(source), "--json"]).stdout)
    (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["kernel"])
    errors = [f"{report['weights'][0]['expected_error'][str(bits)]:.2g}" for bits in WIDTHS]
    assert row == ["kernel", "Conv2D", "3x3x3x8", "8", "216", *errors]
    assert "2 weights, 256 values" in done.stdout.splitlines()
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    assert [name for name in (*report, *report["weights"][0]) if f"`{name}`" not in documented] == []
    with opened(browser, page) as tab:
        cells = tab.page.locator("table.weights tbody tr").first.locator("td").all_inner_texts()
        assert [cell.strip() for cell in cells] == row
        assert any(t.split("\n") == ["weights", "2", "256 values"] for t in tab.page.locator(".tile").all_inner_texts())


def test_weights_without_a_batch_norm_and_what_cannot_be_quantised(tmp_path: Path) -> None:
    report = bnqat.inspect(WEIGHT_MODELS["dynamic_filter"].make(tmp_path / "m"))
    assert report.headline == "m, no batch norm; 1 weight, 720 values"
    lines = str(report).splitlines()
    assert lines[1] == "no batch norm found"
    assert lines[-1] == "cannot be quantised, Conv2D: its filter is computed from what the model is given"
    assert [(g.reason, g.layers) for g in report.skipped_weights] == [
        ("its filter is computed from what the model is given", ["Conv2D"])
    ]


@pytest.mark.parametrize("name", ["embedding_tied", "weights_frozen", "in_functions", "v1_weights", "mixed_float16"])
def test_every_weight_is_listed_once(name: str, tmp_path: Path) -> None:
    model = WEIGHT_MODELS[name]
    weights = bnqat.inspect(model.make(tmp_path / "m")).weights
    expected = [([*w.shape], [*w.axes], int(np.prod([w.shape[axis] for axis in w.axes]))) for w in model.weights]
    assert sorted((w.shape, w.axes, w.channels) for w in weights) == sorted(expected)
    assert len({w.name for w in weights}) == len(weights)
    named = [w.name for w in model.weights if w.name]
    assert sorted(w.name for w in weights) == sorted(named) or not named
    assert all(0 < weight.expected_error[8] < weight.expected_error[2] < 1 for weight in weights)
    assert {op for weight in weights for op in weight.ops} >= {w.op for w in model.weights}


def test_quantised_weights_are_not_listed_as_float(source: Path, tmp_path: Path) -> None:
    bnqat.rewrite(source, tmp_path / "q", bits={"weight": 4})
    report = bnqat.inspect(tmp_path / "q")
    assert (report.weights, report.skipped_weights) == ([], [])
    assert [(q.role, q.layer_name) for q in report.quantizers] == [("weight", "kernel"), ("weight", "matrix")]


def test_numbers_that_are_none(source: Path, tmp_path: Path) -> None:
    key = "kernel/.ATTRIBUTES/VARIABLE_VALUE"
    last = np.arange(8) == 7
    whole = bnqat.inspect(with_value(source, tmp_path / "a", key, lambda v: np.where(last, 0, v))).weights[0]
    broken = bnqat.inspect(with_value(source, tmp_path / "b", key, lambda v: np.where(last, np.inf, v))).weights[0]
    assert (whole.not_finite, broken.not_finite) == (0, 27)
    assert broken.expected_error == pytest.approx(whole.expected_error)


def test_a_long_table_ends() -> None:
    weights = [WeightReport(f"w{i}", ["MatMul"], [2, 3], [-1], 3, 6, [], 0, {}) for i in range(ROWS + 12)]
    report = Inspection({}, [], "big", weights=weights)
    short, long = (text_of(inspection_blocks(report, sites=sites)) for sites in (False, True))
    assert f"w{ROWS - 1} " in short
    assert f"w{ROWS} " not in short
    assert short.splitlines()[-1] == f"{ROWS + 12} weights, {6 * ROWS + 72} values; 12 are not shown: -v lists all"
    assert f"w{ROWS + 11} " in long
    assert long.splitlines()[-1] == f"{ROWS + 12} weights, {6 * ROWS + 72} values"

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from playwright.sync_api import Browser

import bnqat
from rewriter.app.cli import main
from rewriter.app.report_schema import ValuesReport
from tests import reference
from tests.browsing import opened
from tests.models import Net, save_module
from tests.mutate import with_value

Paths = Callable[..., Path]


@pytest.mark.parametrize(
    "name", ["module", "keras_save", "v1_two_fused_references", "form_v2_half", "mobilenet_short_save"]
)
def test_what_is_in_the_variables_and_what_rounding_costs(name: str, model: Paths) -> None:
    reader = tf.train.load_checkpoint(str(model(name) / "variables" / "variables"))
    tensors = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    vectors = [
        np.asarray(v, np.float32) for v in tensors.values() if getattr(v, "ndim", 0) == 1 and v.dtype.kind == "f"
    ]
    vectors_checked = 0
    for bn in bnqat.inspect(model(name)).batch_norms:
        for role, report in bn.values.items():
            (vector,) = _matching(vectors, report)
            assert report.channels == vector.size
            counts, _ = np.histogram(vector.astype(np.float64), bins=len(report.histogram))
            assert report.histogram == list(counts)
            assert report.mean == pytest.approx(float(vector.astype(np.float64).mean()))
            assert (report.zeros, report.not_finite) == (int((vector == 0).sum()), 0)
            for bits, error in report.expected_error.items():
                scheme = "log" if role == "moving_variance" else "affine"
                q = reference.quantize(scheme, vector, bits, bn.epsilon).value.astype(np.float64)
                v = vector.astype(np.float64)
                if scheme == "log":
                    expected = np.sqrt(np.mean((np.sqrt((v + bn.epsilon) / (q + bn.epsilon)) - 1) ** 2))
                else:
                    expected = np.linalg.norm(q - v) / np.linalg.norm(v)
                assert error == pytest.approx(expected, rel=1e-5)
            vectors_checked += 1
    assert vectors_checked >= 4


def _matching(vectors: list[np.ndarray], report: ValuesReport) -> list[np.ndarray]:
    """Return a list of at most one vector: with the report's minimum, maximum and channel count."""
    ends = (report.least, report.greatest)
    return [v for v in vectors if (float(v.min()), float(v.max())) == ends and v.size == report.channels][:1]


def test_numbers_that_are_none(model: Paths, tmp_path: Path) -> None:
    key = "norms/0/gamma/.ATTRIBUTES/VARIABLE_VALUE"
    broken = with_value(model("module"), tmp_path / "broken", key, lambda v: np.where(np.arange(8) < 2, np.nan, 0 * v))
    report = bnqat.inspect(broken).batch_norms[0].values["gamma"]
    assert (report.least, report.greatest, report.zeros, report.not_finite) == (0.0, 0.0, 6, 2)
    assert sum(report.histogram) == 6
    assert set(report.expected_error.values()) == {0.0}
    whole = bnqat.inspect(model("module")).batch_norms[0]
    assert bnqat.inspect(broken).batch_norms[0].values["beta"] == whole.values["beta"]


def test_where_nothing_is_lost_the_error_is_printed_as_0(tmp_path: Path) -> None:
    net = Net()
    for gamma in (v for v in net.trainable_variables if "gamma" in v.name):
        gamma.assign(np.ones(gamma.shape, np.float32) / 3)  # rounding scales in float32 leaves a last bit
    save_module(net, tmp_path / "net")
    errors = bnqat.inspect(tmp_path / "net").batch_norms[0].values["gamma"].expected_error
    assert 0 < max(errors.values()) < 1e-6
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "net")])
    rows = [line.split() for line in done.stdout.partition("expected error")[2].splitlines()]
    assert {tuple(row[-5:]) for row in rows if row[1:2] == ["gamma"]} == {("0",) * 5}


def test_a_table_json_and_a_page(model: Paths, tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "inspect.html"
    done = CliRunner().invoke(main, ["inspect", str(model("keras_save")), "--html", str(page)])
    assert done.exit_code == 0, done.output
    below = done.stdout.partition("expected error")[2]
    rows = [line.split() for line in below.splitlines() if line.split()[1:2] == ["gamma"]]
    assert len(rows) == 2
    report = json.loads(CliRunner().invoke(main, ["inspect", str(model("keras_save")), "--json"]).stdout)
    gamma = report["batch_norms"][0]["values"]["gamma"]
    assert rows[0][2:5] == [str(gamma["channels"]), f"{gamma['least']:.4g}", f"{gamma['greatest']:.4g}"]
    assert rows[0][-5:] == [f"{gamma['expected_error'][n]:.2g}" for n in ("8", "6", "4", "3", "2")]
    with opened(browser, page) as tab:
        assert tab.requests == [page.as_uri()]
        assert tab.page.locator(".layer").count() == 2
        tiles = tab.page.locator(".tile").all_inner_texts()
        numbers = dict(tile.split("\n")[:2] for tile in tiles)
        assert numbers == {"batch norms": "2", "float": "2", "weights": str(len(report["weights"])), "sites": "10"}
        assert tiles[-1].endswith("can use a batch's statistics")
        cells = tab.page.locator(".layer").first.locator("tbody tr").first.locator("td").all_inner_texts()
        assert cells[:2] == ["gamma", report["batch_norms"][0]["variables"]["gamma"]]
        assert [c.strip() for c in cells[6:]] == [
            f"{gamma['expected_error'][n]:.2g}" for n in ("8", "6", "4", "3", "2")
        ]
        bars = tab.page.locator("svg.histogram").first.locator("rect")
        assert bars.count() == sum(1 for count in gamma["histogram"] if count)
        places = bars.evaluate_all("all => all.map(r => Number(r.getAttribute('x')) / 8)")
        assert places == [i for i, count in enumerate(gamma["histogram"]) if count]
    notebook = bnqat.inspect(model("keras_save"))._repr_html_()
    assert notebook.startswith("<iframe srcdoc=")


def test_names_on_the_page_are_text(tmp_path: Path, browser: Browser) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\">"
    net = Net()
    save_module(net, tmp_path / "net")
    tf.saved_model.save(net, str(tmp_path / "net2"), signatures={hostile: net.serve})
    page = tmp_path / "inspect.html"
    page.write_text(bnqat.inspect(tmp_path / "net2").to_html(), encoding="utf-8")
    with opened(browser, page) as tab:
        assert tab.page.locator("img").count() == 0
        assert hostile in tab.page.locator("main").inner_text()
        assert tab.page.title() == "net2: batch norms and weights"


def test_a_page_cannot_be_written_into_the_model(model: Paths) -> None:
    done = CliRunner().invoke(main, ["inspect", str(model("module")), "--html", str(model("module") / "page.html")])
    assert done.exit_code == 2
    assert "would lie in the model" in done.stderr

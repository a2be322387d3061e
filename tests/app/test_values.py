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
from rewriter.report import ValuesReport
from tests import reference
from tests.browsing import opened
from tests.models import Net, save_module
from tests.mutate import with_value

Paths = Callable[..., Path]


@pytest.mark.parametrize("name", ["module", "keras_save", "v1_two_fused_references", "form_v2_half", "resnet_save"])
def test_what_is_in_the_variables_and_what_rounding_costs(name: str, model: Paths) -> None:
    reader = tf.train.load_checkpoint(str(model(name) / "variables" / "variables"))
    held = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    vectors = [np.asarray(v, np.float32) for v in held.values() if getattr(v, "ndim", 0) == 1 and v.dtype.kind == "f"]
    seen = 0
    for bn in bnqat.inspect(model(name)).batch_norms:
        for role, found in bn.values.items():
            (vector,) = _alike(vectors, found)
            assert found.channels == vector.size
            counts, _ = np.histogram(vector.astype(np.float64), bins=len(found.histogram))
            assert found.histogram == list(counts)
            assert found.mean == pytest.approx(float(vector.astype(np.float64).mean()))
            assert (found.zeros, found.not_finite) == (int((vector == 0).sum()), 0)
            for bits, error in found.expected_error.items():
                scheme = "log" if role == "moving_variance" else "affine"
                q = reference.quantize(scheme, vector, bits, bn.epsilon).value.astype(np.float64)
                v = vector.astype(np.float64)
                if scheme == "log":
                    expected = np.sqrt(np.mean((np.sqrt((v + bn.epsilon) / (q + bn.epsilon)) - 1) ** 2))
                else:
                    expected = np.linalg.norm(q - v) / np.linalg.norm(v)
                assert error == pytest.approx(expected, rel=1e-5)
            seen += 1
    assert seen >= 4


def _alike(vectors: list[np.ndarray], found: ValuesReport) -> list[np.ndarray]:
    """The vector with these ends."""
    ends = (found.least, found.greatest)
    return [v for v in vectors if (float(v.min()), float(v.max())) == ends and v.size == found.channels][:1]


def test_numbers_that_are_none(model: Paths, tmp_path: Path) -> None:
    key = "norms/0/gamma/.ATTRIBUTES/VARIABLE_VALUE"
    broken = with_value(model("module"), tmp_path / "broken", key, lambda v: np.where(np.arange(8) < 2, np.nan, 0 * v))
    found = bnqat.inspect(broken).batch_norms[0].values["gamma"]
    assert (found.least, found.greatest, found.zeros, found.not_finite) == (0.0, 0.0, 6, 2)
    assert sum(found.histogram) == 6
    assert set(found.expected_error.values()) == {0.0}
    whole = bnqat.inspect(model("module")).batch_norms[0]
    assert bnqat.inspect(broken).batch_norms[0].values["beta"] == whole.values["beta"]


def test_a_table_json_and_a_page(model: Paths, tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "inspect.html"
    done = CliRunner().invoke(main, ["inspect", str(model("keras_save")), "--html", str(page)])
    assert done.exit_code == 0, done.output
    below = done.stdout.partition("expected error")[2]
    rows = [line.split() for line in below.splitlines() if line.split()[1:2] == ["gamma"]]
    assert len(rows) == 2
    report = json.loads(CliRunner().invoke(main, ["inspect", str(model("keras_save")), "--json"]).stdout)
    held = report["batch_norms"][0]["values"]["gamma"]
    assert rows[0][2:5] == [str(held["channels"]), f"{held['least']:.4g}", f"{held['greatest']:.4g}"]
    assert rows[0][-5:] == [f"{held['expected_error'][n]:.2g}" for n in ("8", "6", "4", "3", "2")]
    with opened(browser, page) as seen:
        assert seen.requests == [page.as_uri()]
        assert seen.page.locator(".layer").count() == 2
        cells = seen.page.locator(".layer").first.locator("tbody tr").first.locator("td").all_inner_texts()
        assert cells[:2] == ["gamma", report["batch_norms"][0]["variables"]["gamma"]]
        assert [c.strip() for c in cells[6:]] == [f"{held['expected_error'][n]:.2g}" for n in ("8", "6", "4", "3", "2")]
        bars = seen.page.locator("svg.histogram").first.locator("rect")
        assert bars.count() == sum(1 for count in held["histogram"] if count)
        places = bars.evaluate_all("all => all.map(r => Number(r.getAttribute('x')) / 8)")
        assert places == [i for i, count in enumerate(held["histogram"]) if count]
    notebook = bnqat.inspect(model("keras_save"))._repr_html_()
    assert notebook.startswith("<iframe srcdoc=")


def test_names_on_the_page_are_text(tmp_path: Path, browser: Browser) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\">"
    net = Net()
    save_module(net, tmp_path / "net")
    tf.saved_model.save(net, str(tmp_path / "net2"), signatures={hostile: net.serve})
    page = tmp_path / "inspect.html"
    page.write_text(bnqat.inspect(tmp_path / "net2").to_html(), encoding="utf-8")
    with opened(browser, page) as seen:
        assert seen.page.locator("img").count() == 0
        assert hostile in seen.page.locator("main").inner_text()
        assert seen.page.title() == "net2: batch norms"


def test_a_page_cannot_be_written_into_the_model(model: Paths) -> None:
    done = CliRunner().invoke(main, ["inspect", str(model("module")), "--html", str(model("module") / "page.html")])
    assert done.exit_code == 2
    assert "would lie in the model" in done.stderr

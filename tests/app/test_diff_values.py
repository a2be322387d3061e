"""Weights in a comparison: the first sentence, the layers, pictures, and what was left float."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from playwright.sync_api import Browser

import bnqat
from rewriter.app.diff import Diff
from rewriter.diff.report import LayerDiff
from tests.browsing import opened
from tests.models.normalized import save_normalized
from tests.models.weights import WEIGHT_MODELS

ON = "the quantisers are on, so outputs differ."
FLOAT_NORMS = {"batch_norm": "none"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_normalized(tmp_path_factory.mktemp("normalized") / "m")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """The model with 4-bit weights and 6-bit batch norms."""
    bits = {"weight": 4, "gamma": 6, "beta": 6, "moving_mean": 6, "moving_variance": 6}
    bnqat.rewrite(source, source.with_name("q"), bits=bits)
    return source.with_name("q")


def weights(diff: Diff) -> dict[str, LayerDiff]:
    return {layer.name: layer for layer in diff.report.layers if layer.kind == "weight"}


def compared(name: str, folder: Path, **options: Any) -> Diff:
    """Compare a model with its rewrite to 4-bit weights."""
    source = WEIGHT_MODELS[name].make(folder / name)
    bnqat.rewrite(source, folder / "q", bits={"weight": 4}, scheme=FLOAT_NORMS, **options)
    return bnqat.diff(source, folder / "q")


def test_weights_beside_a_batch_norm(source: Path, quantized: Path) -> None:
    diff = bnqat.diff(source, quantized)
    assert diff.headline == f"1 batch norm was quantised to 6 bits; 2 weights were quantised to 4 bits; {ON}"
    assert diff.report.verdict.batch_norms_quantized == 1
    assert diff.report.verdict.sites_skipped == 0
    assert {name: (layer.status, layer.bits) for name, layer in weights(diff).items()} == {
        "kernel": ("quantised", [4]),
        "matrix": ("quantised", [4]),
    }
    for name, op, port in (("kernel", "Conv2D", "filter"), ("matrix", "MatMul", "b")):
        serving, training = weights(diff)[name].sites
        assert (serving.kind, serving.what, serving.mode, serving.status) == (op, "same", "inference", "quantised")
        assert (training.kind, training.what, training.mode, training.users) == (op, "added", "training", ["train"])
        (entering,) = serving.inputs
        assert (entering.role, entering.port, entering.variable) == ("weight", port, name)
        assert entering.formula == "symmetric, 4 bits: round(v/s)·s, per channel (axis -1)"
        assert entering.old == entering.quantized
        assert entering.new not in ("", entering.old)
    lines = str(diff).splitlines()
    assert "  1 weight: quantised, 4-bit" in lines
    formula = "symmetric, 4 bits: round(v/s)·s, per channel (axis -1)"
    assert f"    weight ─ {formula} ─▶ filter of Conv2D" in lines
    assert f"    weight ─ {formula} ─▶ b of MatMul" in lines


def test_weights_alone_finalised_and_the_other_way_round(source: Path, quantized: Path, tmp_path: Path) -> None:
    bnqat.rewrite(source, tmp_path / "w", bits={"weight": 3}, scheme=FLOAT_NORMS, start_step=1000)
    diff = bnqat.diff(source, tmp_path / "w")
    assert diff.headline == "2 weights were quantised to 3 bits; outputs are unchanged until step 1,000 of training."
    assert bnqat.diff(tmp_path / "w", source).headline == "2 weights are no longer quantised."
    bnqat.finalize(quantized, tmp_path / "final")
    headline = "1 batch norm and 2 weights hold their 4- and 6-bit values for good: the model is finalised."
    for before in (source, quantized):
        diff = bnqat.diff(before, tmp_path / "final")
        assert diff.headline == headline
        assert {layer.status for layer in diff.report.layers} == {"finalised"}
        diff.to_html()
    released = bnqat.diff(quantized, source)
    assert released.headline == "1 batch norm and 2 weights are no longer quantised."
    kernel = weights(released)["kernel"]
    assert [(site.what, site.status) for site in kernel.sites] == [("same", "float"), ("removed", "quantised")]
    assert [[bool(i.new) for i in site.inputs] for site in kernel.sites] == [[True], [False]]
    released.to_html()


def test_a_second_rewrite_leaves_weights_as_before(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": {"weight": 4}, "scheme": FLOAT_NORMS, "fuse": False}
    bnqat.rewrite(source, tmp_path / "q", **options)
    with pytest.raises(bnqat.NothingToRewriteError):
        bnqat.rewrite(tmp_path / "q", tmp_path / "qq", **options)
    same = bnqat.diff(tmp_path / "q", tmp_path / "q")
    assert same.headline == "The two models are the same."
    assert {layer.status for layer in weights(same).values()} == {"as before"}


def test_channels_along_other_axes_and_rows_that_are_looked_up(tmp_path: Path) -> None:
    diff = compared("embedding_tied", tmp_path)
    assert diff.headline == f"2 weights were quantised to 4 bits; {ON}"
    table = weights(diff)["table"]
    assert [site.kind for site in table.sites] == ["ResourceGather", "MatMul"] * 2
    formulas = [entering.formula.partition(": ")[2] for site in table.sites[:2] for entering in site.inputs]
    assert formulas == [f"round(v/s)·s, per channel ({axes})" for axes in ("axes -3, -2", "axis -2")]


def test_weights_that_share_a_function_are_counted_one_by_one(tmp_path: Path) -> None:
    diff = compared("in_functions", tmp_path)
    assert list(weights(diff)) == ["first+second+up+down"]
    assert diff.headline == f"4 weights were quantised to 4 bits; {ON}"
    assert "  4 weights: quantised, 4-bit" in str(diff).splitlines()


def test_in_sessions_one_op_serves_and_trains(tmp_path: Path) -> None:
    for layer in weights(compared("v1_weights", tmp_path)).values():
        (place,) = layer.sites
        assert (place.mode, place.users) == ("both", ["serving_default", "train"])


def test_what_was_left_float_has_its_reason(tmp_path: Path) -> None:
    diff = compared("dynamic_filter", tmp_path)
    reason = "its filter is computed from what the model is given"
    assert diff.report.skipped == {reason: 2}
    assert diff.report.verdict.sites_skipped == 0
    left = weights(diff)["Conv2D"]
    assert (left.status, [(s.kind, s.status, s.reason) for s in left.sites]) == (
        "skipped",
        [("Conv2D", "skipped", reason)] * 2,
    )
    assert f"not quantised in 2 places: {reason}" in str(diff).splitlines()


def test_the_report_of_the_rewrite_has_axes_and_names_what_is_left(tmp_path: Path) -> None:
    source = WEIGHT_MODELS["dynamic_filter"].make(tmp_path / "m")
    report = bnqat.rewrite(source, tmp_path / "q", bits={"weight": 4})
    assert [(q.layer_name, q.axis, q.granularity) for q in report.quantizers] == [("hyper", -1, "per_channel")]
    (left,) = report.skipped_layers
    assert (left.reason, left.layers, left.ops, left.others) == (
        "its filter is computed from what the model is given",
        [],
        ["Conv2D"],
        2,
    )
    assert f"left in float, Conv2D: {left.reason}" in str(report).splitlines()
    whole = bnqat.rewrite(source, tmp_path / "w", bits={"weight": 4}, granularity={"weight": "per_tensor"})
    assert [(q.axis, q.granularity) for q in whole.quantizers] == [(None, "per_tensor")]
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in (*asdict(whole.quantizers[0]), *asdict(left)))


def test_sensitivity_has_batch_norms_first(quantized: Path) -> None:
    inputs = {"x": np.random.default_rng(0).normal(0, 1, (4, 6, 6, 3)).astype(np.float32)}
    rows = bnqat.sensitivity(quantized, inputs, bits=[8, 2]).rows
    assert [(row.name, row.role) for row in rows[-2:]] == [("kernel", "weight"), ("matrix", "weight")]
    assert {row.role for row in rows[:-2]} == {"gamma", "beta", "moving_mean", "moving_variance"}
    assert all(row.error[2] > row.error[8] > 0 for row in rows[-2:])


def test_a_picture_of_a_weight(source: Path, quantized: Path) -> None:
    diff = bnqat.diff(source, quantized)
    graph, node = diff.site("matrix")
    assert (graph, node) == diff.site(f"{graph}:{node}") == diff.site(node)
    text = "\n".join(e.text or "" for e in ET.fromstring(diff.to_svg(graph, node)).iter())  # noqa: S314  our own
    assert "weight ─ symmetric, 4 bits" in text
    assert "round(v/s)·s, per channel (axis -1)" in text


def test_the_page_lists_and_draws_weights(source: Path, quantized: Path, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    page.write_text(bnqat.diff(source, quantized).to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        assert shown.page.locator("#list h2").all_text_contents()[:2] == ["batch norms", "weights"]
        button = shown.page.locator('[data-layer="kernel"]')
        assert button.locator(".chip").all_text_contents() == ["4-bit"]
        button.click()
        assert shown.stop()["name"] == "Conv2D"
        assert shown.page.locator("#panel h3").first.text_content() == "kernel: quantised, taken by Conv2D"
        formula = "symmetric, 4 bits: round(v/s)·s, per channel (axis -1)"
        assert shown.page.locator("td.formula").all_text_contents() == [formula]
        drawn = shown.page.locator('.pane[data-side="after"] [data-formula]')
        assert [label.get_attribute("data-formula") for label in drawn.all()] == [f"weight ─ {formula}"]


def test_the_page_says_which_weights_are_left(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    page.write_text(compared("dynamic_filter", tmp_path).to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        fact = "!1 weight not quantisedits filter is computed from what the model is given"
        assert shown.page.locator("#skipped").all_text_contents() == [fact]

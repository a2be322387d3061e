"""Every report in its three forms: `repr()`, `str()`, and HTML for a notebook's cell."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser

import bnqat
from rewriter.app.blocks import Report
from rewriter.app.cli import main
from rewriter.app.finalize_schema import FinalizeReport
from rewriter.app.report_schema import Inspection, RewriteReport, SkippedLayers
from rewriter.app.sensitivity import Sensitivity, SensitivityRow
from rewriter.app.verification.claims import FAILS, HOLDS, Claim, Verification
from tests.browsing import opened

Paths = Callable[..., Path]
Reports = Mapping[str, tuple[Report, str]]
X = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)
HOSTILE = '<img src=x onerror="document.title=1">\x1b[1m\n</table>'


def printed(*arguments: object) -> str:
    """The command's stdout, without the blanks at the ends of a table's lines."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def reports(model: Paths, rewritten: Paths, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """One report of each kind, with what its command prints."""
    folder = tmp_path_factory.mktemp("reports")
    source, result = model("module"), rewritten("module", bits=4)
    np.savez(folder / "x.npz", x=X)
    rewrite, final = [source, folder / "q"], [result, folder / "f"]
    return {
        "RewriteReport": (bnqat.rewrite(*rewrite), printed("rewrite", *rewrite, "--overwrite")),
        "FinalizeReport": (bnqat.finalize(*final, fold=True), printed("finalize", *final, "--fold", "--overwrite")),
        "Inspection": (bnqat.inspect(result), printed("inspect", result)),
        "Diff": (bnqat.diff(source, result), printed("diff", source, result)),
        "Verification": (
            bnqat.verify(source, result, inputs={"x": X}),
            printed("verify", source, result, "--inputs", folder / "x.npz"),
        ),
        "Sensitivity": (
            bnqat.sensitivity(result, {"x": X}, bits=(8, 2)),
            printed("sensitivity", result, "--inputs", folder / "x.npz", "--bits", "8,2"),
        ),
    }


REPRS = {
    "RewriteReport": "<RewriteReport: 2 of 2 batch norms quantised, 8 bits>",
    "FinalizeReport": "<FinalizeReport: 8 variables quantised for good, 2 batch norms folded>",
    "Diff": "<Diff: 2 batch norms were quantised to 4 bits; the quantisers are on, so outputs differ.>",
    "Inspection": r"<Inspection: .+, 2 batch norms: 2 quantised; 2 weights, 1,368 values>",
    "Verification": "<Verification: 8 claims, 7 hold, 1 does not apply>",
    "Sensitivity": "<Sensitivity: 8 quantisers at 8, 2 bits, 4 inputs>",
}


@pytest.mark.parametrize("name", REPRS)
def test_three_forms(name: str, reports: Reports) -> None:
    report, stdout = reports[name]
    assert re.fullmatch(REPRS[name], repr(report))
    assert str(report) == stdout
    notebook = report._repr_html_()
    if name in ("Inspection", "Diff"):
        assert notebook.startswith("<iframe srcdoc=")
    else:
        assert notebook.count("<table>") == 1
        assert "style" not in notebook
        rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", notebook)]
        assert len(rows) > 1
        lines = re.findall(r"<div>([^<>\n]+)</div>", notebook)
        assert all(html.unescape(line) in stdout.splitlines() for line in lines)


def test_text_in_a_notebook_and_where_colours_are_forced(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for report, stdout in reports.values():
        assert str(report) == stdout


def test_a_rewrites_table_has_a_row_for_each_layer(reports: Reports) -> None:
    notebook = reports["RewriteReport"][0]._repr_html_()
    assert re.findall("<tr><td>(.*?)</td><td>(.*?)</td>", notebook) == [
        ("batch_norm", "rewritten"),
        ("batch_norm_1", "rewritten"),
    ]


def test_claims_that_fail_are_named() -> None:
    claims = [Claim("off", FAILS, ""), Claim("on", HOLDS, ""), Claim("training", FAILS, "")]
    assert repr(Verification(claims, "")) == "<Verification: 3 claims, 2 fail, 1 holds; failed: off, training>"


def hostile_reports(reports: Reports) -> list[Report]:
    rewrite, final, inspection = (reports[name][0] for name in ("RewriteReport", "FinalizeReport", "Inspection"))
    assert isinstance(rewrite, RewriteReport)
    assert isinstance(final, FinalizeReport)
    assert isinstance(inspection, Inspection)
    baked = replace(final.baked[0], variable=HOSTILE)
    layer = replace(rewrite.layers[0], name=HOSTILE, status="skipped", reasons=[HOSTILE])
    return [
        replace(rewrite, layers=[layer], skipped_layers=[SkippedLayers(HOSTILE, [HOSTILE])], notes=[HOSTILE]),
        replace(final, baked=[baked], folded_layers=[HOSTILE], signatures=[HOSTILE]),
        replace(inspection, batch_norms=[replace(inspection.batch_norms[0], name=HOSTILE)], title=HOSTILE),
        Verification([Claim(HOSTILE, FAILS, HOSTILE)], HOSTILE, notes=[HOSTILE]),
        Sensitivity([SensitivityRow(0, HOSTILE, HOSTILE, {8: 0.5})], 1),
    ]


def test_names_are_plain_text(reports: Reports, tmp_path: Path, browser: Browser) -> None:
    for number, report in enumerate(hostile_reports(reports)):
        assert "\x1b" not in repr(report) + str(report)
        assert len(repr(report).splitlines()) == 1
        notebook = report._repr_html_()
        assert isinstance(report, Inspection) or "\x1b" not in notebook  # it shows a page, which no terminal reads
        assert "<img" not in notebook
        page = tmp_path / f"{number}.html"
        page.write_text(f"<!doctype html><title>cell</title>{notebook}", encoding="utf-8")
        with opened(browser, page) as tab:
            assert tab.page.locator("img").count() == 0
            assert tab.page.title() == "cell"


def test_tensorflow_is_not_needed() -> None:
    code = """
import sys
from rewriter.app.finalize_schema import FinalizeReport
from rewriter.app.report_schema import Inspection, RewriteReport
reports = [
    Inspection({}, [], "model"),
    RewriteReport(0, 0, 0, 0, [], [], [], [], [], [], {}, {}),
    FinalizeReport([], [], [], [], [], 0, 0, [], [], {}),
]
for report in reports:
    assert repr(report) and str(report) and report._repr_html_()
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["RewriteReport", "FinalizeReport", "Inspection"])
def test_every_field_is_documented(name: str, reports: Reports) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    fields = reports[name][0].to_dict()
    groups = [field for group in fields.values() if isinstance(group, list) for field in group]
    names = {*fields, *(key for entry in groups if isinstance(entry, dict) for key in entry)}
    assert "schema_version" in names
    assert [field for field in sorted(names) if f"`{field}`" not in documented] == []

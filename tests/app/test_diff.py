from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import tensorflow as tf
from click.testing import CliRunner, Result

import bnqat
from rewriter.app.cli import main
from rewriter.app.headline import headline
from rewriter.diff.report import LayerDiff, Verdict
from rewriter.ir import Model
from tests import harness
from tests.models import save_module
from tests.mutate import function_with, mutated, nodes_of, rename_functions, with_record, with_value

Paths = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def test_any_two_models_with_no_batch_norm(tmp_path: Path) -> None:
    class Plain(tf.Module):
        def __init__(self, trainable: bool, more: bool) -> None:
            super().__init__()
            self.w = tf.Variable([1.0, 2.0], trainable=trainable, name="w")
            if more:
                self.b = tf.Variable(1.0, name="b")

        @tf.function(input_signature=[tf.TensorSpec([2], name="x")])
        def serve(self, x: tf.Tensor) -> tf.Tensor:
            return x * self.w if self.w.trainable else x + self.w

    save_module(Plain(True, False), tmp_path / "a")
    save_module(Plain(False, True), tmp_path / "b")
    report = bnqat.diff(tmp_path / "a", tmp_path / "b").report
    assert report.verdict.other_changes is None
    assert report.verdict.batch_norms == 0
    changed = {(c.kind, c.what, c.name.partition("/.")[0]) for c in report.changes}
    assert changed >= {("variable", "changed", "w"), ("variable", "added", "b")}
    assert report.ops["Mul"] == [1, 0]
    assert report.ops["AddV2"] == [0, 1]
    flags = [d for c in report.changes if c.kind == "variable" and c.what == "changed" for d in c.details]
    assert [(d.aspect, d.old, d.new) for d in flags] == [("trainable", "True", "False")]


def test_two_models_that_have_nothing_to_do_with_each_other(model: Paths) -> None:
    report = bnqat.diff(model("module"), model("v1_two_fused")).report
    verdict = report.verdict
    assert (verdict.sites_found, verdict.sites_rewritten, verdict.sites_skipped) == (2, 0, 2)
    assert (verdict.signatures_intact, verdict.signatures_found) == (0, 1)
    assert {(c.kind, c.what) for c in report.changes} >= {("function", "removed"), ("signature", "changed")}


def test_functions_of_other_names_are_found_by_what_they_are_for(model: Paths, tmp_path: Path) -> None:
    for name in ("keras_save", "module_train", "if", "nested"):
        renamed = mutated(model(name), tmp_path / name, rename_functions)
        report = bnqat.diff(model(name), renamed).report
        assert report.changes == [], name
        assert len(report.renamed) > 2, name
        assert all(new.startswith(f"{old}_7") for old, new in report.renamed.items()), name


def test_what_changed_in_functions_of_other_names(model: Paths, tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        rename_functions(meta)
        next(nodes_of(function_with(meta, "FusedBatchNormV3"), "FusedBatchNormV3")).attr["epsilon"].f = 0.5

    (change,) = bnqat.diff(model("module"), mutated(model("module"), tmp_path / "other", edit)).report.changes
    assert (change.kind, change.what, change.name, change.op) == (
        "node",
        "changed",
        "FusedBatchNormV3",
        "FusedBatchNormV3",
    )
    assert [(d.aspect, d.old, d.new) for d in change.details] == [("attribute epsilon", "0.001", "0.5")]


def test_values(model: Paths, tmp_path: Path) -> None:
    key = "kernels/0/.ATTRIBUTES/VARIABLE_VALUE"
    other = with_value(model("module"), tmp_path / "other", key, lambda v: v * 2)
    assert bnqat.diff(model("module"), other).report.changes == []
    (change,) = bnqat.diff(model("module"), other, values=True).report.changes
    assert (change.kind, change.name, [d.aspect for d in change.details]) == ("variable", key, ["value"])


def test_collections_assets_and_other_files(model: Paths, tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        meta.collection_def["marks"].node_list.value.append("x")

    other = mutated(model("v1_two_fused"), tmp_path / "other", edit)
    (other / "assets").mkdir(exist_ok=True)
    (other / "assets" / "labels.txt").write_text("cat\ndog\n")
    changes = {(c.kind, c.what, c.name) for c in bnqat.diff(model("v1_two_fused"), other).report.changes}
    assert changes == {("collection", "added", "marks"), ("file", "added", "assets/labels.txt")}


def test_json_is_as_documented(model: Paths, rewritten: Paths) -> None:
    done = run(model("module"), rewritten("module", bits=4), "--format", "json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    names = {*report, *report["verdict"], *report["changes"][0], *report["layers"][0], *report["layers"][0]["sites"][0]}
    names |= {*report["layers"][0]["sites"][0]["inputs"][0], "aspect", "old", "new", "port"}
    assert [name for name in names if f"`{name}`" not in documented] == []
    assert report == json.loads(bnqat.diff(model("module"), rewritten("module", bits=4)).to_json())


def test_text(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    after = rewritten("module", bits=4)
    lines = run(model("module"), after).stdout.splitlines()
    assert lines[1] == "2 batch norms were quantised to 4 bits; the quantisers are on, so outputs differ."
    assert lines[2] == "no other changes (206 explained by the record of the rewrite)"
    assert lines[3] == "1 of 1 signature intact"
    assert lines[6] == "  2 batch norms: quantised, 4-bit"
    assert "    in batch_norm, batch_norm_1" in lines
    assert "  FusedBatchNormV3                      2 -> 4      +2" in lines
    assert "    gamma ─ affine, 4 bits: round(v/s)·s ─▶ scale" in lines
    assert not any("\x1b" in line for line in lines)
    assert any(
        "\x1b[31m" in line
        for line in CliRunner().invoke(main, ["diff", str(after), str(model("module"))], color=True).stdout.splitlines()
    )
    few, many = (len(run(model("module"), after, *flags).stdout.splitlines()) for flags in ((), ("-v",)))
    assert many > few + 100
    run(model("module"), after, "-o", tmp_path / "diff.txt")
    assert (tmp_path / "diff.txt").read_text(encoding="utf-8").splitlines() == lines


def test_full_describes_added_nodes(model: Paths, rewritten: Paths) -> None:
    plain, full = (
        bnqat.diff(model("module"), rewritten("module", bits=4), full=full).report.changes for full in (False, True)
    )
    assert [(c.kind, c.name, c.by) for c in plain] == [(c.kind, c.name, c.by) for c in full]
    added = [c for c in full if c.kind == "node" and c.what == "added" and c.op == "SelectV2"]
    assert added
    assert all([d.port for d in c.details if d.aspect.startswith("input")] == ["condition", "t", "e"] for c in added)
    assert all(not c.details for c in plain if c.kind == "node" and c.what == "added")


def test_exit_codes(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    a, b = model("module"), rewritten("module", bits=4)
    assert run(a, b).exit_code == 0
    assert run(a, b, "--exit-code").exit_code == 1
    assert run(a, a, "--exit-code").exit_code == 0
    assert run(a, tmp_path).exit_code == 2
    assert run(a).exit_code == 2
    assert run(a, b, "--format", "svg").exit_code == 2
    assert run(a, b, "--site", "batch_norm").exit_code == 2
    inside = run(a, b, "-o", b / "diff.html")
    assert (inside.exit_code, "would lie in the model" in inside.stderr) == (2, True)
    nowhere = run(a, b, "-o", tmp_path / "no" / "diff.html")
    assert (nowhere.exit_code, "there is no directory" in nowhere.stderr) == (2, True)


def test_svg_of_one_site(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    a, b = model("module"), rewritten("module", bits=4)
    file = tmp_path / "site.svg"
    assert run(a, b, "--site", "batch_norm_1", "-o", file).exit_code == 0
    root = ET.parse(file).getroot()  # noqa: S314  our own file
    text = "\n".join(e.text or "" for e in root.iter())
    for label in (
        "gamma ─ affine, 4 bits",
        "round(v/s)·s",
        "moving_variance ─ log, 4 bits",
        "~ FusedBatchNormV3",
        "scale",
    ):
        assert label in text
    assert "var(" not in text
    far = run(a, b, "--format", "svg", "--site", "batch_norm_1", "--hops", "3").stdout
    assert far.count("<g ") > file.read_text(encoding="utf-8").count("<g ")
    wrong = run(a, b, "--format", "svg", "--site", "nothing")
    assert (
        wrong.exit_code,
        "there is no layer, and no node that changed, of the name nothing" in wrong.stderr,
    ) == (2, True)


def test_rewriting_can_show_its_page(model: Paths, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["rewrite", str(model("module")), str(tmp_path / "out"), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8") == bnqat.diff(model("module"), tmp_path / "out").to_html()
    dry = CliRunner().invoke(
        main, ["rewrite", str(model("module")), str(tmp_path / "x"), "--html", str(page), "--dry-run"]
    )
    assert dry.exit_code == 2
    assert "--html shows what was written" in dry.stderr


def test_comparing_executes_nothing_and_changes_nothing(
    model: Paths, rewritten: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = model("keras_save"), rewritten("keras_save")
    before = harness.digest(a), harness.digest(b)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded to be run")

    monkeypatch.setattr(tf.saved_model, "load", never)
    monkeypatch.setattr(tf.compat.v1.saved_model, "load", never)
    monkeypatch.setattr(tf.compat.v1, "Session", never)
    bnqat.diff(a, b, values=True).to_html()
    assert (harness.digest(a), harness.digest(b)) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.update(authors=[]),
        lambda r: r.update(authors=[[1]]),
        lambda r: r.update(authors=[None]),
        lambda r: r.update(source=3),
        lambda r: _first_change(r).__setitem__(0, 10**30),
        lambda r: _first_change(r).__setitem__(0, "a"),
        lambda r: _first_change(r).__setitem__(0, 1.5),
        lambda r: _first_change(r).__setitem__(1, 7),
        lambda r: _first_change(r).__setitem__(1, {"attr": 7}),
    ],
)
def test_a_damaged_record_is_none(
    model: Paths, rewritten: Paths, tmp_path: Path, damage: Callable[[Any], None]
) -> None:
    after = with_record(rewritten("module"), tmp_path / "after", damage)
    with pytest.raises(bnqat.Error, match="is no record of a rewrite"):
        bnqat.diff(model("module"), after)


def _first_change(record: Any) -> Any:
    """Return the entry of a record's first change: its author and its hash."""
    change: Any = next(iter(next(iter(next(iter(record["changes"].values())).values())).values()))
    return change


def test_layers_whose_constants_became_variables(model: Paths, tmp_path: Path) -> None:
    """The layers have other names then, and are quantised nonetheless."""
    bnqat.rewrite(model("frozen_v1"), tmp_path / "q", bits=4, unfreeze_constants=True)
    difference = bnqat.diff(model("frozen_v1"), tmp_path / "q")
    before = [layer for layer in difference.report.layers if layer.status != "new"]
    assert [(layer.status, layer.bits, layer.fused) for layer in before] == [("quantised", [4], True)] * 2
    assert difference.report.verdict.batch_norms_skipped == 0
    assert difference.headline.startswith("2 batch norms were quantised to 4 bits, and each became one fused kernel; ")


def test_the_headline_tells_layers_that_are_quantised_in_part() -> None:
    layers = [LayerDiff("a", [], "quantised", [4], fused=False), LayerDiff("b", [], "partly", [8], fused=False)]
    verdict = Verdict(3, 1, 1, 5, 3, 0, 2, 0, 1, 1)
    assert headline(Model({}), layers, verdict, 9) == (
        "2 of 3 batch norms were quantised to 4 and 8 bits (1 of them only in some places); "
        "the quantisers are on, so outputs differ."
    )

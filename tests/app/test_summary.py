"""The summary of a rewrite: layers first, at most eight lines, and nothing left in float in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bnqat
from rewriter.app.by_layer import LayerReason, grouped
from rewriter.app.report_schema import LayerOutcome, QuantizerReport, RewriteReport, SkippedLayers
from rewriter.app.summary import LINES, rewrite_list
from rewriter.savedmodel.read import load
from tests.reliability.forks import Server

Paths = Callable[..., Path]
LISTS = ("skipped", "declined", "variables_added", "notes", "other_changes", "changes")
DERIVED = "train is derived from serving: dropout and regularisers of the original are absent"
SCHEDULE = {"start_step": 0, "ramp_steps": 0}


def report(**fields: Any) -> RewriteReport:
    numbers = dict.fromkeys(("sites_found", "sites_rewritten", "sites_added", "sites_fused"), 0)
    lists: dict[str, Any] = {name: [] for name in LISTS}
    plain: dict[str, Any] = {**numbers, **lists, "options": {}, "versions": {}, "source": "a", "target": "b"}
    return RewriteReport(**{**plain, "schedule": SCHEDULE, **fields})


def layers(rewritten: int, skipped: int = 0, partly: int = 0) -> list[LayerOutcome]:
    statuses = ["rewritten"] * rewritten + ["skipped"] * skipped + ["partly rewritten"] * partly
    return [LayerOutcome(f"norm_{i}", status, [], 1, 1) for i, status in enumerate(statuses)]


def test_one_of_everything_has_eight_lines() -> None:
    quantizer = QuantizerReport("bias", "dense", "affine", 8, "dynamic", [])
    full = report(
        layers=layers(2, 1),
        bits=[4],
        quantizers=[quantizer],
        skipped_layers=[SkippedLayers("it computes in float64", ["norm_2"])],
        train="train",
        train_note=DERIVED,
        notes=[DERIVED, "statistics are frozen", "3 variables are others now"],
        details=["3 variables are others now"],
        other_changes=["fingerprint.pb removed"],
        schedule={"start_step": 1000, "ramp_steps": 500, "freeze_step": 2000},
    )
    assert str(full).splitlines() == [
        "3 batch norms found, 2 quantised to 4 bits, 1 left in float",
        "also quantised: 1 bias to 8 bits",
        "left in float, norm_2: it computes in float64",
        "note: statistics are frozen",
        DERIVED,
        "until step 1000, outputs are those of a; quantisers act in full from step 1500 on; "
        "statistics are frozen from step 2000 on",
        "next: fine-tune b with its function train, then run `bnqat finalize`; `bnqat verify a b` checks this rewrite",
        "written to b",
    ]
    lines = [line.text for line in rewrite_list(full)]
    assert "note: 3 variables are others now" in lines
    assert "also: fingerprint.pb removed" in lines


@pytest.mark.parametrize("number", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("notes", [0, 1, 7])
@pytest.mark.parametrize("declined", [0, 4])
def test_many_reasons_and_notes_are_counted(number: int, notes: int, declined: int) -> None:
    left = [SkippedLayers(f"reason {i}", [f"norm_{i}"]) for i in range(number)]
    left += [SkippedLayers(f"cause {i}", [f"norm_{i}"], by="fuse-batch-norm") for i in range(declined)]
    many = report(
        layers=layers(20, 9),
        bits=[8],
        skipped_layers=left,
        train="train",
        train_note=DERIVED,
        notes=[DERIVED, *(f"sentence {i}" for i in range(notes))],
        quantizers=[QuantizerReport("bias", "dense", "affine", 8, "dynamic", [])],
    )
    lines = str(many).splitlines()
    assert len(lines) <= LINES
    shown = sum(line.startswith(("left in float", "note", "fuse-batch-norm")) for line in lines)
    hidden = number + notes + declined - shown
    assert (f"; {hidden} more reason" in lines[-1]) == bool(hidden)
    assert ("-v" in lines[-1]) == ("--report" in lines[-1]) == bool(hidden)
    assert any(line.startswith("left in float") for line in lines) == bool(number)
    assert any(line.startswith(("note", "fuse-batch-norm")) for line in lines) == bool(notes or declined)
    assert ", 9 left in float" in lines[0]


def test_ops_that_take_a_float_weight_are_named_whatever_else_is_left() -> None:
    left = [SkippedLayers(f"reason {i}", [f"norm_{i}"]) for i in range(9)]
    left += [SkippedLayers("it is a result", [], others=8, ops=[f"conv_{i}" for i in range(4)])]
    weights = [QuantizerReport("weight", name, "symmetric", 4, "dynamic", []) for name in ("a", "b+c")]
    many = report(layers=layers(20, 9), bits=[8], skipped_layers=left, train="train", quantizers=weights)
    lines = str(many).splitlines()
    assert lines[1] == "also quantised: 3 weights to 4 bits"
    assert "left in float, norm_0: reason 0" in lines
    assert "left in float, 4 ops (conv_0, conv_1, conv_2 and 1 more): it is a result" in lines
    assert many.headline == "20 of 29 batch norms quantised, 8 bits; 3 weights to 4 bits"
    assert "what else is quantised" in many._repr_html_()


def test_names_and_parts() -> None:
    some = report(
        layers=layers(1, 5, 1),
        bits=[2, 4, 8],
        skipped_layers=[
            SkippedLayers("one", [f"norm_{i}" for i in range(1, 6)]),
            SkippedLayers("two", ["norm_6"], partly=True),
            SkippedLayers("three", [], others=4),
        ],
    )
    assert str(some).splitlines()[:4] == [
        "7 batch norms found, 1 quantised to 2 to 8 bits, 1 in part, 5 left in float",
        "left in float, 5 batch norms (norm_1, norm_2, norm_3 and 2 more): one",
        "left in float, 4 values of other layers: three",
        "left in float in part, norm_6: two",
    ]
    assert repr(some) == "<RewriteReport: 1 of 7 batch norms quantised, 2 to 8 bits>"


def test_without_quantising() -> None:
    fused = [LayerOutcome("norm", "rewritten", [], 1, 1, fused=True)]
    lines = str(report(layers=fused, schedule={})).splitlines()
    assert lines[0] == "1 batch norm found, 1 rewritten; it became the fused kernel"
    assert lines[1:] == ["next: `bnqat verify a b` checks this rewrite", "written to b"]
    assert str(report(schedule={}, target="")).splitlines() == ["no batch norm found", "dry run: nothing was written"]


@pytest.mark.parametrize(
    ("schedule", "fused", "line"),
    [
        ({"start_step": 0, "ramp_steps": 0}, 0, "quantisers act from step 0 on"),
        ({"start_step": 0, "ramp_steps": 9}, 3, "quantisers act from step 0 on, in full from step 9 on"),
        ({"start_step": 7, "ramp_steps": 0}, 3, "until step 7, outputs are those of a up to float rounding"),
    ],
)
def test_the_first_step_that_quantises(schedule: dict[str, int], fused: int, line: str) -> None:
    lines = str(report(layers=layers(1), bits=[8], schedule=schedule, sites_fused=fused)).splitlines()
    assert lines[1] == line


def test_paths_are_quoted_for_a_shell_and_names_are_plain_text() -> None:
    odd = report(source="my model", layers=layers(1), skipped_layers=[SkippedLayers("\x1b[1m", ["a\nb"])])
    assert "`bnqat verify 'my model' b`" in str(odd)
    assert "\x1b" not in str(odd)
    assert r"left in float, a\nb: \x1b[1m" in str(odd).splitlines()
    assert "\x1b" not in repr(replace(odd, bits=[4]))


def test_reasons_that_name_nodes_are_one(model: Paths) -> None:
    source = load(model("v1_by_hand"))
    nodes = [name for name in source.graphs[""].nodes if name.endswith("add_3")]
    assert nodes == ["norm_0/add_3", "norm_1/add_3"]
    reasons = [LayerReason(f"layer_{i}", f"it uses {node}, as others do") for i, node in enumerate(nodes)]
    (group,) = grouped([source], [*reasons, reasons[0]])
    assert group == SkippedLayers("it uses …, as others do", ["layer_0", "layer_1"])
    alone, other = grouped([source], [reasons[0], LayerReason("c", "it uses nothing", by="p")])
    assert alone.reason == "it uses norm_0/add_3, as others do"
    assert other == SkippedLayers("it uses nothing", ["c"], by="p")


def test_layers_of_real_models(model: Paths, tmp_path: Path) -> None:
    saved = bnqat.rewrite(model("keras_save"), tmp_path / "saved", dry_run=True)
    assert saved.sites_found == 10
    assert str(saved).startswith("2 batch norms found, 2 quantised to 8 bits\ntrain is the source's training trace")
    assert [(layer.status, layer.sites_found, layer.sites_rewritten) for layer in saved.layers] == [
        ("rewritten", 5, 5)
    ] * 2
    mapped = bnqat.rewrite(model("mapped_batch_norm"), tmp_path / "mapped", bits=4, dry_run=True)
    (skipped,) = [layer for layer in mapped.layers if layer.status == "skipped"]
    assert skipped.reasons == [mapped.skipped[0].reason]
    assert [group.layers for group in mapped.skipped_layers] == [[skipped.name]]
    assert repr(mapped) == "<RewriteReport: 1 of 2 batch norms quantised, 4 bits>"
    lines = str(mapped).splitlines()
    assert lines[0] == "2 batch norms found, 1 quantised to 4 bits, 1 left in float"
    assert lines[1] == f"left in float, {skipped.name}: {skipped.reasons[0]}"


def test_a_source_with_a_train_of_its_own(model: Paths, tmp_path: Path) -> None:
    done = bnqat.rewrite(model("module_train"), tmp_path / "q")
    assert done.train == "quantization.train"
    lines = str(done).splitlines()
    assert lines[1].startswith("note: the source has an attribute 'train' of its own, ")
    assert lines[2].startswith("train is the source's training trace, ")
    assert lines[4].startswith(f"next: fine-tune {tmp_path / 'q'} with its function quantization.train, ")
    alone = bnqat.rewrite(model("module"), tmp_path / "alone", passes=["quantize"])
    assert (alone.train, alone.train_note) == ("", "")
    assert "fine-tune" not in str(alone)


def test_a_rule_that_leaves_a_layer_in_float(model: Paths, tmp_path: Path) -> None:
    config = {"rules": [{"match": "_1/", "scheme": "none"}]}
    ruled = bnqat.rewrite(model("keras_save"), tmp_path / "ruled", config=config, dry_run=True)
    assert str(ruled).splitlines()[:2] == [
        "2 batch norms found, 1 quantised to 8 bits, 1 left in float",
        "left in float, batch_normalization_1: the scheme none leaves it as it is",
    ]


def test_models_of_tensorflow_1(model: Paths, tmp_path: Path) -> None:
    done = bnqat.rewrite(model("v1_by_hand_references"), tmp_path / "q", start_step=10)
    lines = str(done).splitlines()
    assert len(lines) <= LINES
    assert lines[0] == "2 batch norms found, 2 quantised to 8 bits"
    assert lines[1].startswith("fuse-batch-norm left norm_0, norm_1 as before: … (Shape) uses …, ")
    assert lines[2] == "train is the source's own graph with is_training = True"
    assert lines[3] == f"until step 10, outputs are those of {model('v1_by_hand_references')}"
    assert lines[4].startswith(f"next: fine-tune {tmp_path / 'q'} with the signature train, ")
    assert not any("reference variables" in line for line in lines)
    assert any("reference variables" in line.text for line in rewrite_list(done))


def test_errors_count_layers(forks: Server, model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    frozen = forks.cli("rewrite", model("frozen_v1"), tmp_path / "out")
    assert frozen.err == (
        f"bnqat: error: none of the 2 batch norms of {model('frozen_v1')} can be rewritten: its moving mean is the "
        "constant …; --unfreeze-constants makes it a variable again\n"
    )
    again = forks.cli("rewrite", rewritten("keras_save"), tmp_path / "out")
    assert f"all 2 batch norms of {rewritten('keras_save')} are quantised already" in again.err

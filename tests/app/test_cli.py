from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from passes import REWRITE
from tests import harness
from tests.reliability.forks import Outcome, Server

Paths = Callable[..., Path]


Command = Callable[..., Outcome]


@pytest.fixture
def bnqat(forks: Server) -> Command:
    """The command line, in a process of its own."""
    return forks.cli


def assert_one_line(done: Outcome, text: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    errors = done.err.splitlines()
    assert len(errors) == 1, done.err
    assert errors[0].startswith("bnqat: error: ")
    assert text in errors[0]


def test_help_needs_no_tensorflow() -> None:
    code = "import sys, rewriter.app.cli as c; c.main(['--help'], standalone_mode=False)\n"
    code += "assert not {'tensorflow', 'numpy', 'networkx'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "inspect" in done.stdout
    assert "rewrite" in done.stdout


def test_inspect(bnqat: Command, model: Paths) -> None:
    done = bnqat("inspect", model("keras_save"), "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["schema_version"] == 2
    assert report["signatures"]["serving_default"]["inputs"][0]["shape"] == [None, 8, 8, 3]
    first, second = report["batch_norms"]
    assert first["name"] == "batch_normalization"
    assert first["variables"] == {
        r: f"batch_normalization/{r}" for r in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    assert first["epsilon"] == pytest.approx(1e-3)
    assert second["epsilon"] == pytest.approx(1e-2)
    assert first["momentum"] == pytest.approx(0.9)
    assert {s["mode"] for s in first["sites"]} == {"training", "inference"}
    assert all(s.keys() >= {"graph", "node", "kind", "mode", "status", "reason"} for s in first["sites"])
    assert {(s["kind"], s["status"], s["reason"]) for s in first["sites"]} == {("fused", "float", "")}
    table = bnqat("inspect", model("keras_save")).out
    assert "batch_normalization_1" in table
    assert "the fused kernel" in table
    assert "2 batch norms: 2 float" in table.splitlines()
    assert table.splitlines()[-1].startswith("3 weights, ")
    assert " inference " not in table
    with_sites = bnqat("inspect", model("keras_save"), "-v").out
    assert "2 batch norms: 2 float; 10 sites" in with_sites.splitlines()
    (row,) = [
        line.split() for line in with_sites.splitlines() if line.split()[:2] == ["batch_normalization_1", "gamma"]
    ][:1]
    modes = [site["mode"] for site in second["sites"]]
    assert row[8:10] == [str(modes.count("training")), str(modes.count("inference"))]


def test_inspect_lists_layers_and_on_request_sites(bnqat: Command, model: Paths) -> None:
    report = json.loads(bnqat("inspect", model("mapped_batch_norm"), "--json").out)
    (skipped,) = report["skipped_layers"]
    assert skipped["layers"] == ["batch_norm_1"]
    reason = "its function is used by an op other than a call, so the switch cannot be brought to it"
    assert skipped["reason"] == reason
    few = bnqat("inspect", model("mapped_batch_norm")).out.splitlines()
    first = few.index("2 batch norms: 1 float, 1 skipped")
    assert few[first + 1] == f"cannot be rewritten, batch_norm_1: {reason}"
    many = bnqat("inspect", model("mapped_batch_norm"), "--verbose").out.splitlines()
    next_line = many[many.index("2 batch norms: 1 float, 1 skipped; 2 sites") + 1]
    assert re.fullmatch(f"cannot be rewritten: FusedBatchNormV3 in __inference_largest_[0-9]+: {reason}", next_line)


def test_passes_are_told_on_request(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    lines = bnqat("rewrite", model("module"), tmp_path / "out", "-v").err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [name for name in REWRITE if name != "unfreeze-constants"]
    assert all(re.fullmatch(r"[a-z-]+: \d+ edits in \d+\.\d\d s", line) for line in lines)
    assert bnqat("finalize", tmp_path / "out", tmp_path / "quiet").err == ""
    lines = bnqat("finalize", tmp_path / "out", tmp_path / "final", "--fold", "--verbose").err.splitlines()
    assert [line.partition(":")[0] for line in lines][:2] == ["keep-serving", "bake-quantizers"]


def test_rewrite_and_inspect_the_result(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    done = bnqat(
        "rewrite", model("module"), tmp_path / "out", "--bits", "gamma=4,moving_variance=6", "--report", report_file
    )
    assert done.code == 0, done.err
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "2 batch norms found, 2 quantised to 4 to 8 bits"
    assert lines[1].startswith("train is derived from serving: ")
    assert "momentum 0.99 is assumed" in lines[1]
    assert lines[2:] == [
        "quantisers act from step 0 on",
        f"next: fine-tune {tmp_path / 'out'} with its function train, then run `bnqat finalize`; "
        f"`bnqat verify {model('module')} {tmp_path / 'out'}` checks this rewrite",
        f"written to {tmp_path / 'out'}",
    ]
    report = json.loads(report_file.read_text())
    assert report["sites_found"] == report["sites_rewritten"] == 2
    assert report["skipped"] == report["skipped_layers"] == []
    assert [layer["status"] for layer in report["layers"]] == ["rewritten"] * 2
    assert report["bits"] == [4, 6, 8]
    assert not {"source", "target"} & report.keys()  # it does not depend on where the models are
    assert report["variables_added"][:3] == ["quantization/step", "quantization/start_step", "quantization/ramp_steps"]
    assert len(report["variables_added"]) == 3 + 2 * 4
    assert report["schema_version"] == 2
    log = json.loads((tmp_path / "out/assets.extra/bnqat.json").read_text())
    assert log["batch_norms"][0]["sites"]
    assert str(tmp_path) not in json.dumps(log)
    inspected = json.loads(bnqat("inspect", tmp_path / "out", "--json").out)
    sites = [s for bn in inspected["batch_norms"] for s in bn["sites"]]
    assert {s["status"] for s in sites} == {"quantised"}
    bits = {q["role"]: (q["scheme"], q["bits"]) for s in sites for q in s["quantizers"]}
    assert bits == {
        "gamma": ("affine", 4),
        "beta": ("affine", 8),
        "moving_mean": ("affine", 8),
        "moving_variance": ("log", 6),
    }


def test_dry_run_writes_nothing(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    done = bnqat("rewrite", model("module"), tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert done.out.splitlines()[0] == "2 batch norms found, 2 quantised to 8 bits"
    assert done.out.splitlines()[-1] == "dry run: nothing was written"
    assert "next:" not in done.out
    assert list(tmp_path.iterdir()) == []


def test_existing_destinations(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    target = tmp_path / "out"
    shutil.copytree(model("module"), target)
    before = harness.digest(target)
    assert_one_line(bnqat("rewrite", model("module"), target), "--overwrite")
    assert harness.digest(target) == before
    assert bnqat("rewrite", model("module"), target, "--overwrite").code == 0
    assert harness.digest(target) != before
    source = shutil.copytree(model("module"), tmp_path / "source")
    assert_one_line(bnqat("rewrite", source, source, "--overwrite"), "input is never changed")
    assert_one_line(bnqat("rewrite", source, source / "assets" / "out"), "input is never changed")
    assert harness.digest(source) == harness.digest(model("module"))
    outer = shutil.copytree(model("module"), tmp_path / "outer")
    shutil.copytree(model("module"), outer / "inner")
    before = harness.digest(outer)
    assert_one_line(bnqat("rewrite", outer / "inner", outer, "--overwrite"), "input is never changed")
    assert harness.digest(outer) == before


def test_reports_stay_out_of_models(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    source = shutil.copytree(model("module"), tmp_path / "source")
    for file in (source / "saved_model.pb", source / "report.json", tmp_path / "out", tmp_path / "out" / "r.json"):
        done = bnqat("rewrite", source, tmp_path / "out", "--report", file)
        assert_one_line(done, "report")
    assert harness.digest(source) == harness.digest(model("module"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    done = bnqat("rewrite", source, tmp_path / "out", "--report", "/dev/full")
    assert done.code == 2
    assert "out was written, but the report /dev/full was not" in done.err
    assert (tmp_path / "out" / "saved_model.pb").exists()


def test_nothing_to_rewrite(bnqat: Command, tmp_path: Path, rewritten: Paths) -> None:
    module = tf.Module()
    module.serve = tf.function(lambda x: x + 1, input_signature=[tf.TensorSpec([None])])
    tf.saved_model.save(module, str(tmp_path / "plain"), signatures={"serving_default": module.serve})
    assert_one_line(bnqat("rewrite", tmp_path / "plain", tmp_path / "out"), "holds no batch norm")
    assert_one_line(bnqat("rewrite", rewritten("module"), tmp_path / "out"), "quantised already")
    assert not (tmp_path / "out").exists()
    done = bnqat("inspect", tmp_path / "plain")
    assert done.code == 0
    assert "no batch norm found" in done.out


def damaged(model: Path, target: Path, damage: str) -> Path:
    shutil.copytree(model, target)
    graph, data = target / "saved_model.pb", target / "variables/variables.data-00000-of-00001"
    if damage == "missing graph":
        graph.unlink()
    elif damage == "empty graph":
        graph.write_bytes(b"")
    elif damage == "truncated graph":
        graph.write_bytes(graph.read_bytes()[:-1000])
    elif damage == "foreign graph":
        graph.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(100))
    elif damage == "missing shard":
        data.unlink()
    elif damage == "truncated shard":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "missing index":
        (target / "variables/variables.index").unlink()
    elif damage == "no variables":
        shutil.rmtree(target / "variables")
    return target


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("missing graph", "no saved_model.pb"),
        ("empty graph", "no SavedModel"),
        ("truncated graph", "truncated"),
        ("foreign graph", "no SavedModel"),
        ("missing shard", ".data"),
        ("truncated shard", "checkpoint"),
        ("missing index", ".index"),
        ("no variables", "variables"),
    ],
)
def test_damaged_models_give_one_line(bnqat: Command, damage: str, text: str, model: Paths, tmp_path: Path) -> None:
    source = damaged(model("module"), tmp_path / "model", damage)
    assert_one_line(bnqat("rewrite", source, tmp_path / "out"), text)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_wrong_usage(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    assert_one_line(bnqat("rewrite", tmp_path / "none", tmp_path / "out"), "does not exist")
    assert_one_line(
        bnqat("rewrite", model("module"), tmp_path / "out", "--report", tmp_path / "no/r.json"), "no directory"
    )
    for bits in ("1", "17", "gamma=3,delta=4", "gamma=x", "many", "gamma=4,gamma=5", "=4"):
        done = bnqat("rewrite", model("module"), tmp_path / "out", "--bits", bits)
        assert done.code == 2
        assert "--bits" in done.err
    assert bnqat("rewrite", model("module"), tmp_path / "out", "--start-step", "-1").code == 2
    assert_one_line(bnqat("rewrite", model("module"), tmp_path / "out", "--momentum", "1.5"), "momentum")
    assert_one_line(bnqat("rewrite", model("module"), tmp_path / "out", "--passes", "nothing"), "no pass 'nothing'")
    assert bnqat("rewrite", model("module"), tmp_path / "out", "--passes", ",").code == 2
    for option in (("--bits", "4"), ("--momentum", "0.9"), ("--keep-ref",), ("--no-fuse",)):
        done = bnqat("rewrite", model("module"), tmp_path / "out", "--passes", "fuse-batch-norm", *option)
        assert done.code == 2
        assert option[0] in done.err
    assert list(tmp_path.iterdir()) == []


FLOAT64_NODES = ("batchnorm/add_1", "batchnorm_1/add_1")


def test_fusing_alone_and_not_at_all(bnqat: Command, model: Paths, tmp_path: Path) -> None:
    alone = bnqat("rewrite", model("keras3"), tmp_path / "f", "--passes", "fuse-batch-norm")
    assert alone.code == 0, alone.err
    assert alone.out.splitlines() == [
        "2 batch norms found, 2 rewritten; all became the fused kernel",
        f"next: `bnqat verify {model('keras3')} {tmp_path / 'f'}` checks this rewrite",
        f"written to {tmp_path / 'f'}",
    ]
    in_float64 = bnqat("rewrite", model("form_float64"), tmp_path / "d")
    reason = "it computes in float64, which the fused kernel does not have"
    assert f"fuse-batch-norm left batch_norm, batch_norm_1 as before: {reason}" in in_float64.out.splitlines()
    listed = bnqat("rewrite", model("form_float64"), tmp_path / "l", "-v").out
    assert all(re.search(f"fuse-batch-norm left {node} in .*: {reason}", listed) for node in FLOAT64_NODES)
    off = bnqat("rewrite", model("keras3"), tmp_path / "q", "--no-fuse")
    assert "fused kernel" not in off.out
    batch_norms = json.loads(bnqat("inspect", tmp_path / "q", "--json").out)["batch_norms"]
    assert {site["kind"] for batch_norm in batch_norms for site in batch_norm["sites"]} == {"decomposed"}

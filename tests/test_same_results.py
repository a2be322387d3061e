"""The tool that compares the results of two commits: in a repository of its own, and on small messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tools.same_results import (
    DIFFERS,
    ERROR_DIFFERS,
    MARKS_DIFFER,
    ROOT,
    SAME,
    Verdict,
    compare,
    compare_graphs,
)
from tools.same_results_worker import DEFAULT, GRAPH, REWRITES, Outcome, Worker, require_imports_from

FILES = ("bnqat.py", "pyproject.toml", "passes", "rewriter", "tests", "tools")
USER = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def test_a_renamed_mark_differs_in_rewritten_models_and_finalised_ones_are_the_same(tmp_path: Path) -> None:
    """A copy of this checkout is committed, then changed; so it does not matter whether this one is a repository."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed, so no commits can be compared")
    copy, folder = tmp_path / "copy", tmp_path / "temporary"
    copy.mkdir()
    folder.mkdir()
    for name in FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    for command in (("init", "--quiet"), ("add", "."), (*USER, "commit", "--quiet", "--message", "before")):
        subprocess.run([git, "-C", str(copy), *command], check=True)
    ops = copy / "rewriter" / "ops.py"
    changed = ops.read_text(encoding="utf-8").replace('"_bnqat_part"', '"_bnqat_piece"')
    ops.write_text(changed, encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    comparison = [sys.executable, "-m", "tools.same_results", "HEAD", "--only", "module_train"]
    done = subprocess.run(comparison, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = [line for line in done.stdout.splitlines() if "module_train" in line]
    statuses = [cell.strip() for cell in row.strip("│").split("│")]
    assert statuses == ["module_train", *[MARKS_DIFFER] * 4, SAME, SAME]
    assert "2 same, 4 marks differ, 0 error differs, 0 differs" in done.stdout
    assert list(folder.iterdir()) == []
    listed = subprocess.run([git, "-C", str(copy), "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def graph(**attributes: str) -> SavedModel:
    """One function with one node, which has these attributes."""
    model = SavedModel()
    function = model.meta_graphs.add().graph_def.library.function.add()
    function.signature.name = "f"
    node = function.node_def.add(name="n", op="Identity")
    for name, value in attributes.items():
        node.attr[name].s = value.encode()
    return model


def test_attributes_are_told_apart_from_marks() -> None:
    base = graph(_bnqat="1", T="1").SerializeToString()
    for marked in (graph(_bnqat="2", T="1"), graph(_bnqat_other="1", T="1"), graph(T="1")):
        assert compare_graphs(base, marked.SerializeToString()) == Verdict(MARKS_DIFFER)
    verdict = compare_graphs(base, graph(_bnqat="1", T="2").SerializeToString())
    place = "meta graph 0, function f, node n, attribute T"
    assert verdict == Verdict(DIFFERS, f'{place}: s: "1" became s: "2"')
    assert compare_graphs(base, graph(_bnqat="1").SerializeToString()).detail == f'{place}: s: "1" became absent'


def test_the_first_difference_is_named() -> None:
    def difference(changed: SavedModel) -> str:
        verdict = compare_graphs(graph(T="1").SerializeToString(), changed.SerializeToString())
        assert verdict.status == DIFFERS
        return verdict.detail.removeprefix("meta graph 0, ")

    changed = graph(T="1")
    changed.meta_graphs[0].graph_def.library.function[0].node_def.add(name="m")
    assert difference(changed) == "function f, nodes: only this checkout has m"
    changed = graph(T="1")
    changed.meta_graphs[0].graph_def.library.function[0].node_def[0].input.append("x")
    assert difference(changed) == 'function f, node n, input: nothing became input: "x"'
    changed = graph(T="1")
    changed.meta_graphs[0].graph_def.library.function[0].ret["y"] = "n:0"
    assert difference(changed) == 'function f, ret: nothing became ret { key: "y" value: "n:0" }'
    changed = graph(T="1")
    changed.meta_graphs[0].graph_def.library.function.add().signature.name = "g"
    assert difference(changed) == "only this checkout has function g"
    changed = graph(T="1")
    changed.meta_graphs[0].graph_def.versions.producer = 3
    assert difference(changed) == "graph_def.versions.producer: nothing became producer: 3"
    changed = graph(T="1")
    changed.meta_graphs.add()
    assert difference(changed) == "number of meta graphs, or the schema's version"


def test_outcomes_are_compared(tmp_path: Path) -> None:
    def verdict(base: Outcome, here: Outcome) -> Verdict:
        return compare(base, here, tmp_path / "base.pb", tmp_path / "here.pb")

    done = Outcome(False, "a\nb\n", {GRAPH: "1", "variables/variables.index": "2"}, ["assets.extra/report"])
    refused = Outcome(True, "no batch norm\n")
    assert verdict(done, done) == verdict(refused, refused) == Verdict(SAME)
    assert verdict(done, refused) == Verdict(DIFFERS, "only this checkout refuses: no batch norm")
    assert verdict(refused, Outcome(True, "none\n")).status == ERROR_DIFFERS
    assert verdict(refused, Outcome(True, "no batch norm\n", crash="KeyError()")).status == ERROR_DIFFERS
    for changed, detail in (
        (Outcome(False, "a\nc\n", done.files, done.extra), "printed: b became c"),
        (Outcome(False, done.text, {**done.files, "variables/variables.index": "3"}, done.extra), "bytes of variables"),
        (Outcome(False, done.text, done.files), "only one of them has assets.extra/report"),
    ):
        result = verdict(done, changed)
        assert result.status == DIFFERS
        assert result.detail.startswith(detail)


def test_texts_are_masked(tmp_path: Path) -> None:
    worker = Worker({}, tmp_path, {"/a": "TEMPORARY", "/a/tree": "TREE"})
    assert worker.mask("fuse: 3 edits in 0.31 s") == worker.mask("fuse: 3 edits in 12.00 s")
    assert worker.mask("/a/models/b, /a/tree/c") == "TEMPORARY/models/b, TREE/c"


def test_a_crash_is_told_apart_from_a_refusal(tmp_path: Path) -> None:
    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("paths", nargs=-1)
    def rewrite(paths: tuple[str, ...]) -> None:
        if paths[1] == DEFAULT:
            raise KeyError(paths[0])
        click.echo("no batch norm")
        sys.exit(2)

    outcomes = Worker({"rewrite": rewrite}, tmp_path, {"/a": "TEMPORARY"}).outcomes("model", "/a/model")
    assert outcomes[DEFAULT] == Outcome(True, "", crash="KeyError('TEMPORARY/model')")
    assert outcomes["no fuse"] == Outcome(True, "no batch norm\n")
    assert set(outcomes) == set(REWRITES)


def test_a_worker_refuses_another_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"bnqat is imported from .*, not from {tmp_path}"):
        require_imports_from(tmp_path)

"""Strings from a model, a record or a tag are plain text: they steer no terminal and style no table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mutate import mutated, with_record
from tests.reliability.forks import Server
from tests.reliability.trials import judged

Paths = Callable[..., Path]
ESCAPE = "\x1b]0;owned\x07"
SPELLED = r"\x1b]0;owned\x07"
MARKUP = ["bn[/x]", "[link=http://evil.example]bn[/link]", "[conceal]bn:smile:"]


def _renamed(meta: Any, name: str) -> None:
    for node in meta.object_graph_def.nodes:
        if node.HasField("variable"):
            node.variable.name = node.variable.name.replace("batch_normalization", name)


@pytest.mark.parametrize("name", MARKUP)
def test_names_are_no_markup(forks: Server, model: Paths, tmp_path: Path, name: str) -> None:
    source = mutated(model("keras_export"), tmp_path / "source", lambda meta: _renamed(meta, name))
    target, final = tmp_path / "target", tmp_path / "final"
    for arguments in (("inspect", source), ("rewrite", source, target), ("finalize", target, final)):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "done"
        assert arguments[0] == "rewrite" or name.partition("=")[0] in outcome.out  # a long one is folded


def test_signatures_are_no_markup(forks: Server, model: Paths, tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        meta.signature_def["a[/b]"].CopyFrom(meta.signature_def["serving_default"])

    source, target = mutated(model("v1_two_fused"), tmp_path / "source", edit), tmp_path / "target"
    assert judged(forks.cli("rewrite", source, target), "rewrite") == "done"
    outcome = forks.cli("verify", source, target)
    assert judged(outcome, "verify") == "done"
    assert "a[/b]" in outcome.out


def _authors(record: Any) -> None:
    record["authors"] = [[ESCAPE] for _ in record["authors"]]


def _graphs(record: Any) -> None:
    record["changes"]["node"][ESCAPE] = {"name": [0, "x"]}


def _kinds(record: Any) -> None:
    record["changes"][ESCAPE] = {"graph": {"name": [0, "x"]}}


@pytest.mark.parametrize("edit", [_authors, _graphs, _kinds])
def test_records(forks: Server, model: Paths, rewritten: Paths, tmp_path: Path, edit: Callable[[Any], None]) -> None:
    after = with_record(rewritten("keras_export"), tmp_path / "after", edit)
    outcome = forks.cli("diff", "--verbose", model("keras_export"), after)
    assert judged(outcome, "diff") == "done"
    assert "\x1b" not in outcome.out
    assert SPELLED in outcome.out


@pytest.mark.parametrize("reason", [ESCAPE, ["a"], {"a": 1}, 5])
def test_reasons(forks: Server, model: Paths, tmp_path: Path, reason: Any) -> None:
    """The log of a rewrite states the reason for which a site was skipped."""
    skipped = []

    def edit(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                if node.op.startswith("FusedBatchNorm"):
                    skipped.append({"graph": function.signature.name, "node": node.name, "reason": reason})
                    node.attr["_x"].i = 1

    after = mutated(model("keras_export"), tmp_path / "after", edit)
    extra = after / "assets.extra"
    extra.mkdir()
    (extra / "bnqat_changes.json").write_text(
        json.dumps({"schema_version": 1, "source": "x", "authors": [], "changes": {}})
    )
    (extra / "bnqat.json").write_text(json.dumps({"skipped": skipped}))
    outcome = forks.cli("diff", model("keras_export"), after)
    assert judged(outcome, "diff") == "done"
    assert (SPELLED if reason == ESCAPE else str(reason)) in outcome.out
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize("field", ["scheme", "use", "rounding", "range", "layer_name"])
def test_tags(forks: Server, model: Paths, rewritten: Paths, tmp_path: Path, field: str) -> None:
    def edit(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                if "_bnqat" in node.attr:
                    tag = json.loads(node.attr["_bnqat"].s)
                    node.attr["_bnqat"].s = json.dumps({**tag, field: f"{ESCAPE}<script>[/x]"}).encode()

    source = mutated(rewritten("keras_export"), tmp_path / "source", edit)
    for arguments in (
        ("inspect", source),
        ("diff", "--verbose", model("keras_export"), source),
        ("finalize", source, tmp_path / "final"),
    ):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "done"
        assert "\x1b" not in outcome.out + outcome.err

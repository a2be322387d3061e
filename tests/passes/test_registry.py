"""Tests of the registry: it names every pass, and each class bears its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import passes
from passes import FINALIZE, PASSES, PROVIDERS, REWRITE, loaded
from rewriter.pipeline import Pass, load_pass, pass_name

ROOT = Path(passes.__file__).parent


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_its_name(name: str) -> None:
    instance = load_pass(PASSES[name])
    assert isinstance(instance, Pass)
    assert pass_name(instance) == vars(type(instance))["name"] == name
    assert PASSES[name].partition(":")[0].endswith(f".{name.replace('-', '_')}")


def test_every_class_with_edits_is_registered() -> None:
    files = [f for f in ROOT.rglob("*.py") if "    def edits(self, model: Model)" in f.read_text(encoding="utf-8")]
    modules = {".".join(("passes", *f.relative_to(ROOT).with_suffix("").parts)) for f in files}
    assert modules == {target.partition(":")[0] for target in PASSES.values()}
    assert not REWRITE.keys() & FINALIZE.keys()


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_has_the_roles_that_the_registry_gives_it(name: str) -> None:
    assert tuple(loaded(name)().roles) == PROVIDERS[name]
    assert {role.name for role in PROVIDERS[name]} <= set(passes.roles())


def test_a_pass_without_a_name_is_called_as_its_class() -> None:
    assert pass_name(load_pass("tests.rewriter.test_pipeline:Talks")) == "Talks"


def test_names_are_known_without_tensorflow() -> None:
    code = "import sys, passes; assert passes.PASSES; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "False"


def test_the_documents_list_the_default_passes_in_their_order() -> None:
    text = (ROOT.parent / "docs/passes.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == list(REWRITE)

"""Tests of the registry: it names every pass, and each class bears its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import passes
from passes import FINALIZE, OPTIONS, PASSES, PROVIDERS, REWRITE, SWITCHED, OrderOptions, loaded
from passes.options import options_of
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


def test_names_and_options_are_known_without_tensorflow() -> None:
    """Nor is pydantic imported: that would make ``bnqat --help`` slower by half."""
    code = "import sys, passes, passes.options as o; assert all(o.options_of(c) for c in passes.OPTIONS)\n"
    code += "print(*{'tensorflow', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_inherits_the_options_that_are_its_own(name: str) -> None:
    classes = [loaded(PASSES[name]), *(map(loaded, PROVIDERS) if name == "quantize" else ())]
    assert {options for options in OPTIONS for owner in classes if issubclass(owner, options)} == {
        options for options, owners in OPTIONS.items() if name in owners
    }


def test_an_option_has_one_name_and_says_what_it_does() -> None:
    options = [option for cls in OPTIONS for option in options_of(cls)]
    assert len({option.name for option in options}) == len(options)
    for option in options:
        assert option.help[0].isupper()
        assert not option.help.endswith(".")


def test_switches_are_of_default_passes() -> None:
    assert list(SWITCHED) == [option.name for option in options_of(OrderOptions)]
    assert {name for names in SWITCHED.values() for name in names} <= REWRITE.keys()


def test_the_documents_list_the_default_passes_in_their_order() -> None:
    text = (ROOT.parent / "docs/passes.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == list(REWRITE)

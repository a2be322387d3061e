"""Tests of the options of passes, wherever a user meets them: all are made from, or held against, the same fields."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import bnqat
from passes import OPTIONS, SWITCHED
from passes.options import Option, options_of
from passes.quantization.options import QuantizerOptions
from passes.quantization.schemes import SCHEMES
from rewriter.app.cli import rewrite
from rewriter.app.names import OPTIONS_OF
from rewriter.app.options import FLAGS, ByRole
from rewriter.app.settings import OF_QUANTIZER, Defaults, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = [option for options in OPTIONS for option in options_of(options)]
PASSES_OF = {**{o.name: owners for options, owners in OPTIONS.items() for o in options_of(options)}, **SWITCHED}


def test_the_configuration_file_has_each_option_with_its_default() -> None:
    assert list(Settings.model_fields) == [*(option.name for option in ALL), "defaults", "rules"]
    assert Settings.model_validate({}).model_dump(exclude={"defaults", "rules"}) == {o.name: o.default for o in ALL}
    assert OPTIONS_OF.keys() == {*Settings.model_fields, *OF_QUANTIZER} - {"fuse"}


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.name)
def test_the_command_line_has_each_option(option: Option) -> None:
    (parameter,) = (p for p in rewrite.params if p.name == option.name)
    assert parameter.opts == [FLAGS[option.name]]
    assert rewrite.make_context("rewrite", []).params[option.name] is None  # so that the file's value counts
    words = getattr(parameter, "help", "").removeprefix("Do not ")
    assert words.lower().startswith(option.help.lower())


def test_names_on_the_command_line() -> None:
    assert {name for name, flag in FLAGS.items() if flag != f"--{name.replace('_', '-')}"} == {"fuse", "train_outputs"}
    assert (FLAGS["fuse"], FLAGS["train_outputs"]) == ("--no-fuse", "--train-output")


def test_python_has_each_option_typed_and_described() -> None:
    parameters = inspect.signature(bnqat.rewrite).parameters
    types = get_type_hints(bnqat.rewrite)
    text = (inspect.getdoc(bnqat.rewrite) or "").partition("Args:")[2].partition("Raises:")[0]
    for option in ALL:
        assert parameters[option.name].default is None
        assert types[option.name] == option.type | None, option.name
    assert list(parameters) == re.findall(r"^ {4}(\w+): ", text, re.MULTILINE)
    assert parameters.keys() >= {*OF_QUANTIZER, *(option.name for option in ALL)}


def test_the_documents_describe_each_option() -> None:
    text = (ROOT / "docs/quantisation.md").read_text(encoding="utf-8")
    table = text.partition("| option | command line |")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [_row(option) for option in ALL]


@pytest.mark.parametrize("option", options_of(QuantizerOptions), ids=lambda option: option.name)
def test_an_option_of_quantisers_is_everywhere(option: Option) -> None:
    """In the configuration's tables, where None is not set; on the command line and in Python, by role or not."""
    assert Defaults.model_fields[option.name].default is None
    (parameter,) = (p for p in rewrite.params if p.name == option.name)
    assert isinstance(parameter.type, ByRole)
    assert parameter.opts == [f"--{option.name.replace('_', '-')}"]
    assert rewrite.make_context("rewrite", []).params[option.name] is None
    assert getattr(parameter, "help", "").startswith(option.help)
    assert inspect.signature(bnqat.rewrite).parameters[option.name].default is None
    text = (ROOT / "docs/quantisation.md").read_text(encoding="utf-8")
    table = text.partition("| option of a quantiser |")[2].partition("\n\n")[0]
    default = "" if option.default is None else f"`{json.dumps(option.default)}`"
    names = ": " + ", ".join(get_args(option.type)) if get_origin(option.type) is Literal else ""
    row = f"| `{option.name}` | `{parameter.opts[0]}` | {default} | {option.help}{names} |".replace("|  |", "| |")
    assert row in table.splitlines()


def test_the_names_of_schemes_are_those_that_there_are() -> None:
    (scheme,) = (option for option in options_of(QuantizerOptions) if option.name == "scheme")
    assert get_args(scheme.type) == (*SCHEMES, "none")


def _row(option: Option) -> str:
    default: Any = "" if option.default is None else f"`{json.dumps(option.default)}`"
    names = ", ".join(f"`{name}`" for name in PASSES_OF[option.name])
    cells = [f"`{option.name}`", f"`{FLAGS[option.name]}`", default, option.help, names]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")

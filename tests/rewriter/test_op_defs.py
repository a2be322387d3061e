"""Tests that an absent attribute of a node has its op definition's default."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewriter import op_defs, protos
from rewriter.ir import ARG, Error, Model, Node

ROOT = Path(__file__).parents[2]

AS_WRITTEN = (
    "rewriter/conformance.py",
    "rewriter/diff/compare.py",
    "rewriter/op_defs.py",
    "rewriter/ops.py",
    "rewriter/savedmodel/graphs.py",
    "rewriter/text.py",
)
"""Modules that need attributes as written, without defaults: they check, compare, convert or print them."""


def test_an_attribute_that_was_left_out_has_its_default() -> None:
    node = Node("v", "VarHandleOp", attrs={"dtype": protos.dtype_attr("float32"), "shape": protos.shape_attr((2,))})
    assert op_defs.attribute(node, "shared_name").s == b""
    assert op_defs.attribute(node, "dtype").type == protos.dtype_number("float32")
    assert op_defs.get(Model({}), Node("bn", "FusedBatchNormV3"), "is_training") is True


def test_an_argument_of_a_polymorphic_function_has_no_dtype() -> None:
    assert op_defs.argument_dtype(Node("x", ARG)) == ""
    assert op_defs.argument_dtype(Node("x", ARG, attrs={"T": protos.dtype_attr("float64")})) == "float64"


def test_an_attribute_that_has_no_default_is_named() -> None:
    with pytest.raises(Error, match="a node of the op Cast has no attribute DstT"):
        op_defs.attribute(Node("c", "Cast"), "DstT")


def raw_reads(source: str) -> Iterator[int]:
    """Yield the numbers of lines that read an op's attribute from `attrs`, which ignores its default.

    Marks are exempt, because no op definition has them: names that start with an underscore, or constants for them.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="attrs"), slice=key, ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="attrs"), attr="get"), args=[key, *_]):
                pass
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[ast.Attribute(attr="attrs")]):
                pass
            case _:
                continue
        name = key.id if isinstance(key, ast.Name) else key.attr if isinstance(key, ast.Attribute) else ""
        mark = isinstance(key, ast.Constant) and str(key.value).startswith("_")
        if not (mark or name.isupper()):
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("node.attrs['shared_name'].s", 1),
        ("graph.nodes[a].attrs[form.types]", 1),
        ("node.attrs.get('shape')", 1),
        ("x = 1 if 'f' in node.attrs else 2", 1),
        ("node.attrs['_class']; node.attrs.get(TAG); ops.STAND_IN in node.attrs; node.attrs.items()", 0),
    ],
)
def test_raw_reads_are_seen(source: str, count: int) -> None:
    assert len(list(raw_reads(source))) == count


def test_attributes_are_read_through_the_definitions_of_ops() -> None:
    files = [f for folder in ("rewriter", "passes") for f in sorted((ROOT / folder).rglob("*.py"))]
    assert {ROOT / name for name in AS_WRITTEN} < set(files)
    reads = [f"{f.relative_to(ROOT)}:{n}" for f in files for n in raw_reads(f.read_text(encoding="utf-8"))]
    assert [place for place in reads if not place.startswith(AS_WRITTEN)] == []

"""Quantiser metadata: a JSON attribute on its node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any

from passes.quantization.roles import NAME
from rewriter import ops
from rewriter.ir import Error, Node

TAG = ops.STAND_IN
"""Attribute of the node that quantises its last input: JSON as in `rewriter.app.report_schema.SiteReport`."""

FIELDS: Mapping[str, type | UnionType] = {
    "role": str,
    "scheme": str,
    "bits": int,
    "range": str,
    "rounding": str,
    "narrow_range": bool,
    "axis": int | list | None,
    "layer_name": str,
    "layer": int,
    "row": int,
    "use": str,
}


def channel_axes(tag: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axes, counted from the end, of the channels that have ranges of their own."""
    axis = tag["axis"]
    return (axis,) if isinstance(axis, int) else tuple(axis or ())


def tag_of(node: Node) -> Mapping[str, Any]:
    """Return the metadata of the quantiser that a node is.

    Raises:
        Error: bnqat did not write it.
    """
    try:
        tag = json.loads(node.attrs[TAG].s)
    except (ValueError, RecursionError):
        tag = None
    valid = isinstance(tag, dict) and all(isinstance(tag.get(name), type_) for name, type_ in FIELDS.items())
    if not valid or not node.inputs or not NAME.fullmatch(tag["role"]):
        raise Error(
            f"{node.name} ({node.op}) is marked as a quantiser, but not by bnqat; rewrite the float model again"
        )
    metadata: Mapping[str, Any] = tag
    return metadata

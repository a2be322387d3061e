"""What a rewrite says of a quantiser, on its node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from passes.roles import ROLES
from rewriter import ops
from rewriter.ir import Error, Node

TAG = ops.QUANTIZER_MARK
"""Attribute of the node that quantises its last input: JSON as in `rewriter.report.SiteReport`."""

FIELDS: Mapping[str, type] = {
    "role": str,
    "scheme": str,
    "bits": int,
    "range": str,
    "rounding": str,
    "narrow_range": bool,
    "batch_norm": str,
    "layer": int,
    "use": str,
}


def tag_of(node: Node) -> Mapping[str, Any]:
    """What is said of the quantiser that a node is.

    Raises:
        Error: it is not what bnqat writes.
    """
    try:
        found = json.loads(node.attrs[TAG].s)
    except (ValueError, RecursionError):
        found = None
    fields = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in FIELDS.items())
    if not fields or not node.inputs or found["role"] not in ROLES:
        raise Error(
            f"{node.name} ({node.op}) is marked as a quantiser, but not by bnqat; rewrite the float model again"
        )
    checked: Mapping[str, Any] = found
    return checked

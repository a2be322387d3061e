"""The training functions that a rewrite adds: their names, and the functions of their phases."""

from __future__ import annotations

from rewriter.dataflow import call_graph
from rewriter.ir import Model

# From names of this form, TensorFlow's loader strips the prefix and the number.
TRAIN = "__inference_bnqat_train_0"
TRAIN_SIGNATURE = "__inference_bnqat_train_signature_0"
SERVE = "__inference_bnqat_serve_0"
"""Names of the functions that a rewrite adds."""

FROZEN = "_frozen"
"""Suffix of the names of the functions in which training normalises with frozen statistics."""


def frozen(model: Model) -> frozenset[str]:
    """Return the functions of the second phase alone, and those that only call its root."""
    calls = model.analysis(call_graph)
    prefixes = tuple(f"{name}{FROZEN}" for name in (TRAIN, TRAIN_SIGNATURE))
    return frozenset().union(*(calls.reached(name) for name in model.graphs if name.startswith(prefixes)))

"""The functions and signatures of a model that serve."""

from __future__ import annotations

from passes.batch_norm.sites import sites
from passes.control_flow.running_graphs import running_from
from rewriter.ir import Entry, Error, Model, Signature

HINT = " (--passes quantize rewrites without a training function)"


def serving_signature(model: Model) -> Signature | None:
    """Return the signature that computes a batch norm in inference: the default one, if it does, else the first."""
    signatures = [s for s in model.signatures.values() if _infers(model, s.entry)]
    return min(signatures, key=lambda s: (s.name != "serving_default", s.name), default=None)


def serving_entry(model: Model) -> Entry:
    """Return the function that serves.

    The candidates are, in this order, the root's own `serve`, the function of `serving_signature`, the root's call and
    its other functions.

    Raises:
        Error: none of them computes a batch norm in inference.
    """
    signature = serving_signature(model)
    signed = [model.entries[signature.entry]] if signature is not None else []
    named = (*model.root_entries("serve"), *signed, *model.root_entries("__call__"))
    others = sorted(entries_of_root(model), key=lambda e: e.paths)
    for entry in (*named, *others):
        if _infers(model, entry.function):
            return entry
    raise Error(f"no signature and no function of the root object computes a batch norm in inference{HINT}")


def _infers(model: Model, function: str) -> bool:
    """Return true if a function computes a batch norm in inference."""
    reached = running_from(model, function)
    return any(s.graph in reached and s.inference for s in model.analysis(sites))


def entries_of_root(model: Model) -> list[Entry]:
    """Return the concrete functions that the root itself holds."""
    return [e for e in model.entries.values() if any("." not in p for p in e.paths)]

"""The functions and signatures of a model that serve."""

from __future__ import annotations

from passes.batch_norm.sites import sites
from passes.control_flow.running_graphs import running_from
from passes.quantization.training_functions import counting
from rewriter.ir import Entry, Error, Model, Signature

HINT = " (--passes quantize rewrites without a training function)"


def has_batch_norms(model: Model) -> bool:
    """Return true if a model has a batch norm that can be rewritten, or that was.

    Then what serves and what trains is told by batch norms; else, by variables and random numbers.
    """
    return any(site.status != "skipped" for site in model.analysis(sites))


def serving_signature(model: Model) -> Signature | None:
    """Return the signature that computes a batch norm in inference: the default one, if it does, else the first.

    In a model without batch norms, it is the one that computes with variables.
    """
    signatures = [s for s in model.signatures.values() if _serves(model, s.entry)]
    return min(signatures, key=lambda s: (s.name != "serving_default", s.name), default=None)


def serving_entry(model: Model) -> Entry:
    """Return the function that serves.

    The candidates are, in this order, the root's own `serve`, the function of `serving_signature`, the root's call and
    its other functions.

    Raises:
        Error: none of them computes a batch norm in inference; or, in a model without batch norms, with variables.
    """
    signature = serving_signature(model)
    signed = [model.entries[signature.entry]] if signature is not None else []
    named = (*model.root_entries("serve"), *signed, *_inferring_first(model.root_entries("__call__")))
    others = sorted(entries_of_root(model), key=lambda e: e.paths)
    for entry in (*named, *_inferring_first(others)):
        if _serves(model, entry.function):
            return entry
    raise Error(f"no signature and no function of the root object {_task(model)}{HINT}")


def no_signature(model: Model) -> str:
    """Return a sentence on a model in which no signature serves."""
    return f"no signature {_task(model)}, so there is no signature 'train'"


def _task(model: Model) -> str:
    """Return what a function does that serves, as a predicate."""
    return "computes a batch norm in inference" if model.analysis(has_batch_norms) else "computes with variables"


def _inferring_first(entries: tuple[Entry, ...] | list[Entry]) -> list[Entry]:
    """Return functions in their order; those that were traced with a flag, such as training=True, come last."""
    return sorted(entries, key=lambda entry: any(entry.flags))


def _serves(model: Model, function: str) -> bool:
    """Return true if a function computes a batch norm in inference or, in a model without, with variables."""
    if not model.analysis(has_batch_norms):
        return function in model.analysis(_computing)
    reached = running_from(model, function)
    return any(s.graph in reached and s.inference for s in model.analysis(sites))


def _computing(model: Model) -> frozenset[str]:
    """Return the functions that compute with variables and count no steps; all others, if no function has variables."""
    counts = model.analysis(counting)
    plain = [e for e in model.entries.values() if e.function not in counts]
    with_variables = [e.function for e in plain if any(isinstance(c, str) for c in e.captures)]
    return frozenset(with_variables or (e.function for e in plain))


def entries_of_root(model: Model) -> list[Entry]:
    """Return the concrete functions that the root itself holds."""
    return [e for e in model.entries.values() if any("." not in p for p in e.paths)]

"""A check of the result: training moves the moving averages of every batch norm that it trains."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from passes.batch_norm.roles import MEAN, ROLES, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.batch_norm.updates import ASSIGNING, updates_of
from passes.control_flow.invocations import Invocation, of_entry, of_signature
from passes.entries.serving import serving_entry
from passes.quantization.training_functions import TRAIN, TRAIN_SIGNATURE, frozen
from rewriter.dataflow import VariableKey
from rewriter.edit import Edit, Note
from rewriter.ir import Entry, Error, Model

AVERAGES = (ROLES.index(MEAN), ROLES.index(VARIANCE))
SHOWN = 4
"""Number of variables that a note names."""


@dataclass(frozen=True)
class CheckAverages:
    """Refuse a training function that leaves a moving average as it is, though the source updates it.

    The averages that serving normalises with have to move. The variables that the training function assigns
    whenever it runs do move. A batch norm that training leaves in inference mode needs no update.
    """

    name: ClassVar[str] = "check-averages"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Yield a note where the source never updates an average, or does so under a condition of its own.

        Raises:
            Error: the source updates an average, and the training function does not.
        """
        serving, training_updates = _serving(model), _training_updates(model)
        served_keys = {key for run in serving for key in _normalised_with(model, run)} if training_updates else set()
        never, sometimes = set[str](), set[str]()
        for updates in training_updates:
            never |= served_keys - updates.still - updates.possible
            sometimes |= (served_keys & updates.possible) - updates.still - updates.certain
        for key in sorted(never):
            # An assignment from data, anywhere in the model, is the source's own update.
            for _, node in updates_of(model, key):
                raise Error(
                    f"train would leave {model.variables[key].name} as it is, which the source updates at {node}; "
                    "try --no-fuse, or --passes quantize for a result without a training function"
                )
        if never:
            yield Note(f"nothing in the source updates {_names(model, never)}, so train does not either")
        if sometimes:
            yield Note(f"train updates {_names(model, sometimes)} under a condition of the source's own")


def _names(model: Model, keys: Collection[str]) -> str:
    """Return the names of some variables; of many, the first few and the number of the others."""
    names = sorted(model.variables[key].name for key in keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class _AverageUpdates(NamedTuple):
    """The keys of the moving averages of one training function.

    Attributes:
        still: averages that it normalises with.
        possible: averages that it may assign.
        certain: averages that it assigns whenever it runs.
    """

    still: frozenset[str]
    possible: frozenset[str]
    certain: frozenset[str]


def _serving(model: Model) -> list[Invocation]:
    """Return the invocations of the signature or function of serving that training follows."""
    if model.object_based:
        return of_entry(model, serving_entry(model)) if TRAIN in model.entries else []
    signature = model.main_signatures.get("train")
    return [] if signature is None else of_signature(model, model.signatures[signature.like])


def _training_updates(model: Model) -> list[_AverageUpdates]:
    """Return the updates of the training functions; if one is given its mode, those of the mode with most."""
    if not model.object_based:
        signature = model.main_signatures.get("train")
        return [] if signature is None else [_updates_in(model, of_signature(model, signature))]
    # A function that is given its mode moves nothing in inference, which is as it should be.
    tops = [model.entries[name] for name in (TRAIN, TRAIN_SIGNATURE) if name in model.entries]
    return [
        max(_by_mode(model, top), key=lambda updates: (len(updates.certain), len(updates.possible))) for top in tops
    ]


def _by_mode(model: Model, top: Entry) -> Iterator[_AverageUpdates]:
    """Yield the updates of a training function as it is, and with each of its booleans known."""
    ignored = model.analysis(frozen)  # the phase after the freeze step is meant to be still
    names = model.graphs[top.function].arguments
    flags = [name for name, spec in zip(names, top.inputs, strict=False) if spec.dtype == "bool"]
    for known in ({}, *({name: value} for name in flags for value in (True, False))):
        yield _updates_in(model, of_entry(model, top, known, ignored))


def _updates_in(model: Model, runs: list[Invocation]) -> _AverageUpdates:
    normalised_keys = {key for run in runs for key in _normalised_with(model, run)}
    assigned = [(key, run.always(node)) for run in runs for key, node in _assigned(run)]
    return _AverageUpdates(
        frozenset(normalised_keys),
        frozenset(key for key, _ in assigned),
        frozenset(key for key, always in assigned if always),
    )


def _assigned(run: Invocation) -> Iterator[tuple[str, str]]:
    """Yield the variables that a run assigns, and the nodes that assign them."""
    for name in run.needed:
        node = run.graph.nodes[name]
        if node.op.startswith(ASSIGNING) and node.inputs:
            source = run.origin(node.inputs[0])
            if isinstance(source, VariableKey):
                yield source.key, name


def _normalised_with(model: Model, run: Invocation) -> Iterator[str]:
    """Yield the keys of the moving averages that a run normalises with."""
    for site in model.analysis(_sites_by_graph).get(run.graph.name, ()):
        if site.node in run.needed and site.inference and not site.reason and _infers(run, site):
            for keys in _bound(run, site):
                yield from (key for key in (keys[index] for index in AVERAGES) if key is not None)


def _infers(run: Invocation, site: Site) -> bool:
    """Return true if a site may normalise with the moving statistics in a run."""
    return site.mode == "inference" or any(run.assumed.passes(edge) for edge in site.binding.parameters.get(MEAN, ()))


def _bound(run: Invocation, site: Site) -> Iterator[tuple[str | None, ...]]:
    """Yield the variables that a site may have in a run, of all that it has in any run."""
    for keys in site.binding.variables:
        edges = (site.inputs[role][0] for role in ROLES if role in site.inputs)
        sources = [run.origin(run.graph.nodes[e.node].inputs[e.position]) for e in edges]
        keys_in_run = {o.key for o in sources if isinstance(o, VariableKey)}
        if keys_in_run <= set(keys):
            yield keys


def _sites_by_graph(model: Model) -> dict[str, list[Site]]:
    """Return the sites of each graph."""
    by_graph: dict[str, list[Site]] = {}
    for site in model.analysis(sites):
        by_graph.setdefault(site.graph, []).append(site)
    return by_graph

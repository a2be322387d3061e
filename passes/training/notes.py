"""Notes on a training function for its user."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from passes.batch_norm.batch_norms import DEFAULT_MOMENTUM
from passes.batch_norm.layers import layers_of_sites
from passes.batch_norm.site import Site
from passes.entries.serving import has_batch_norms
from passes.training.frozen_layers import frozen_layers
from passes.training.layer_options import TrainingOptions, weights
from rewriter.edit import Note
from rewriter.ir import Model

SHOWN = 3
"""Number of names that a note lists."""


def derived_notes(
    model: Model,
    trained: Sequence[Site],
    untrainable: Sequence[Site],
    options: TrainingOptions,
    *,
    random: bool = False,
) -> Iterator[Note]:
    """Yield notes on training that is derived from serving; sites in `untrainable` stay in inference mode.

    If serving itself draws random numbers (`random`), dropout may be among them, and is not called absent.
    """
    absent = "regularisers" if random else "dropout and regularisers"
    text = f"train is derived from serving: {absent} of the original are absent"
    layer_of = model.analysis(layers_of_sites)
    layers = {layer_of[s.graph, s.node].number: layer_of[s.graph, s.node] for s in trained}
    unsaid = [x for x in layers.values() if not any(s.training for bn in x.batch_norms for s in bn.sites)]
    if any(options.train_batch_norm_of(model, layer) == "as-source" for layer in unsaid):
        text += "; batch norms are assumed to train (else: --train-batch-norm)"
    yield Note(text + _assumed(model, trained, options), "train")
    if untrainable:
        names = _names(model, untrainable)
        count = f"{len(names)} batch norms stay" if len(names) > 1 else "1 batch norm stays"
        why = "as another function reads the moving statistics"
        yield Note(f"{count} in inference mode in train, {why}: {_listed(names)}")
    if any(len(weights(model, s)) > 1 for s in trained):
        yield Note("a function is shared by batch norms of different momentum; train uses that of the first")
    ruled = [
        s
        for s in trained
        if weights(model, s) and any(r.momentum is not None for r in options.matching(model, layer_of[s.graph, s.node]))
    ]
    if ruled:
        yield Note(f"the momentum given for {_listed(_names(model, ruled))} has no influence: the source's own is used")


def unused_notes(model: Model, options: TrainingOptions) -> Iterator[Note]:
    """Yield a note where options for batch norms are given for a model that has none."""
    if model.analysis(has_batch_norms):
        return
    given = {"--momentum": options.momentum is not None, "--train-batch-norm": options.train_batch_norm != "as-source"}
    names = [name for name, is_given in given.items() if is_given]
    if names:
        verb = "has" if len(names) == 1 else "have"
        yield Note(f"{' and '.join(names)} {verb} no effect, as no batch norm of the model can train")


def unfrozen_notes(model: Model, trained: Sequence[Site], options: TrainingOptions) -> Iterator[Note]:
    """Yield notes on sites that train beside those of the source's training function; there may be none."""
    momentum_given = options.momentum is not None or any(rule.momentum is not None for rule in options.rules)
    if trained:
        names = _listed(_names(model, trained))
        yield Note(f"train also trains what the source leaves frozen: {names}{_assumed(model, trained, options)}")
    elif momentum_given:
        yield Note("the momentum given has no influence: the training trace has its own")


def _assumed(model: Model, trained: Sequence[Site], options: TrainingOptions) -> str:
    """Return the text on the momentum that is assumed for sites; "" where none is assumed."""
    momenta = [(site, options.momentum_of(model, site)) for site in trained]
    assumed = [(site, f"{m.value:.6g}") for site, m in momenta if m.whose == "assumed"]
    if not assumed:
        return ""
    value = assumed[0][1]  # one for all: the default, or what the other batch norms agree on
    why = "" if value == str(DEFAULT_MOMENTUM) else ", which the source's other batch norms have,"
    names = _names(model, [site for site, _ in assumed])
    which = f" for {_listed(names)}" if len(names) < len(_names(model, trained)) else ""
    return f"; momentum {value}{why} is assumed{which} (--momentum sets it)"


def momentum_notes(options: TrainingOptions) -> Iterator[Note]:
    """Yield a note where a momentum is given for a graph that has its own."""
    if options.momentum is not None or any(rule.momentum is not None for rule in options.rules):
        yield Note("the momentum given has no influence: the source's own graph has its own")


def frozen_notes(model: Model, frozen_names: Collection[str], options: TrainingOptions) -> Iterator[Note]:
    """Yield notes on the batch norms, by name, that stay frozen in training."""
    frozen_by_source = model.analysis(frozen_layers)
    reasons: dict[str, list[str]] = {}
    layer_of = {bn.name: layer for layer in model.analysis(layers_of_sites).values() for bn in layer.batch_norms}
    for name in frozen_names:
        layer = layer_of[name]
        if name in frozen_by_source and options.train_batch_norm_of(model, layer) == "as-source":
            why = f"as {frozen_by_source[name]}; --train-batch-norm all trains them"
        elif any(rule.train_batch_norm is not None for rule in options.matching(model, layer)):
            why = "as a rule says"
        elif options.train_batch_norm_of(model, layer) == "as-source":
            why = "as the source's own graph does not train it"
        else:
            why = "as --train-batch-norm says"
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        count = f"{len(names)} batch norms stay" if len(names) > 1 else "1 batch norm stays"
        yield Note(f"{count} frozen in train, {why}: {_listed(names)}")


def _names(model: Model, sites: Collection[Site]) -> list[str]:
    layer_of = model.analysis(layers_of_sites)
    return list(dict.fromkeys(layer_of[s.graph, s.node].name for s in sites))


def _listed(names: Sequence[str]) -> str:
    """Return names as "a, b, c and 4 more"."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

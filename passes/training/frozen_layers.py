"""Batch norms that a source leaves frozen: it trains neither them nor their gamma and beta."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.roles import BETA, GAMMA, MEAN
from passes.entries.serving import entries_of_root
from passes.entries.training import computed
from passes.quantization.controls import increment
from rewriter import protos
from rewriter.expr import Apply
from rewriter.ir import MAIN, Model

INFERENCE = "in the source's training function"
MARKED = "the source marks gamma and beta as not trainable"

FROZEN = "_bnqat_frozen"
"""Attribute of the op that counts steps: the keys of the moving means that its training function leaves alone."""


def frozen_means(model: Model) -> frozenset[str]:
    """Return the keys of the moving means that a rewritten model's training functions leave frozen on purpose."""
    marks = [n.attrs[FROZEN] for graph in model.graphs.values() for n in graph.nodes.values() if FROZEN in n.attrs]
    return frozenset(key for mark in marks for key in json.loads(mark.s))


def moving_means(model: Model, names: Collection[str]) -> frozenset[str]:
    """Return the keys of the moving means of batch norms, which are given by name."""
    norms = model.analysis(batch_norms)
    return frozenset(bn.variables[MEAN] for bn in norms if bn.name in names and MEAN in bn.variables)


def step_counter(model: Model, frozen_names: Collection[str]) -> Apply:
    """Return the op that counts one step of a training function, which leaves these batch norms frozen."""
    means = sorted(moving_means(model, frozen_names))
    count = increment(model)
    return replace(count, attrs={**count.attrs, FROZEN: protos.attr(json.dumps(means))}) if means else count


def frozen_layers(model: Model) -> Mapping[str, str]:
    """Return the batch norms that the source leaves frozen, by name, with the words for its sign of that.

    A batch norm that some function or the main graph trains is not frozen. Any other is frozen if a function trains
    others and runs this one in inference mode, or if none of its gamma and beta is trainable. A variable is not
    trainable by its own mark, or because the model lists it among its variables and not among its trainable ones, as
    Keras does. If nothing in a model is trainable, the marks say nothing: a graph may be saved without collections.
    """
    norms = model.analysis(batch_norms)
    never_trained = {bn.name: bn for bn in norms if not any(s.training for s in bn.sites)}
    beside_trained = _beside_trained(model)
    marked = any(v.trainable and not v.frozen for v in model.variables.values())
    return {
        name: INFERENCE if name in beside_trained else MARKED
        for name, bn in never_trained.items()
        if name in beside_trained or (marked and _marked(model, bn))
    }


def _beside_trained(model: Model) -> frozenset[str]:
    """Return the batch norms that run in functions of the root, or signatures, which train others."""
    signed = (s.entry for s in model.signatures.values() if s.entry)
    functions = dict.fromkeys([*(e.function for e in entries_of_root(model)), *signed])
    training = [f for f in functions if f != MAIN and computed(model, f, training=True)]
    return frozenset().union(*(computed(model, f) for f in training))


def _marked(model: Model, bn: BatchNorm) -> bool:
    """Return true if a batch norm has a gamma or beta, and none that is trainable."""
    parameters = [model.variables[key] for role, key in bn.variables.items() if role in (GAMMA, BETA)]
    return bool(parameters) and not any(v.trainable and not v.frozen for v in parameters)

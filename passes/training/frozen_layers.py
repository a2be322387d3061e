"""Batch norms that a source says are frozen: it neither trains them nor their gamma and beta."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.entries import computed, entries_of_root
from passes.quantization.controls import increment
from passes.roles import BETA, GAMMA, MEAN
from rewriter import protos
from rewriter.expr import Apply
from rewriter.ir import MAIN, Model

INFERENCE = "in the source's training function"
MARKED = "the source marks gamma and beta as not trainable"

FROZEN = "_bnqat_frozen"
"""Attribute of the op that counts steps: the keys of the moving means that its training function leaves alone."""


def frozen_means(model: Model) -> frozenset[str]:
    """The keys of the moving means that the training functions of a rewritten model leave frozen on purpose."""
    marks = [n.attrs[FROZEN] for graph in model.graphs.values() for n in graph.nodes.values() if FROZEN in n.attrs]
    return frozenset(key for mark in marks for key in json.loads(mark.s))


def moving_means(model: Model, names: Collection[str]) -> frozenset[str]:
    """The keys of the moving means of batch norms, which are given by name."""
    found = model.analysis(batch_norms)
    return frozenset(bn.variables[MEAN] for bn in found if bn.name in names and MEAN in bn.variables)


def counted(model: Model, left: Collection[str]) -> Apply:
    """The op that counts one step of a training function, which leaves these batch norms frozen."""
    means = sorted(moving_means(model, left))
    count = increment(model)
    return replace(count, attrs={**count.attrs, FROZEN: protos.attr(json.dumps(means))}) if means else count


def frozen_layers(model: Model) -> Mapping[str, str]:
    """The batch norms that the source leaves frozen, by name, and how it says so.

    A batch norm that some function or the main graph trains is not frozen. Another one is, if a function trains others
    and runs this one in inference mode, or if none of its gamma and beta is trainable: by its own mark, or because
    the model lists it among its variables and not among its trainable ones, as Keras does. In a model in which nothing
    is trainable the marks say nothing, as in a graph that was saved without its collections.
    """
    found = model.analysis(batch_norms)
    never = {bn.name: bn for bn in found if not any(s.training for s in bn.sites)}
    beside = _beside_trained(model)
    marked = any(v.trainable and not v.frozen for v in model.variables.values())
    return {
        name: INFERENCE if name in beside else MARKED
        for name, bn in never.items()
        if name in beside or (marked and _marked(model, bn))
    }


def _beside_trained(model: Model) -> frozenset[str]:
    """The batch norms that run in functions of the root, or signatures, which train others."""
    signed = (s.entry for s in model.signatures.values() if s.entry)
    functions = dict.fromkeys([*(e.function for e in entries_of_root(model)), *signed])
    training = [f for f in functions if f != MAIN and computed(model, f, training=True)]
    return frozenset().union(*(computed(model, f) for f in training))


def _marked(model: Model, bn: BatchNorm) -> bool:
    """Return whether it has a gamma or beta, and none that is trainable."""
    held = [model.variables[key] for role, key in bn.variables.items() if role in (GAMMA, BETA)]
    return bool(held) and not any(v.trainable and not v.frozen for v in held)

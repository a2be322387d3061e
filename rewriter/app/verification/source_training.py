"""The source's own training function, beside the one that a rewrite made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from passes.batch_norm.entries import Alignment, align, computed, serving_entry, training_trace
from passes.training.frozen_layers import frozen_means, moving_means
from rewriter.app.arrays import Arrays
from rewriter.app.verification.functions import Trainer, held, keyworded
from rewriter.app.verification.running import last_bits, loaded_source
from rewriter.app.verification.serving import PERTURBATIONS, Pair, differences
from rewriter.ir import Entry, Error, Model


@dataclass(frozen=True)
class Differences:
    """One call of the source's own training function, and of the result's with quantisers off, from the same values.

    Each is relative to the largest element, of an output, or of what a variable of this key changes by.

    Attributes:
        outputs: how many of the keys are outputs; these come first.
        found: how far the result is from the source.
        rerun: how far the source is from itself when it runs again.
        perturbed: the same with other last bits in its inputs and variables.
    """

    outputs: int
    found: Mapping[str, float]
    rerun: Mapping[str, float]
    perturbed: Mapping[str, float]


@dataclass(frozen=True)
class Steps:
    """A training function of a loaded model, run from values that are given.

    Attributes:
        variables: the variables that it starts from, by checkpoint key.
        outputs: the positions of the outputs that are looked at.
    """

    function: Trainer
    variables: Mapping[str, Any]
    outputs: tuple[int, ...]

    def run(self, values: Arrays, fed: Arrays) -> dict[str, np.ndarray]:
        """The outputs, and what each variable is changed by."""
        for key, value in values.items():
            self.variables[key].assign(value)
        flat = tf.nest.flatten(self.function.call(**fed))
        found = {f"output {i}": np.asarray(flat[position]) for i, position in enumerate(self.outputs)}
        return found | {key: v.numpy() - values[key] for key, v in self.variables.items()}


def own_training(pair: Pair) -> tuple[Entry, Alignment] | None:
    """The source's own training function, and how its inputs and outputs are those of serving.

    None where there is none, or where the result trains other batch norms than it, as an option of the rewrite said.
    """
    serving = serving_function(pair.source)
    trace = None if serving is None else training_trace(pair.source, serving)
    order = None if trace is None or serving is None else align(pair.source, trace, serving)
    if trace is None or serving is None or order is None:
        return None
    left = computed(pair.source, serving.function) - computed(pair.source, trace.function, training=True)
    same = moving_means(pair.source, left) == frozen_means(pair.result)
    return (trace, order) if same else None


def serving_function(source: Model) -> Entry | None:
    """The function that serves; None where there is none."""
    try:
        return serving_entry(source) if source.object_based else None
    except Error:
        return None


class LoadedTrainer(NamedTuple):
    """A loaded model, and its training function."""

    root: Any
    function: Trainer


@contextmanager
def loaded_trainer(path: Path, entry: Entry) -> Iterator[LoadedTrainer]:
    """The source, loaded, and a concrete function of it."""
    with loaded_source(path) as root:
        yield LoadedTrainer(root, keyworded(_concrete(path, root, entry)))


def compared(source: Steps, result: Steps, fed: Arrays, given: Arrays) -> Differences:
    """The differences between one step of the source, on `fed`, and one of the result, on the same as it takes it."""
    values = {key: v.numpy() for key, v in result.variables.items()}
    wanted = source.run(values, fed)
    found = differences(wanted, result.run(values, given))
    rerun = differences(wanted, source.run(values, fed))
    perturbed = dict.fromkeys(wanted, 0.0)
    for seed in range(PERTURBATIONS):
        others = source.run(last_bits(values, seed), {**fed, **last_bits(fed, seed)})
        perturbed = {key: max(perturbed[key], share) for key, share in differences(wanted, others).items()}
    return Differences(len(source.outputs), found, rerun, perturbed)


def common_variables(pair: Pair, source: Any, result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The float variables that both loaded models have, by key.

    Raises:
        Error: plain loading does not give one of them.
    """
    known = [v for key, v in pair.source.variables.items() if key in pair.result.variables]
    keys = [v.key for v in known if tf.as_dtype(v.dtype).is_floating]
    return {key: held(source, key) for key in keys}, {key: held(result, key) for key in keys}


def _concrete(path: Path, root: Any, entry: Entry) -> Any:
    """A concrete function of the loaded root; loading renames it."""
    attribute = next((p for p in entry.paths if "." not in p), None)
    if attribute is None:
        return root.signatures[entry.paths[0].partition(".")[2]]
    held = getattr(root, attribute)
    for meta in parse_saved_model(str(path)).meta_graphs:
        nodes = meta.object_graph_def.nodes
        for child in nodes[0].children if nodes else ():
            names = list(nodes[child.node_id].function.concrete_functions)
            if child.local_name == attribute and entry.function in names:
                return held.concrete_functions[names.index(entry.function)]
    return held

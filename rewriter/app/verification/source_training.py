"""Comparison of the source's own training function with the one that a rewrite made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from passes.entries.alignment import Alignment, align
from passes.entries.serving import serving_entry
from passes.entries.training import computed, training_trace
from passes.training.frozen_layers import frozen_means, moving_means
from rewriter.app.arrays import Arrays
from rewriter.app.verification.functions import Trainer, keyworded, variable_at
from rewriter.app.verification.running import last_bits, loaded_source
from rewriter.app.verification.serving import PERTURBATIONS, Pair, differences
from rewriter.ir import Entry, Error, Model


@dataclass(frozen=True)
class Differences:
    """Differences between one call of the source's own training function and one of the result's, quantisers off.

    Both start from the same values. A key is an output, or the key of a variable, whose change is compared. Each
    difference is relative to the largest element.

    Attributes:
        outputs: the number of keys that are outputs; these come first.
        found: the differences of the result from the source.
        rerun: the differences of the source from itself when it runs again.
        perturbed: the differences of the source from itself with other last bits in its inputs and variables.
    """

    outputs: int
    found: Mapping[str, float]
    rerun: Mapping[str, float]
    perturbed: Mapping[str, float]


@dataclass(frozen=True)
class Steps:
    """A training function of a loaded model, run from given values.

    Attributes:
        variables: the variables that it starts from, by checkpoint key.
        outputs: the positions of the outputs that are looked at.
    """

    function: Trainer
    variables: Mapping[str, Any]
    outputs: tuple[int, ...]

    def run(self, values: Arrays, fed: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs, and the change of each variable, after one call."""
        for key, value in values.items():
            self.variables[key].assign(value)
        flat = tf.nest.flatten(self.function.call(**fed))
        outputs = {f"output {i}": np.asarray(flat[position]) for i, position in enumerate(self.outputs)}
        return outputs | {key: v.numpy() - values[key] for key, v in self.variables.items()}


def own_training(pair: Pair) -> tuple[Entry, Alignment] | None:
    """Return the source's own training function, and the alignment of its inputs and outputs with those of serving.

    None if there is none, or if the result trains other batch norms than it because of an option of the rewrite.
    """
    serving = serving_function(pair.source)
    trace = None if serving is None else training_trace(pair.source, serving)
    alignment = None if trace is None or serving is None else align(pair.source, trace, serving)
    if trace is None or serving is None or alignment is None:
        return None
    frozen = computed(pair.source, serving.function) - computed(pair.source, trace.function, training=True)
    same_frozen = moving_means(pair.source, frozen) == frozen_means(pair.result)
    return (trace, alignment) if same_frozen else None


def serving_function(source: Model) -> Entry | None:
    """Return the function that serves; None if there is none."""
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
    """Load the source, and return it with a concrete function of it."""
    with loaded_source(path) as root:
        yield LoadedTrainer(root, keyworded(_concrete(path, root, entry)))


def compared(source: Steps, result: Steps, fed: Arrays, result_fed: Arrays) -> Differences:
    """Compare a step of the source on `fed` with one of the result on `result_fed`, the same inputs by its names."""
    values = {key: v.numpy() for key, v in result.variables.items()}
    expected = source.run(values, fed)
    result_differences = differences(expected, result.run(values, result_fed))
    rerun = differences(expected, source.run(values, fed))
    perturbed = dict.fromkeys(expected, 0.0)
    for seed in range(PERTURBATIONS):
        perturbed_outputs = source.run(last_bits(values, seed), {**fed, **last_bits(fed, seed)})
        perturbed = {key: max(perturbed[key], share) for key, share in differences(expected, perturbed_outputs).items()}
    return Differences(len(source.outputs), result_differences, rerun, perturbed)


def common_variables(pair: Pair, source: Any, result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the float variables that both models have, by key, from each loaded model.

    Raises:
        Error: plain loading leaves one of them out.
    """
    shared = [v for key, v in pair.source.variables.items() if key in pair.result.variables]
    keys = [v.key for v in shared if tf.as_dtype(v.dtype).is_floating]
    return {key: variable_at(source, key) for key in keys}, {key: variable_at(result, key) for key in keys}


def _concrete(path: Path, root: Any, entry: Entry) -> Any:
    """Return the loaded concrete function of an entry, by position in the proto, as loading renames it."""
    attribute = next((p for p in entry.paths if "." not in p), None)
    if attribute is None:
        return root.signatures[entry.paths[0].partition(".")[2]]
    function = getattr(root, attribute)
    for meta in parse_saved_model(str(path)).meta_graphs:
        nodes = meta.object_graph_def.nodes
        for child in nodes[0].children if nodes else ():
            names = list(nodes[child.node_id].function.concrete_functions)
            if child.local_name == attribute and entry.function in names:
                return function.concrete_functions[names.index(entry.function)]
    return function

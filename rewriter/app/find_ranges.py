"""``bnqat.find_ranges``: the ranges with the least squared error, for weights as they are now."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.deploy.quantized_values import table_of, tagged
from passes.quantization.device_schemes import on_device
from passes.quantization.least_error import by_channel, least_error_limits
from passes.quantization.quantizer_marks import channel_axes, tag_of
from passes.quantization.ranges import Mse
from passes.quantization.roles import MIN_BITS
from passes.quantization.schemes import SCHEMES
from rewriter.app.loaded import assign_replicas, variables_by_key
from rewriter.evaluation import evaluated
from rewriter.ir import Error, Model
from rewriter.savedmodel.read import load
from rewriter.terms import Term, Terms


class _Place(NamedTuple):
    """A layer of a role whose range is searched: its quantiser's metadata, and its values; several share a function."""

    tag: Mapping[str, Any]
    values: tuple[Term, ...]


def find_ranges(model: Any) -> int:
    """Set the ranges of `mse` of a loaded model to those with the least squared error for its weights as they are.

    Each weight's range is searched for the width in force, or for the narrowest one where that is 0. Only the variables
    `quantization/range/<role>` change, on every replica. Weights are read from the first.

    Args:
        model: a rewritten model as `tf.saved_model.load` returned it, or the `model` of a `bnqat.KerasLayer`.

    Returns:
        the number of ranges that were set.

    Raises:
        Error: the model has no such range.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder)
        saved = load(Path(folder))
        held: dict[str, Any] = {}
        for concrete in model.quantization.train.concrete_functions if hasattr(model, "quantization") else ():
            held |= variables_by_key(concrete, saved.entries[concrete.name.decode()])
        ranges = {saved.variables[key].name: key for key in held}
        roles = _places(saved)
        if not roles:
            raise Error("no weight has a range of the least squared error; rewrite with --range weight=mse")
        limits = {role: _limits(saved, role, places) for role, places in roles.items()}
    for role, found in limits.items():
        assign_replicas(held[ranges[f"quantization/range/{role}"]], found)
    return sum(map(len, limits.values()))


def _places(model: Model) -> dict[str, dict[int, _Place]]:
    """Return the layers whose ranges are searched, by role and number."""
    places: dict[str, dict[int, _Place]] = {}
    terms = Terms(model)
    for graph, name in tagged(model):
        node = model.graphs[graph].nodes[name]
        tag = tag_of(node)
        if tag["range"] == Mse.name and tag["layer"] not in places.setdefault(tag["role"], {}):
            ways = terms.ways(graph, [node.inputs[-1]])
            rows = [terms.on(graph, node.inputs[-1], way) for way in ways]
            values = dict.fromkeys(table_of(term) or term for term in rows)
            if any(table_of(term) for term in rows) and tag["axis"] is not None:
                tag = {**tag, "axis": -2}  # the rows of the whole table
            places[tag["role"]][tag["layer"]] = _Place(tag, tuple(values))
    return {role: dict(sorted(of_role.items())) for role, of_role in places.items() if of_role}


def _limits(model: Model, role: str, places: Mapping[int, _Place]) -> np.ndarray:
    """Return the limits of a role's layers, one after the other, as the variable holds them: float32 [ranges, 2]."""
    by_name = {v.name: key for key, v in model.variables.items()}
    of_role, of_layers = (model.value_of(by_name[f"quantization/{name}/{role}"]) for name in ("bits", "layer_bits"))
    found = []
    for layer, (tag, values) in places.items():
        bits = int(of_layers[layer]) if of_layers[layer] >= 0 else int(of_role)
        scheme = SCHEMES[tag["scheme"]](range=Mse(), narrow_range=tag["narrow_range"])
        axes = channel_axes(tag)
        members = [by_channel(np.asarray(v, np.float32), axes) for v in evaluated(model, values, {}, trust=False)]
        rows = members[0] if axes else np.concatenate(members, 1)
        found.append(least_error_limits(on_device(replace(scheme, bits=max(bits, MIN_BITS))), rows))
    return np.concatenate(found)

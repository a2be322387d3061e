"""Gradients of variables that are no batch norm's: those that one reaches, in the result and in the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.batch_norm.roles import ROLES
from passes.deploy.quantized_values import tagged
from passes.quantization.quantizer_marks import tag_of
from rewriter.app.verification.functions import Trainer, gradients, keyworded
from rewriter.app.verification.running import OFF, attempt, loaded_source, on_random
from rewriter.app.verification.serving import CONTROLS, START, Pair
from rewriter.ir import Model


class Reached(NamedTuple):
    """Trainable variables that are no batch norm's, and the gradients of a call with quantisers on.

    Attributes:
        quantized: the numbers of those that hold quantised values and that a finite gradient reaches, by role.
        others: the number of the others that one reaches.
        lost: sentences on those that one should reach, and does not.
        never: the names of those with quantised values that no gradient reaches, in the source either.
    """

    quantized: Mapping[str, int] = {}
    others: int = 0
    lost: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def other_variables(pair: Pair, function: Trainer, parameters: Sequence[Any]) -> list[Any]:
    """Return the trainable variables beside gammas and betas; none if only batch norms are quantised."""
    known = {id(v) for v in parameters}
    trainable = [v for v in function.variables if v.trainable and id(v) not in known and v.dtype.is_floating]
    return [v for v in trainable if not v.name.startswith(CONTROLS)] if _roles(pair.result) else []


def reached(
    pair: Pair, function: Trainer, variables: Sequence[Any], found: Sequence[Any], fed: dict[str, np.ndarray]
) -> Reached:
    """Return which variables gradients reach.

    Args:
        pair: the source and the result.
        function: the result's training function, with quantisers on.
        variables: the variables.
        found: their gradients.
        fed: the inputs.
    """
    role_of = _roles(pair.result)
    missing = [v for v, g in zip(variables, found, strict=True) if not (reaches(g) and finite(g))]
    infinite = {_name(v) for v, g in zip(variables, found, strict=True) if reaches(g) and not finite(g)}
    quantized = Counter(role_of.get(_name(v), "") for v in variables) - Counter(
        role_of.get(_name(v), "") for v in missing
    )
    off = _reached_with_quantizers_off(function, missing, fed)
    never = {_name(v) for v in missing} & role_of.keys() - off
    in_source = _reached_in_source(pair, never) if never else set()
    where = dict.fromkeys(in_source, "in the source") | dict.fromkeys(off, "with quantisers off")
    lost = [
        f"{'not finite' if _name(v) in infinite else 'none'} for {v.name}, which has a finite one {where[_name(v)]}"
        for v in missing
        if _name(v) in where
    ]
    others = quantized.pop("", 0)
    return Reached(dict(quantized), others, tuple(lost), tuple(sorted(never - in_source)))


def _roles(model: Model) -> dict[str, str]:
    """Return the roles of quantised values that are no batch norm's, by the names of their layers."""
    tags = [tag_of(model.graphs[graph].nodes[node]) for graph, node in tagged(model)]
    # A layer bears the name of its variable.
    return {name: t["role"] for t in tags if t["role"] not in ROLES for name in t["layer_name"].split("+")}


def _name(variable: Any) -> str:
    return str(variable.name).removesuffix(":0")


def _reached_with_quantizers_off(function: Trainer, variables: Sequence[Any], fed: dict[str, np.ndarray]) -> set[str]:
    """Return the names of those variables that a finite gradient reaches with quantisers off."""
    starts = [v for v in function.variables if v.name.startswith(START)]
    if not variables or not starts:
        return set()
    for start in starts:
        start.assign(OFF)
    found = gradients(function, list(variables), fed) or [None] * len(variables)
    for start in starts:
        start.assign(0)
    return {_name(v) for v, g in zip(variables, found, strict=True) if reaches(g) and finite(g)}


def _reached_in_source(pair: Pair, names: Collection[str]) -> set[str]:
    """Return the names of those variables that a finite gradient reaches in one of the source's signatures."""

    def reached_names() -> set[str]:
        found: set[str] = set()
        with loaded_source(pair.before) as root:
            for function in map(keyworded, root.signatures.values()):
                variables = [v for v in function.variables if _name(v) in names]
                given, _ = on_random(partial(gradients, function, variables), function.specs)
                pairs = zip(variables, given or (), strict=False)
                found |= {_name(v) for v, gradient in pairs if reaches(gradient) and finite(gradient)}
        return found

    return attempt(reached_names)[0] or set()


def finite(gradient: Any) -> bool:
    """Return true if a gradient is finite everywhere."""
    return bool(np.isfinite(tf.convert_to_tensor(gradient).numpy()).all())


def reaches(gradient: Any) -> bool:
    """Return true if a gradient exists and is not zero everywhere."""
    return gradient is not None and bool(tf.convert_to_tensor(gradient).numpy().any())

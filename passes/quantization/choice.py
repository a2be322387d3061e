"""A layer's quantisers: those of the roles, changed by the rules that match the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import regex

from passes.quantization.custom import CustomQuantizer, Quantizer
from passes.quantization.points import Member, QuantizedLayer
from passes.quantization.schemes import Affine, Scheme, altered
from rewriter.ir import Error, Model

Options = Mapping[str, Any]
"""Options of a quantiser: scheme, bits, range, rounding, narrow_range; or "quantizer", a `CustomQuantizer`."""

PATIENCE = 2.0
"""The seconds that a regular expression may take for a name, as some take exponential time."""


@dataclass(frozen=True)
class LayerFilter:
    """Some layers, by name.

    Attributes:
        match: a regular expression, searched in the layer's name and in those of its variables.

    Raises:
        Error: `match` is no regular expression.
    """

    match: str

    def __post_init__(self) -> None:
        try:
            regex.compile(self.match)
        except regex.error as e:
            raise Error(f"{self.match!r} is no regular expression: {e}") from e

    def matches(self, model: Model, member: Member) -> bool:
        """Return true if this is one of these layers.

        Raises:
            Error: the search in a name takes too long.
        """
        names = (member.name, *(model.variables[key].name for key in member.variables.values()))
        try:
            return any(regex.search(self.match, name, timeout=PATIENCE) for name in names)
        except TimeoutError:
            raise Error(
                f"to search {self.match!r} in {member.name} takes longer than {PATIENCE} s; write it simpler"
            ) from None


@dataclass(frozen=True)
class Rule(LayerFilter):
    """Changed options of quantisers for some layers.

    Attributes:
        options: by role, the options that differ from the role's; None removes the quantiser.
    """

    options: Mapping[str, Options | None] = field(default_factory=dict)

    def applied(self, role: str, quantizer: Quantizer | None) -> Quantizer | None:
        """Return the quantiser that the rule makes of another."""
        options = dict(self.options.get(role) or {})
        if role not in self.options or (quantizer is None and not {"scheme", "quantizer"} & set(options)):
            return quantizer
        if self.options[role] is None:
            return None
        custom = options.pop("quantizer", None)
        if custom is None and isinstance(quantizer, CustomQuantizer) and "scheme" not in options:
            custom = quantizer
        if isinstance(custom, CustomQuantizer):
            return replace(custom, bits=options.get("bits", custom.bits))
        return altered(quantizer if isinstance(quantizer, Scheme) else Affine(), options)


def quantizer_for(
    model: Model, default: Quantizer | None, rules: Iterable[Rule], role: str, layer: QuantizedLayer
) -> Quantizer | None:
    """Return the quantiser of a role in a layer.

    Raises:
        Error: rules give different ones to layers that share a function.
    """
    quantizers: dict[str, Quantizer | None] = {}
    for member in layer.members:
        quantizer: Quantizer | None = default
        for rule in rules:
            if rule.matches(model, member):
                quantizer = rule.applied(role, quantizer)
        quantizers[member.name] = quantizer
    if len(set(quantizers.values())) > 1:
        raise Error(f"{', '.join(quantizers)} share a function, so rules must give them the same quantiser for {role}")
    return next(iter(quantizers.values()), default)


def unmatched(model: Model, rules: Iterable[LayerFilter], members: Sequence[Member]) -> LayerFilter | None:
    """Return the first rule that matches no layer at all, or None."""
    return next((rule for rule in rules if not any(rule.matches(model, member) for member in members)), None)

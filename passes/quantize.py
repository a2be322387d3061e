"""Quantisers on the values that providers point out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from passes import PROVIDERS, loaded
from passes.quantization.choice import Rule, quantizer_for, unmatched
from passes.quantization.controls import Schedule, has_quantizers
from passes.quantization.custom import Quantizer
from passes.quantization.insertion import Family, insertion, why_not
from passes.quantization.options import ScheduleOptions
from passes.quantization.points import Provider, QuantizationPoint
from passes.quantization.roles import Role
from passes.quantization.schemes import SCHEMES, Scheme
from rewriter.edit import Edit, Note, Skip
from rewriter.ir import Edge, Error, Model


def default_providers() -> tuple[Provider, ...]:
    """Return all providers of the registry, with their default options."""
    return tuple(loaded(name)() for name in PROVIDERS)


@dataclass(frozen=True)
class Quantize(ScheduleOptions):
    """Pass values through switchable quantisers: batch norms' variables and moving-average updates, by default.

    Quantisers act from the step on that `quantization.start_step` holds, in training and inference alike;
    before it, every value passes unchanged, bit for bit.

    Attributes:
        quantizers: the quantiser of each role by name, None leaves it float; a role that is not named has its own
            default.
        rules: other options for some layers; a later rule overrides an earlier one.
        providers: what is quantised.

    Raises:
        Error: an option is out of range, or there is no such role.
    """

    name: ClassVar[str] = "quantize"

    quantizers: Mapping[str, Quantizer | None] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    providers: tuple[Provider, ...] = field(default_factory=default_providers)

    def __post_init__(self) -> None:
        super().__post_init__()
        roles = [role.name for provider in self.providers for role in provider.roles]
        if len(set(roles)) < len(roles):
            raise Error(f"two providers have the role {max(roles, key=roles.count)}")
        unknown = {*self.quantizers, *(role for rule in self.rules for role in rule.options)}.difference(roles)
        if unknown:
            raise Error(f"{min(unknown)!r} is no role; there are {', '.join(roles)}")

    def edits(self, model: Model) -> Iterable[Edit]:
        """Yield quantisers for every value that can have its own; a `Skip` with the reason for the others.

        Raises:
            Error: options or rules do not fit the model, or it was rewritten when it had other layers.
        """
        # What nobody asks for is not looked for: to find all weights takes longer than to rewrite the batch norms.
        asked = [provider for provider in self.providers if any(map(self._may_quantize, provider.roles))]
        families = [self._family(model, provider) for provider in asked]
        self._refuse_unmatched(model, families)
        later: list[Edit] = []
        for provider, family in zip(asked, families, strict=True):
            for role in provider.roles:
                _refuse_unsuited(role, family.quantizers[role.name])
            for item in provider.points(model, family.quantizers):
                if isinstance(item, Skip):
                    yield item
                elif not isinstance(item, QuantizationPoint):
                    later.append(item)
                elif quantizer := family.quantizers[item.role][item.layer]:
                    reason = why_not(model, family.layers[item.layer], quantizer, item) or _no_range(family, item)
                    if reason:
                        yield Skip(item.edge.graph, item.edge.node, reason)
                    else:
                        family.points.append(item)
        yield from self._unused_roles(families)
        _refuse_twice(families)
        families = [family for family in families if family.points]
        if families and has_quantizers(model):
            # Its control variables have a row for each layer of that time, and running graphs read them by number.
            raise Error("the model is quantised already, but not all of it; rewrite the float model to quantise more")
        if families and not any(v.name == "quantization/step" for v in model.variables.values()):
            yield Note(
                "nothing counts steps, as there is no training function: a start step and a ramp wait for a program "
                "that assigns quantization.step, ema ranges stay as they are, and rounding is to nearest"
            )
        elif families:
            yield from self._rounded_to_nearest(families)
        if families:
            yield from insertion(model, families, Schedule(self.start_step, self.ramp_steps, self._bits))
            yield from later

    def _unused_roles(self, families: Iterable[Family]) -> Iterator[Note]:
        """Yield a note on each role that was asked for and that no value has."""
        used = {point.role for family in families for point in family.points}
        for name in self.named_roles:
            if name not in used:
                yield Note(f"no value of the role {name} was quantised: the model has none, or none that can be")

    def _rounded_to_nearest(self, families: Iterable[Family]) -> Iterator[Note]:
        """Yield a note on each role whose rounding was to be stochastic, if no function for training alone has it."""
        named, stochastic = self.named_roles, dict[str, list[bool]]()
        for family in families:
            for point in family.points:
                quantizer = family.quantizers[point.role][point.layer]
                if point.role in named and quantizer is not None and quantizer.rounding == "stochastic":
                    stochastic.setdefault(point.role, []).append(point.trained)
        for role, trained in stochastic.items():
            if not any(trained):
                yield Note(f"rounding of the role {role} is to nearest, as training shares these values with serving")

    @property
    def named_roles(self) -> list[str]:
        """The roles that are quantised only as an option or a rule says so."""
        named = (role for provider in self.providers for role in provider.roles if not role.always)
        defaults = {role.name: self._default(role) for role in named}
        return [
            name
            for name, default in defaults.items()
            if default is not None or any(rule.applied(name, default) is not None for rule in self.rules)
        ]

    def _default(self, role: Role) -> Quantizer | None:
        """Return the quantiser of a role where no rule changes it."""
        usual = SCHEMES[role.scheme]() if role.always else None
        return self.quantizers.get(role.name, usual)

    def _may_quantize(self, role: Role) -> bool:
        """Return true if a role has a quantiser somewhere, or is expected to have one, so that a reason is due."""
        named = self.quantizers.get(role.name) is not None
        return role.always or named or any(rule.options.get(role.name) for rule in self.rules)

    @property
    def _bits(self) -> dict[str, int]:
        """The width of each role; 0 where it has no quantiser."""
        defaults = {role.name: self._default(role) for provider in self.providers for role in provider.roles}
        return {name: 0 if quantizer is None else quantizer.bits for name, quantizer in defaults.items()}

    def _family(self, model: Model, provider: Provider) -> Family:
        """Return a provider's layers with their quantisers, and no points yet."""
        layers = provider.layers(model)
        quantizers = {
            role.name: [quantizer_for(model, self._default(role), self.rules, role.name, layer) for layer in layers]
            for role in provider.roles
        }
        return Family(layers, quantizers, frozenset(role.name for role in provider.roles if role.device))

    def _refuse_unmatched(self, model: Model, families: Iterable[Family]) -> None:
        """Refuse a rule that matches no layer.

        Raises:
            Error: there is such a rule.
        """
        members = [member for family in families for layer in family.layers for member in layer.members]
        rule = unmatched(model, self.rules, members) if members else None
        if rule is not None:
            raise Error(f"the rule {rule.match!r} matches no layer and no variable; there is {members[0].name}, say")


def _no_range(family: Family, point: QuantizationPoint) -> str:
    """Return the reason why a layer has no range to keep; empty if it has, or needs none."""
    try:
        family.keep_range(point.role, point.layer)
    except Error as e:
        return str(e)
    return ""


def _refuse_twice(families: Iterable[Family]) -> None:
    """Refuse two providers that quantise one use of a value.

    Raises:
        Error: there is such a use.
    """
    owners: dict[Edge, int] = {}
    for number, point in ((i, point) for i, family in enumerate(families) for point in family.points):
        if owners.setdefault(point.edge, number) != number:
            raise Error(
                f"two providers quantise input {point.edge.position} of {point.edge.node}; leave one of them out"
            )


def _refuse_unsuited(role: Role, quantizers: Iterable[Quantizer | None]) -> None:
    """Refuse a scheme or a range that makes no sense for a role.

    Raises:
        Error: a quantiser has one; the message says why it makes no sense.
    """
    for quantizer in quantizers:
        granularity = quantizer.granularity if isinstance(quantizer, Scheme) else None
        for option in () if quantizer is None else (quantizer.name, quantizer.range.name, granularity or ""):
            if option in role.unsuited:
                raise Error(f"{role.name}: {role.unsuited[option]}")

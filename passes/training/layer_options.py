"""Options of training functions for each layer: whether a batch norm trains, and with which momentum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from passes.batch_norm.batch_norms import DEFAULT_MOMENTUM, batch_norms
from passes.batch_norm.layers import Layer, layers, layers_of_sites
from passes.batch_norm.site import Site
from passes.quantization.choice import LayerFilter, unmatched
from passes.training.options import LayerOptions, MomentumValue, Trained
from rewriter.ir import Error, Model

MOMENTUM = "_bnqat_momentum"
"""Attribute of a site that training was derived for: the source of its momentum, "source", "given" or "assumed"."""

T = TypeVar("T")


class Momentum(NamedTuple):
    """A momentum, and who set it: the model's source, the user, or nobody, so that it is assumed."""

    value: float
    whose: Literal["source", "given", "assumed"]

    @property
    def weight(self) -> float:
        """The weight of the batch's statistics."""
        return 1 - self.value


@dataclass(frozen=True)
class TrainingRule(LayerFilter):
    """Training options for some layers; None stands for the option of all other layers.

    Raises:
        Error: an option is out of range.
    """

    momentum: MomentumValue | None = None
    train_batch_norm: Trained | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        options: dict[str, Any] = {"momentum": self.momentum, "train_batch_norm": self.train_batch_norm}
        LayerOptions(**{k: v for k, v in options.items() if v is not None})


@dataclass(frozen=True)
class TrainingOptions(LayerOptions):
    """Training options for all layers, and rules for some, of which the last that matches counts.

    Raises:
        Error: an option is out of range.
    """

    rules: tuple[TrainingRule, ...] = ()

    def refuse_unmatched(self, model: Model) -> None:
        """Refuse a rule that matches no layer.

        Raises:
            Error: there is such a rule.
        """
        all_layers = model.analysis(layers)
        rule = unmatched(model, self.rules, [bn for layer in all_layers for bn in layer.batch_norms])
        if rule is not None:
            known = f"there is {all_layers[0].name}, say" if all_layers else "there is no batch norm"
            raise Error(f"the rule {rule.match!r} matches no layer and no variable; {known}")

    def trains(self, model: Model, layer: Layer, source: bool) -> bool:
        """Return true if a layer is to train; `source` is true if the source trains it.

        Raises:
            Error: rules say different things of batch norms that share a function.
        """
        option = self.train_batch_norm_of(model, layer)
        return source if option == "as-source" else option == "all"

    def train_batch_norm_of(self, model: Model, layer: Layer) -> Trained:
        """Return the option `train_batch_norm` of a layer.

        Raises:
            Error: rules say different things of batch norms that share a function.
        """
        options = [(rule, rule.train_batch_norm) for rule in self.rules if rule.train_batch_norm is not None]
        return _last(model, layer, options, "train_batch_norm") or self.train_batch_norm

    def given_momentum(self, model: Model, layer: Layer) -> float | None:
        """Return the momentum that the user gives for a layer; None where none is given.

        Raises:
            Error: rules say different things of batch norms that share a function.
        """
        options = [(rule, rule.momentum) for rule in self.rules if rule.momentum is not None]
        by_rule = _last(model, layer, options, "momentum")
        return self.momentum if by_rule is None else by_rule

    def matching(self, model: Model, layer: Layer) -> list[TrainingRule]:
        """Return the rules that match a layer."""
        return [rule for rule in self.rules if any(rule.matches(model, bn) for bn in layer.batch_norms)]

    def momentum_of(self, model: Model, site: Site) -> Momentum:
        """Return the momentum with which a site's moving averages are derived.

        In this order: the momentum of the batch norm's own training sites; the given one; the one that the training
        sites of all other batch norms agree on; 0.99.

        Raises:
            Error: rules say different things of batch norms that share a function.
        """
        source_weights = weights(model, site)
        if source_weights:
            return Momentum(1 - source_weights[0], "source")
        momentum = self.given_momentum(model, model.analysis(layers_of_sites)[site.graph, site.node])
        if momentum is not None:
            return Momentum(momentum, "given")
        other_weights = {bn.weight for bn in model.analysis(batch_norms)} - {None}
        common = next((f for f in other_weights if f is not None and len(other_weights) == 1), 1 - DEFAULT_MOMENTUM)
        return Momentum(1 - common, "assumed")


def weights(model: Model, site: Site) -> list[float]:
    """Return the weights of a batch's statistics that the model's training sites give the batch norms of a site."""
    all_weights = [bn.weight for bn in model.analysis(batch_norms) if site in bn.sites]
    return list(dict.fromkeys(f for f in all_weights if f is not None))


def _last(model: Model, layer: Layer, options: Iterable[tuple[LayerFilter, T]], name: str) -> T | None:
    """Return the option of the last rule that matches a layer; None where none matches."""
    option_of: dict[str, T | None] = dict.fromkeys(bn.name for bn in layer.batch_norms)
    for rule, value in options:
        option_of |= {bn.name: value for bn in layer.batch_norms if rule.matches(model, bn)}
    if len(set(option_of.values())) > 1:
        raise Error(f"{', '.join(option_of)} share a function, so rules must give them the same {name}")
    return next(iter(option_of.values()))

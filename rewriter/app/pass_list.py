"""The passes of a rewrite, in their order, made from its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from passes import PASSES, PROVIDERS, REWRITE, SWITCHED, loaded, roles
from passes.options import PassOptions, options_of
from passes.quantization.choice import Rule
from passes.quantization.custom import CustomQuantizer, Quantizer
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Mse, Range
from passes.quantization.schemes import Affine
from passes.quantize import Quantize
from passes.training.layer_options import TrainingRule
from rewriter.app.names import OPTIONS_OF
from rewriter.app.settings import Defaults, RuleOptions, Settings
from rewriter.app.trace import import_function, title, trace
from rewriter.ir import Error
from rewriter.pipeline import Pass, load_pass


def pass_list(options: Settings, names: Sequence[Pass | str] | None = None) -> list[Pass]:
    """Return the passes to run, with their options: those that are named, or the default ones.

    Raises:
        Error: there is no pass of a name, or options do not go together.
    """
    pass_names = [name for name in names or () if isinstance(name, str)]
    only_named = bool(pass_names) and len(pass_names) == len(names or ())
    for option in sorted(options.model_fields_set & OPTIONS_OF.keys()) if only_named else ():
        owners = OPTIONS_OF[option]
        if not set(owners) & set(pass_names) and not _is_empty(options, option):
            raise Error(f"{option} is an option of {owners[0]}, which is not among the passes that are named")
    left_out = {name for option, switched in SWITCHED.items() if not getattr(options, option) for name in switched}
    default_names = [name for name in REWRITE if name not in left_out]
    return [_by_name(p, options) if isinstance(p, str) else p for p in (default_names if names is None else names)]


def _is_empty(options: Settings, option: str) -> bool:
    """Return true if an option is an empty table or list of rules."""
    value = getattr(options, option)
    return bool(value == Defaults() or value == ())


def _by_name(name: str, options: Settings) -> Pass:
    """Return a pass of bnqat with its options, or a user's own pass by ``module:Class``."""
    if name not in PASSES:
        if ":" not in name:
            raise Error(f"there is no pass {name!r}; there are {', '.join(PASSES)}, and your own as module:Class")
        return load_pass(name)
    from_tables = FROM_TABLES[name](options) if name in FROM_TABLES else {}
    return load_pass(PASSES[name], **_own_options(loaded(PASSES[name]), options), **from_tables)


def _own_options(of: type[Any], options: Settings) -> dict[str, Any]:
    """Return the options that a pass, or a provider of quantisation points, inherits."""
    own = options_of(of) if issubclass(of, PassOptions) else ()
    return {option.name: getattr(options, option.name) for option in own}


def _training(options: Settings) -> dict[str, Any]:
    rules = [TrainingRule(r.match, r.momentum, r.train_batch_norm) for r in options.rules]
    return {
        # A rule of quantisers alone may be for layers that hold no batch norm.
        "rules": tuple(rule for rule in rules if (rule.momentum, rule.train_batch_norm) != (None, None)),
        "beyond_batch_norm": bool(Quantize(**_quantizers(options)).named_roles),
    }


def _quantizers(options: Settings) -> dict[str, Any]:
    rules = (
        Rule(r.match, {role: _changes(_rule_options_of(options, r, role)) for role in options.quantized})
        for r in options.rules
    )
    providers = (loaded(name) for name in PROVIDERS)
    return {
        "quantizers": {role: quantizer_of(options.quantizer(role), role) for role in options.quantized},
        "rules": tuple(rules),
        "providers": tuple(provider(**_own_options(provider, options)) for provider in providers),
    }


FROM_TABLES: Mapping[str, Callable[[Settings], dict[str, Any]]] = {
    "derive-training": _training,
    "quantize": _quantizers,
}
"""Further arguments of passes' constructors, from the configuration's tables `defaults` and `rules`."""


def quantizer_of(options: Mapping[str, Any], role: str) -> Quantizer | None:
    """Return a quantiser from all of its options; None if they leave the values float."""
    changes = _changes(options)
    return Rule("", {role: changes}).applied(role, Affine())


def _rule_options_of(options: Settings, rule: RuleOptions, role: str) -> Mapping[str, Any]:
    """Return a rule's options for a role; if it gives only a range or its momentum, the other is the default's."""
    rule_options = rule.of(role)
    if role in rule.tables and not roles()[role].always and role not in options.defaults.tables:
        rule_options = {"scheme": roles()[role].scheme, **rule_options}  # it is named here for the first time
    default_range = {k: v for k, v in options.quantizer(role).items() if k in ("range", "range_momentum")}
    return {**default_range, **rule_options} if {"range", "range_momentum"} & set(rule_options) else rule_options


def _changes(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return options as `Rule` takes them, with objects in place of names; None for the scheme "none"."""
    if options.get("scheme") == "none":
        return None
    changes = {k: v for k, v in options.items() if k not in ("range", "range_momentum", "quantizer")}
    if "range" in options:
        changes["range"] = _range(options["range"], options.get("range_momentum"))
    custom = options.get("quantizer")
    if custom is not None:
        function = import_function(custom) if isinstance(custom, str) else custom
        changes["quantizer"] = CustomQuantizer(function, trace, custom if isinstance(custom, str) else title(function))
    return changes


def _range(option: str | Sequence[float], momentum: float | None) -> Range:
    match option:
        case "ema":
            return Ema() if momentum is None else Ema(momentum)
        case "dynamic":
            return DYNAMIC
        case "learned":
            return Learned()
        case "mse":
            return Mse()
        case [low, high]:
            return Fixed(float(low), float(high))
    raise AssertionError(option)

"""The passes of a rewrite, in their order, made from its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passes import PASSES, REWRITE, pass_class
from passes.batch_norm.choice import Rule
from passes.quantization.custom import CustomQuantizer, Quantizer
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Range
from passes.quantization.schemes import Affine
from passes.roles import ROLES
from passes.training.options import TrainingRule
from rewriter.app.names import OPTIONS_OF
from rewriter.app.settings import Defaults, RuleOptions, Settings
from rewriter.app.trace import named, title, trace
from rewriter.ir import Error
from rewriter.pipeline import Pass, load_pass

FUSING = ("split-modes", "select-to-branch", "merge-choices", "fuse-batch-norm", "choose-branch")
"""Passes that `fuse` is for."""


def pass_list(options: Settings, names: Sequence[Pass | str] | None = None) -> list[Pass]:
    """Return the passes to run, with their options: those that are named, or the default ones.

    Raises:
        Error: there is no pass of a name, or options do not go together.
    """
    given = [name for name in names or () if isinstance(name, str)]
    for option in sorted(options.model_fields_set - {"fuse"}) if given and len(given) == len(names or ()) else ():
        owners = OPTIONS_OF[option]
        if not set(owners) & set(given) and not _empty(options, option):
            raise Error(f"{option} is an option of {owners[0]}, which is not among the passes that are named")
    wanted = {"unfreeze-constants": options.unfreeze_constants, **dict.fromkeys(FUSING, options.fuse)}
    default = [name for name in REWRITE if wanted.get(name, True)]
    return [_by_name(p, options) if isinstance(p, str) else p for p in (default if names is None else names)]


def _empty(options: Settings, option: str) -> bool:
    """Return whether a table of quantisers says nothing."""
    value = getattr(options, option)
    return bool(value == Defaults() or value == ())


def _by_name(name: str, options: Settings) -> Pass:
    if name in PASSES:
        made: Pass = pass_class(name)(**_arguments(name, options))
        return made
    if ":" not in name:
        raise Error(f"there is no pass {name!r}; there are {', '.join(PASSES)}, and your own as module:Class")
    return load_pass(name)


def _arguments(name: str, options: Settings) -> dict[str, Any]:
    """The arguments of a pass's constructor."""
    match name:
        case "upgrade-references":
            return {"keep": options.keep_ref}
        case "derive-training":
            return {
                "momentum": options.momentum,
                "train_batch_norm": options.train_batch_norm,
                "rules": tuple(TrainingRule(r.match, r.momentum, r.train_batch_norm) for r in options.rules),
                "outputs": options.train_outputs,
            }
        case "freeze-statistics":
            return {"freeze_step": options.freeze_step}
        case "quantize-batch-norm":
            rules = (Rule(r.match, {role: _changes(_ruled(options, r, role)) for role in ROLES}) for r in options.rules)
            return {
                **{role: quantizer_of(options.quantizer(role), role) for role in ROLES},
                "rules": tuple(rules),
                "average": options.quantize_average,
                "start_step": options.start_step,
                "ramp_steps": options.ramp_steps,
            }
    return {}


def quantizer_of(options: Mapping[str, Any], role: str) -> Quantizer | None:
    """A quantiser from all of its options; None for none."""
    changes = _changes(options)
    return Rule("", {role: changes}).applied(role, Affine())


def _ruled(options: Settings, rule: RuleOptions, role: str) -> Mapping[str, Any]:
    """A rule's options for a role; of a range and its momentum, what it does not give is that of the defaults."""
    own = rule.of(role)
    usual = {k: v for k, v in options.quantizer(role).items() if k in ("range", "range_momentum")}
    return {**usual, **own} if {"range", "range_momentum"} & set(own) else own


def _changes(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Options as `Rule` takes them: objects in place of names; None where there is to be no quantiser."""
    if options.get("scheme") == "none":
        return None
    changes = {k: v for k, v in options.items() if k not in ("range", "range_momentum", "quantizer")}
    if "range" in options:
        changes["range"] = _range(options["range"], options.get("range_momentum"))
    own = options.get("quantizer")
    if own is not None:
        function = named(own) if isinstance(own, str) else own
        changes["quantizer"] = CustomQuantizer(function, trace, own if isinstance(own, str) else title(function))
    return changes


def _range(given: str | Sequence[float], momentum: float | None) -> Range:
    match given:
        case "ema":
            return Ema() if momentum is None else Ema(momentum)
        case "dynamic" | "learned":
            return DYNAMIC if given == "dynamic" else Learned()
        case [low, high]:
            return Fixed(float(low), float(high))
    raise AssertionError(given)

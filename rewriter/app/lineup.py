"""The passes of a rewrite, in their order, made from its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passes.batch_norm.choice import Rule
from passes.batch_norm.quantize_batch_norm import QuantizeBatchNorm
from passes.control_flow.inline_branches import InlineBranches
from passes.frontend.split_modes import SplitModes
from passes.frontend.unfreeze_constants import UnfreezeConstants
from passes.frontend.upgrade_references import UpgradeReferences
from passes.fusing.choose_branch import ChooseBranch
from passes.fusing.fuse_batch_norm import FuseBatchNorm
from passes.fusing.merge_choices import MergeChoices
from passes.fusing.select_to_branch import SelectToBranch
from passes.quantization.custom import Pipeline, Quantizer
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Range
from passes.quantization.schemes import Affine
from passes.roles import ROLES
from passes.training.aggregate_statistics import AggregateStatistics
from passes.training.check_averages import CheckAverages
from passes.training.cut_gradients import CutGradients
from passes.training.derive_training import DeriveTraining
from passes.training.freeze_statistics import FreezeStatistics
from passes.training.options import TrainingRule
from rewriter.app.names import OPTIONS_OF
from rewriter.app.settings import Defaults, Settings
from rewriter.app.settings import Rule as SettingsRule
from rewriter.app.trace import named, title, trace
from rewriter.ir import Error
from rewriter.pipeline import Pass, load_pass

FUSING = ("split-modes", "select-to-branch", "merge-choices", "fuse-batch-norm", "choose-branch")
"""Passes that `fuse` is for."""


def lineup(options: Settings, names: Sequence[Pass | str] | None = None) -> list[Pass]:
    """The passes to run: those that are named, or the default ones.

    Raises:
        Error: there is no pass of a name, or options do not go together.
    """
    known = passes_of(options)
    named = [name for name in names or () if isinstance(name, str)]
    for option in sorted(options.model_fields_set - {"fuse"}) if named and len(named) == len(names or ()) else ():
        owners = OPTIONS_OF[option]
        if not set(owners) & set(named) and not _empty(options, option):
            raise Error(f"{option} is an option of {owners[0]}, which is not among the passes that are named")
    wanted = {"unfreeze-constants": options.unfreeze_constants, **dict.fromkeys(FUSING, options.fuse)}
    default = [name for name in known if wanted.get(name, True)]
    return [_named(p, known) if isinstance(p, str) else p for p in (default if names is None else names)]


def _empty(options: Settings, option: str) -> bool:
    """Whether a table of quantisers says nothing."""
    value = getattr(options, option)
    return bool(value == Defaults() or value == ())


def passes_of(options: Settings) -> dict[str, Pass]:
    """All passes in their order, by name, with their options."""
    return {
        "upgrade-references": UpgradeReferences(keep=options.keep_ref),
        "unfreeze-constants": UnfreezeConstants(),
        "split-modes": SplitModes(),
        "select-to-branch": SelectToBranch(),
        "merge-choices": MergeChoices(),
        "fuse-batch-norm": FuseBatchNorm(),
        "choose-branch": ChooseBranch(),
        "derive-training": DeriveTraining(
            options.momentum,
            options.train_batch_norm,
            tuple(TrainingRule(r.match, r.momentum, r.train_batch_norm) for r in options.rules),
            options.train_outputs,
        ),
        "aggregate-statistics": AggregateStatistics(),
        "inline-branches": InlineBranches(),
        "cut-gradients": CutGradients(),
        "freeze-statistics": FreezeStatistics(options.freeze_step),
        "quantize-batch-norm": QuantizeBatchNorm(
            **{role: quantizer_of(options.quantizer(role), role) for role in ROLES},
            rules=tuple(
                Rule(r.match, {role: _changes(_ruled(options, r, role)) for role in ROLES}) for r in options.rules
            ),
            average=options.quantize_average,
            start_step=options.start_step,
            ramp_steps=options.ramp_steps,
        ),
        "check-averages": CheckAverages(),
    }


def quantizer_of(options: Mapping[str, Any], role: str) -> Quantizer | None:
    """A quantiser from all of its options; None for none."""
    changes = _changes(options)
    return Rule("", {role: changes}).applied(role, Affine())


def _ruled(options: Settings, rule: SettingsRule, role: str) -> Mapping[str, Any]:
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
        changes["quantizer"] = Pipeline(function, trace, own if isinstance(own, str) else title(function))
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


def _named(name: str, known: Mapping[str, Pass]) -> Pass:
    if name in known:
        return known[name]
    if ":" not in name:
        raise Error(f"there is no pass {name!r}; there are {', '.join(known)}, and your own as module:Class")
    return load_pass(name)

"""The registry: passes in their default orders, their options, and the providers of what is quantised.

A pass is one file with one class. `rewriter.pipeline.load_pass` imports the file when its pass is asked for: passes
import TensorFlow, and names are needed without it. So are options and roles: they are in light modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

from passes.batch_norm.options import AverageOptions
from passes.batch_norm.roles import QUANTIZED
from passes.frontend.options import ReferenceOptions
from passes.options import Flag, Help, PassOptions
from passes.quantization.options import ScheduleOptions
from passes.quantization.roles import Role
from passes.training.options import DeriveOptions, FreezeOptions
from passes.weights.roles import WEIGHT
from rewriter.ir import Error

REWRITE: Mapping[str, str] = {
    "upgrade-references": "passes.frontend.upgrade_references:UpgradeReferences",
    "unfreeze-constants": "passes.frontend.unfreeze_constants:UnfreezeConstants",
    "split-modes": "passes.frontend.split_modes:SplitModes",
    "select-to-branch": "passes.fusing.select_to_branch:SelectToBranch",
    "merge-choices": "passes.fusing.merge_choices:MergeChoices",
    "fuse-batch-norm": "passes.fusing.fuse_batch_norm:FuseBatchNorm",
    "choose-branch": "passes.fusing.choose_branch:ChooseBranch",
    "derive-training": "passes.training.derive_training:DeriveTraining",
    "aggregate-statistics": "passes.training.aggregate_statistics:AggregateStatistics",
    "inline-branches": "passes.control_flow.inline_branches:InlineBranches",
    "cut-gradients": "passes.training.cut_gradients:CutGradients",
    "freeze-statistics": "passes.training.freeze_statistics:FreezeStatistics",
    "quantize": "passes.quantize:Quantize",
    "check-averages": "passes.training.check_averages:CheckAverages",
}
"""The passes of `bnqat rewrite` by name, in their order, as ``module:Class``; `SWITCHED` says which are optional."""

FINALIZE: Mapping[str, str] = {
    "inline-decided-calls": "passes.deploy.inline_decided_calls:InlineDecidedCalls",
    "settle-choices": "passes.control_flow.settle_choices:SettleChoices",
    "keep-serving": "passes.deploy.keep_serving:KeepServing",
    "bake-quantizers": "passes.deploy.bake_quantizers:BakeQuantizers",
    "inline-calls": "passes.deploy.inline_calls:InlineCalls",
    "fold-batch-norm": "passes.deploy.fold_batch_norm:FoldBatchNorm",
}
"""Those of `bnqat finalize`, in their order. The first two run where a constant keeps serving from training, the
last two with `--fold`; `rewriter.app.finalize` decides, and repeats `inline-decided-calls` and `inline-calls`."""

PASSES: Mapping[str, str] = {**REWRITE, **FINALIZE}
"""All passes; `--passes` takes each of these names."""

PROVIDERS: dict[str, tuple[Role, ...]] = {
    "passes.batch_norm.points:BatchNormPoints": QUANTIZED,
    "passes.weights.points:WeightPoints": (WEIGHT,),
}
"""The providers of what `quantize` quantises, as ``module:Class``, and the roles of their values."""


GROUPS: Mapping[str, tuple[str, ...]] = {"batch_norm": tuple(role.name for role in QUANTIZED)}
"""Names that stand for several roles in options."""


def roles() -> dict[str, Role]:
    """Return the roles of all providers' values by name."""
    return {role.name: role for of_provider in PROVIDERS.values() for role in of_provider}


def loaded(name: str) -> Any:
    """Return what ``module:attribute`` names, after importing the module.

    Raises:
        Error: the module or the attribute is not found.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise Error(f"cannot load {name}: {e}") from e


@dataclass(frozen=True)
class OrderOptions(PassOptions):
    """Options that put passes into the default order, or leave them out."""

    unfreeze_constants: Annotated[
        Flag,
        Help("Make batch norms' parameters and weights that are constants variables again"),
    ] = False
    fuse: Annotated[
        Flag,
        Help("Use the fused kernel for batch norms that are in single ops, or computed in both modes"),
    ] = True


SWITCHED: Mapping[str, tuple[str, ...]] = {
    "unfreeze_constants": ("unfreeze-constants",),
    "fuse": ("split-modes", "select-to-branch", "merge-choices", "fuse-batch-norm", "choose-branch"),
}
"""The passes that are in the default order where these options are true."""

OPTIONS: Mapping[type[PassOptions], tuple[str, ...]] = {
    ScheduleOptions: ("quantize",),
    FreezeOptions: ("freeze-statistics",),
    DeriveOptions: ("derive-training",),
    AverageOptions: ("quantize",),
    OrderOptions: (),
    ReferenceOptions: ("upgrade-references",),
}
"""The options of a rewrite, in the order in which they are listed, and the passes that inherit them, or
whose providers do."""

"""The registry of passes, in their default orders, and of what they quantise. A pass is one file with one class.

`rewriter.pipeline.load_pass` imports a module when its pass is asked for: passes import TensorFlow, and names are
needed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from passes.batch_norm import roles as batch_norm
from passes.quantization.roles import Role

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
"""The passes of `bnqat rewrite` by name, in their default order, as ``module:Class``."""

FINALIZE: Mapping[str, str] = {
    "settle-choices": "passes.control_flow.settle_choices:SettleChoices",
    "keep-serving": "passes.deploy.keep_serving:KeepServing",
    "bake-quantizers": "passes.deploy.bake_quantizers:BakeQuantizers",
    "inline-calls": "passes.deploy.inline_calls:InlineCalls",
    "fold-batch-norm": "passes.deploy.fold_batch_norm:FoldBatchNorm",
}
"""Those of `bnqat finalize`; the first runs where nothing serves otherwise, the last two with `--fold`."""

PASSES: Mapping[str, str] = {**REWRITE, **FINALIZE}
"""All passes; `--passes` takes each of these names."""

PROVIDERS: dict[str, tuple[Role, ...]] = {"passes.batch_norm.points:BatchNormPoints": batch_norm.QUANTIZED}
"""The providers of what `quantize` quantises, as ``module:Class``, and the roles of their values."""


def roles() -> dict[str, Role]:
    """Return the roles of all providers' values by name."""
    return {role.name: role for of_provider in PROVIDERS.values() for role in of_provider}


def loaded(name: str) -> Any:
    """Return what ``module:attribute`` names, after importing the module."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)

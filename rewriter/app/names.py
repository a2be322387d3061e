"""Names of passes and of their options, which can be had without importing TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping

PASSES = (
    "upgrade-references",
    "unfreeze-constants",
    "split-modes",
    "select-to-branch",
    "merge-choices",
    "fuse-batch-norm",
    "choose-branch",
    "derive-training",
    "aggregate-statistics",
    "inline-branches",
    "cut-gradients",
    "freeze-statistics",
    "quantize-batch-norm",
    "check-averages",
)
"""By name; `rewriter.app.lineup` makes them, which takes TensorFlow."""

OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "bits",
            "scheme",
            "range",
            "rounding",
            "narrow_range",
            "quantizer",
            "quantize_average",
            "start_step",
            "ramp_steps",
            "defaults",
        ),
        ("quantize-batch-norm",),
    ),
    "rules": ("quantize-batch-norm", "derive-training"),
    "freeze_step": ("freeze-statistics",),
    **dict.fromkeys(("momentum", "train_batch_norm", "train_outputs"), ("derive-training",)),
    "keep_ref": ("upgrade-references",),
    "unfreeze_constants": ("unfreeze-constants",),
}
"""The passes that each option is for, of the command line or of a configuration file."""

PARAMETER_FILES = (".npz", ".json")
"""What the names of files with parameters end with."""

"""Names of the passes' options and of parameter files; importing this module does not import TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping

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
        ("quantize",),
    ),
    "rules": ("quantize", "derive-training"),
    "freeze_step": ("freeze-statistics",),
    **dict.fromkeys(("momentum", "train_batch_norm", "train_outputs"), ("derive-training",)),
    "keep_ref": ("upgrade-references",),
    "unfreeze_constants": ("unfreeze-constants",),
}
"""Passes that each option of the command line or of a configuration file belongs to."""

PARAMETER_FILES = (".npz", ".json")
"""Suffixes of parameter files."""

"""Names of the passes' options and of parameter files; importing this module does not import TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping

from passes import OPTIONS, SWITCHED, OrderOptions
from passes.options import options_of
from passes.quantization.options import QuantizerOptions

OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*(option.name for option in options_of(QuantizerOptions)), "defaults"), ("quantize",)),
    "rules": ("quantize", "derive-training"),
    **{option.name: owners for options, owners in OPTIONS.items() if owners for option in options_of(options)},
    **{option.name: SWITCHED[option.name] for option in options_of(OrderOptions) if not option.default},
}
"""Passes that each option of the command line or of a configuration file belongs to.

An option that only leaves passes out of the default order belongs to none.
"""

PARAMETER_FILES = (".npz", ".json")
"""Suffixes of parameter files."""

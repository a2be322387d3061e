"""All makers by name; each writes one SavedModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.models import MODELS
from tests.models.forms import FORM_MODELS
from tests.models.structures import STRUCTURES
from tests.models.v1 import V1_MODELS

ALL: dict[str, Callable[[Path], Path]] = {**MODELS, **V1_MODELS, **FORM_MODELS, **STRUCTURES}

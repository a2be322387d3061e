"""SavedModels with weights but without batch norm, each with what is expected of its weights.

They are not among `tests.models.all`: without options for weights, a rewrite finds nothing to do in them.
"""

from __future__ import annotations

from tests.models.weights.case import WeightModel
from tests.models.weights.graphs import GRAPHS
from tests.models.weights.keras_models import KERAS
from tests.models.weights.modules import MODULES

WEIGHT_MODELS: dict[str, WeightModel] = {**MODULES, **KERAS, **GRAPHS}
"""Models by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import bnqat
from passes.deploy.bake_quantizers import BakeQuantizers
from passes.deploy.keep_serving import KeepServing
from passes.quantization.quantizer_marks import TAG
from rewriter.ir import Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.passes.layered import Layered, computing, saved, serving


def marked(model: Model) -> int:
    """Return the number of quantisers."""
    return sum(TAG in node.attrs for graph in model.graphs.values() for node in graph.nodes.values())


def test_variables_hold_what_quantisers_made(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", Layered())
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits=4)
    before, _ = Pipeline([KeepServing()]).run(load(tmp_path / "q"))
    assert marked(before) == 4
    after, _ = Pipeline([BakeQuantizers()]).run(before)
    assert marked(after) == 0
    assert computing(serving(after)) == computing(serving(source))
    assert {v.name for v in after.variables.values()} == {v.name for v in source.variables.values()}
    for key, variable in after.variables.items():
        original, baked = source.value_of(key), after.value_of(key)
        if variable.name == "kernel":
            np.testing.assert_array_equal(baked, original)
        else:
            assert len(np.unique(baked)) <= 2**4
            assert 0 < np.abs(baked - original).max() <= np.ptp(original) / 2
    again, _ = Pipeline([BakeQuantizers()]).run(after)
    assert again is after

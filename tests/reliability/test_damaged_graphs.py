"""Graphs in which an edge, an op, an attribute, a function or an object is another one, or missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter import op_defs
from tests.conftest import PUBLIC
from tests.mutate import mutated
from tests.reliability.damage import damage_graph
from tests.reliability.forks import Server
from tests.reliability.test_damaged import MODELS
from tests.reliability.trials import fresh, trial

PUBLIC_MODELS = ("JetBrains+KotlinDL+1", "intel-analytics+analytics-zoo+1", "mlcommons+tiny+1")
"""Small ones of the corpus, of both formats."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one trial after the other."""
    return tmp_path_factory.mktemp("damaged_graphs")


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(random=st.randoms(use_true_random=True), name=st.sampled_from(MODELS))
def test_damaged_graphs(forks: Server, model: Callable[[str], Path], space: Path, random: Random, name: str) -> None:
    """Edges, ops, attributes, functions and objects are exchanged one at a time, so that none hides another."""
    source = mutated(model(name), fresh(space) / "source", lambda meta: damage_graph(meta, random))
    (space / "out").mkdir()
    list(trial(forks, source, space / "out"))


@pytest.mark.corpus
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(random=st.randoms(use_true_random=True), name=st.sampled_from(PUBLIC_MODELS))
def test_damaged_public_graphs(forks: Server, request: Any, space: Path, random: Random, name: str) -> None:
    if not PUBLIC:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    model: Path = request.getfixturevalue("corpus") / name
    source = mutated(model, fresh(space) / "source", lambda meta: damage_graph(meta, random))
    (space / "out").mkdir()
    list(trial(forks, source, space / "out", limit=60))


@pytest.mark.parametrize("name", ["keras_export", "v1_layers_fused", "v1_loop"])
def test_attributes_that_were_left_out(forks: Server, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Attributes with the default of their op's definition may be absent, and so may `shared_name`."""

    def edit(meta: Any) -> None:
        for node in [*meta.graph_def.node, *(n for f in meta.graph_def.library.function for n in f.node_def)]:
            definition = op_defs.registered(node.op)
            for attribute in () if definition is None else definition.attr:
                default = attribute.HasField("default_value") and node.attr.get(attribute.name)
                if default and (attribute.name == "shared_name" or default == attribute.default_value):
                    del node.attr[attribute.name]

    source = mutated(model(name), tmp_path / "source", edit)
    (tmp_path / "out").mkdir()
    outcomes = list(trial(forks, source, tmp_path / "out"))
    assert {"inspect done", "rewrite done", "rewrite loads", "diff done"} <= set(outcomes), outcomes

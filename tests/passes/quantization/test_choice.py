from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bnqat
from passes.batch_norm.layers import layers
from passes.batch_norm.points import BatchNormPoints
from passes.quantization.choice import Rule, quantizer_for, unmatched
from passes.quantization.ranges import Ema
from passes.quantization.schemes import Affine, Log, Symmetric, altered
from rewriter.ir import Error
from rewriter.savedmodel.read import load

Paths = Callable[[str], Path]


def test_layers_that_share_a_function_are_one(model: Paths) -> None:
    alone, shared = (load(model(name)).analysis(layers) for name in ("module", "module_shared"))
    assert [layer.number for layer in alone] == [0, 1]
    assert [len(layer.batch_norms) for layer in shared if layer.batch_norms[0].variables] == [2]
    assert shared[0].name == "+".join(bn.name for bn in shared[0].batch_norms)


def test_later_rules_change_what_earlier_ones_made(model: Paths) -> None:
    read = load(model("module"))
    first, second = BatchNormPoints().layers(read)
    rules = (
        Rule("", {"gamma": {"bits": 4}}),
        Rule(f"^{second.name}$", {"gamma": {"scheme": "symmetric", "range": Ema()}, "beta": None}),
        Rule("gamma", {"beta": {"scheme": "symmetric", "bits": 3}}),  # every layer has a variable of this name
    )
    assert quantizer_for(read, Affine(), rules, "gamma", first) == Affine(4)
    assert quantizer_for(read, Affine(), rules, "gamma", second) == Symmetric(4, Ema())
    assert quantizer_for(read, Affine(), rules, "beta", second) == Symmetric(3)
    assert quantizer_for(read, Affine(), rules[:2], "beta", second) is None
    assert quantizer_for(read, None, rules[:1], "gamma", first) is None
    assert quantizer_for(read, Log(), rules, "moving_variance", first) == Log()
    members = [*first.members, *second.members]
    assert unmatched(read, rules, members) is None
    assert unmatched(read, (*rules, Rule("nowhere")), members) == Rule("nowhere")


def test_shared_functions_need_one_quantizer(model: Paths, tmp_path: Path) -> None:
    names = [bn.name for bn in bnqat.inspect(model("module_shared")).batch_norms]
    rules = [{"match": f"^{names[1]}$", "bits": 3}]
    with pytest.raises(Error, match="share a function, so rules must give them the same quantiser for gamma"):
        bnqat.rewrite(model("module_shared"), tmp_path / "out", config={"rules": rules})


def test_options_by_name() -> None:
    assert altered(Affine(4), {"scheme": "log", "bits": 6}) == Log(6)
    assert altered(Symmetric(4, narrow_range=False), {"rounding": "stochastic"}).narrow is False
    assert altered(Affine(), {"scheme": "symmetric"}).narrow is True
    with pytest.raises(Error, match="a quantiser has no option 'bit'"):
        altered(Affine(), {"bit": 3})
    with pytest.raises(Error, match="there is no scheme 'linear'"):
        altered(Affine(), {"scheme": "linear"})


def test_a_rule_needs_a_regular_expression() -> None:
    with pytest.raises(Error, match="is no regular expression"):
        Rule("(", {})

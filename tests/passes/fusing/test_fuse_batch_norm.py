from __future__ import annotations

import pytest

from passes.batch_norm.decomposed import FORMS
from passes.batch_norm.sites import sites
from passes.fusing.fuse_batch_norm import FuseBatchNorm
from rewriter.ir import Model
from rewriter.pattern import Pattern
from rewriter.pipeline import Pipeline
from tests.passes.singles import model, text_of

X = "x = Placeholder() [?, 4, 4, 6]"
SHIFTED = """
e = Const() =0.001 []
shifted = AddV2(moving_variance, e) [6]
"""
INV = SHIFTED + "root = Rsqrt(shifted) [6]\n"
KERNEL = (
    "FusedBatchNormV3(x, gamma, beta, moving_mean, moving_variance) "
    '{data_format: "NHWC", epsilon: 0.001, is_training: false}'
)

INFERENCE = {
    "tf.nn.batch_normalization": """
        inv = Mul(root, gamma) [6]
        scaled = Mul(x, inv) [?, 4, 4, 6]
        shift = Mul(moving_mean, inv) [6]
        rest = Sub(beta, shift) [6]
        y = AddV2(scaled, rest) [?, 4, 4, 6]
    """,
    "by hand": """
        inv = Mul(root, gamma) [6]
        scaled = Mul(x, inv) [?, 4, 4, 6]
        shift = Mul(moving_mean, inv) [6]
        centred = Sub(scaled, shift) [?, 4, 4, 6]
        y = AddV2(centred, beta) [?, 4, 4, 6]
    """,
    "operands the other way round": """
        inv = Mul(gamma, root) [6]
        scaled = Mul(inv, x) [?, 4, 4, 6]
        shift = Mul(inv, moving_mean) [6]
        rest = Sub(beta, shift) [6]
        y = AddV2(rest, scaled) [?, 4, 4, 6]
    """,
    "x - mean first": """
        centred = Sub(x, moving_mean) [?, 4, 4, 6]
        normalised = Mul(centred, root) [?, 4, 4, 6]
        scaled = Mul(gamma, normalised) [?, 4, 4, 6]
        y = AddV2(scaled, beta) [?, 4, 4, 6]
    """,
    "division by a square root": """
        deviation = Sqrt(shifted) [6]
        centred = Sub(x, moving_mean) [?, 4, 4, 6]
        normalised = RealDiv(centred, deviation) [?, 4, 4, 6]
        scaled = Mul(normalised, gamma) [?, 4, 4, 6]
        y = AddV2(scaled, beta) [?, 4, 4, 6]
    """,
    "a power": """
        minus_half = Const() =-0.5 []
        power = Pow(shifted, minus_half) [6]
        centred = Sub(x, moving_mean) [?, 4, 4, 6]
        normalised = Mul(centred, power) [?, 4, 4, 6]
        scaled = Mul(normalised, gamma) [?, 4, 4, 6]
        y = AddV2(scaled, beta) [?, 4, 4, 6]
    """,
}


def fused(before: Model) -> tuple[Model, list[str]]:
    after, (step,) = Pipeline([FuseBatchNorm()]).run(before)
    return after, [skip.reason for skip in step.skipped]


@pytest.mark.parametrize("form", INFERENCE)
def test_single_ops_become_one_kernel_and_nothing_is_left_of_them(form: str) -> None:
    start = INV if "root" in INFERENCE[form] else SHIFTED
    after, reasons = fused(model(X + start + INFERENCE[form]))
    assert reasons == []
    assert text_of(after) == ["x = Placeholder()", f"y = {KERNEL}"]


NUMBERS = {"epsilon": 0.001, "one": 1.0, "half": 0.5, "minus_half": -0.5}


def written(pattern: Pattern) -> tuple[str, str]:
    """Return the name of a pattern's last node, and the text of a graph that computes the pattern."""
    text = [X, *(f"{name} = Const() ={number} []" for name, number in NUMBERS.items())]
    names: dict[Pattern, str] = {}

    def place(part: Pattern) -> str:
        if not part.ops:
            return part.name
        if part not in names:
            inputs = ", ".join(place(operand) for operand in part.inputs)
            names[part] = f"n{len(names)}"
            op, shape = sorted(part.ops)[-1], "[?, 4, 4, 6]" if "x" in part.captures else "[6]"
            text.append(f"{names[part]} = {op}({inputs}) {shape}")
        return names[part]

    return place(pattern), "\n".join(text)


def test_every_pattern_becomes_one_kernel() -> None:
    for pattern in FORMS:
        name, text = written(pattern)
        after, reasons = fused(model(text))
        assert reasons == []
        absent = iter((f"{name}/Const", f"{name}/Const_1"))
        gamma, beta = (role if role in pattern.captures else next(absent) for role in ("gamma", "beta"))
        numbers = {line for line in text_of(after, ()) if line.split(" = ")[0] in NUMBERS}
        assert [line for line in text_of(after, ()) if line not in numbers] == [
            "x = Placeholder()",
            f"{name} = FusedBatchNormV3(x, {gamma}, {beta}, moving_mean, moving_variance)",
            *(f"{parameter} = Const()" for parameter in (gamma, beta) if "/" in parameter),
        ]


def test_absent_parameters_are_ones_and_zeros() -> None:
    lines = """
        centred = Sub(x, moving_mean) [?, 4, 4, 6]
        y = Mul(centred, root) [?, 4, 4, 6]
    """
    after, _ = fused(model(X + INV + lines))
    assert text_of(after, ())[1:] == [
        "y = FusedBatchNormV3(x, y/Const, y/Const_1, moving_mean, moving_variance)",
        "y/Const = Const()",
        "y/Const_1 = Const()",
    ]


TRAINING = """
axes = Const() =[0,1,2] [3]
mean = Mean(x, axes) [1, 1, 1, 6]
stopped = StopGradient(mean) [1, 1, 1, 6]
squares = SquaredDifference(x, stopped) [?, 4, 4, 6]
variance = Mean(squares, axes) [1, 1, 1, 6]
m = Squeeze(mean) [6]
v = Squeeze(variance) [6]
e = Const() =0.001 []
shifted = AddV2(v, e) [6]
root = Rsqrt(shifted) [6]
inv = Mul(root, gamma) [6]
scaled = Mul(x, inv) [?, 4, 4, 6]
shift = Mul(m, inv) [6]
rest = Sub(beta, shift) [6]
weight = Const() =0.1 []
old = Sub(moving_mean, m) [6]
change = Mul(old, weight) [6]
update = AssignSubVariableOp(moving_mean/v, change) -
old_v = Sub(moving_variance, v) [6]
change_v = Mul(old_v, weight) [6]
update_v = AssignSubVariableOp(moving_variance/v, change_v) -
y = AddV2(scaled, rest) [?, 4, 4, 6]
"""


def test_averages_take_the_kernels_statistics_the_variance_without_its_correction() -> None:
    after, reasons = fused(model(X + TRAINING))
    assert reasons == []
    assert text_of(after, ("is_training",)) == [
        "x = Placeholder()",
        "weight = Const()",
        "old = Sub(moving_mean, y:1)",
        "change = Mul(old, weight)",
        "update = AssignSubVariableOp(moving_mean/v, change)",
        "old_v = Sub(moving_variance, v/Mul)",
        "change_v = Mul(old_v, weight)",
        "update_v = AssignSubVariableOp(moving_variance/v, change_v)",
        "y = FusedBatchNormV3(x, gamma, beta, y/Const, y/Const) {is_training: true}",
        "y/Const = Const()",
        "v/Const = Const()",
        "v/Const_1 = Const()",
        "v/Size = Size(x)",
        "v/Cast = Cast(v/Size)",
        "v/RealDiv = RealDiv(v/Const_1, v/Cast)",
        "v/Sub = Sub(v/Const, v/RealDiv)",
        "v/Mul = Mul(y:2, v/Sub)",
    ]


def test_one_more_axis_or_one_row_for_each_where_the_kernel_has_no_such_rank() -> None:
    shapes = {"[?, 6]": "Reshape(x, y/Const)", "[?, 5, 6]": "Reshape(x, y/Const)"}
    for shape, reshape in shapes.items():
        text = (X + INV + INFERENCE["by hand"]).replace("[?, 4, 4, 6]", shape)
        lines = text_of(fused(model(text))[0], ())
        assert f"y/Reshape = {reshape}" in lines
        assert "y = Reshape(y/FusedBatchNormV3, y/Shape)" in lines


REFUSED = {
    "statistics over the wrong axes": (
        X + TRAINING.replace("=[0,1,2] [3]", "=[1,2] [2]").replace("[1, 1, 1, 6]", "[?, 1, 1, 6]"),
        "its statistics are taken over the axes 1, 2 of 4, and applied along axis 3",
    ),
    "a variance over other axes than the mean": (
        X + TRAINING.replace("variance = Mean(squares, axes)", "a = Const() =[1,2] [2]\nvariance = Mean(squares, a)"),
        "its mean and its variance are taken over different axes",
    ),
    "statistics of something else": (
        X + "\nother = Relu(x) [?, 4, 4, 6]" + TRAINING.replace("Mean(x,", "Mean(other,").replace("e(x,", "e(other,"),
        "its statistics are those of other, and what they normalise is x",
    ),
    "statistics without a gradient": (
        X + TRAINING.replace("m = Squeeze(mean)", "held = StopGradient(mean) [1, 1, 1, 6]\nm = Squeeze(held)"),
        "its mean is computed by held (StopGradient), which is no mean over x",
    ),
    "a gradient that stops inside": (
        X + INV + INFERENCE["by hand"].replace("scaled = Mul(x, inv)", "s = StopGradient(inv) [6]\nscaled = Mul(x, s)"),
        "s (StopGradient) lies inside of it, which has an effect of its own",
    ),
    "a shape that is not known": (
        (X + INV + INFERENCE["by hand"]).replace("x = Placeholder() [?, 4, 4, 6]", "x = Placeholder() -"),
        "the shape of what enters, x, is not known before it runs",
    ),
    "an axis that the kernel has no layout for": (
        """
        x = Placeholder() [?, 4, 6, 4]
        e = Const() =0.001 []
        shape = Const() =[6,1] [2]
        g = Reshape(gamma, shape) [6, 1]
        b = Reshape(beta, shape) [6, 1]
        m = Reshape(moving_mean, shape) [6, 1]
        v = Reshape(moving_variance, shape) [6, 1]
        shifted = AddV2(v, e) [6, 1]
        root = Rsqrt(shifted) [6, 1]
        centred = Sub(x, m) [?, 4, 6, 4]
        normalised = Mul(centred, root) [?, 4, 6, 4]
        scaled = Mul(g, normalised) [?, 4, 6, 4]
        y = AddV2(scaled, b) [?, 4, 6, 4]
        """,
        "its channels are axis 2 of 4, for which the kernel has no layout",
    ),
    "x that is broadcast": (
        (X + INV + INFERENCE["by hand"]).replace("x = Placeholder() [?, 4, 4, 6]", "x = Placeholder() [?, 4, 4, 1]"),
        "its parameters have 6 elements, and x has the shape [?, 4, 4, 1]",
    ),
    "a value on the way that is used": (
        X + INV + INFERENCE["by hand"].replace("y =", "used = Relu(centred) [?, 4, 4, 6]\ny ="),
        "used (Relu) uses centred, which is computed on the way, so nothing would be saved",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_near_match_is_left_with_its_reason(case: str) -> None:
    text, reason = REFUSED[case]
    before = model(text)
    after, reasons = fused(before)
    assert reasons == [reason]
    assert after is before


NEAR = {
    "epsilon outside of the root": """
        e = Const() =0.001 []
        deviation = Sqrt(moving_variance) [6]
        shifted = AddV2(deviation, e) [6]
        centred = Sub(x, moving_mean) [?, 4, 4, 6]
        normalised = RealDiv(centred, shifted) [?, 4, 4, 6]
        scaled = Mul(normalised, gamma) [?, 4, 4, 6]
        y = AddV2(scaled, beta) [?, 4, 4, 6]
    """,
    "gamma used twice": INV
    + INFERENCE["by hand"].replace(
        "shift = Mul(moving_mean, inv)", "shifted_mean = Mul(moving_mean, inv) [6]\nshift = Mul(shifted_mean, gamma)"
    ),
    "gamma applied again": INV
    + INFERENCE["x - mean first"].replace(
        "y = AddV2(scaled, beta)", "again = Mul(scaled, gamma) [?, 4, 4, 6]\ny = AddV2(again, beta)"
    ),
    "whitening with fixed numbers": """
        e = Const() =0.001 []
        mean = Const() =[0.1,0.2,0.3,0.4,0.5,0.6] [6]
        variance = Const() =[1.0,2.0,3.0,4.0,5.0,6.0] [6]
        centred = Sub(x, mean) [?, 4, 4, 6]
        deviation = Sqrt(variance) [6]
        y = RealDiv(centred, deviation) [?, 4, 4, 6]
    """,
}


@pytest.mark.parametrize("case", NEAR)
def test_what_only_looks_like_it_stays(case: str) -> None:
    before = model(X + NEAR[case])
    after, _ = fused(before)
    assert after is before
    assert all(site.reason for site in before.analysis(sites))
    assert "gamma" not in case or before.analysis(sites)


def test_the_closest_form_is_named_and_what_stops_it() -> None:
    lines = """
        inv = Mul(root, gamma) [6]
        scaled = Mul(x, inv) [?, 4, 4, 6]
        y = AddV2(scaled, beta) [?, 4, 4, 6]
    """
    _, reasons = fused(model(X + INV + lines))
    assert reasons == [
        "it begins like a batch norm, with the root of a variance and epsilon, but goes on in no known form: the "
        "closest, of which 5 ops agree, has Sub in place of the variable norm/beta"
    ]

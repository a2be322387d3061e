"""Tests of pruning, in the text form of graphs, and of terms across calls."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from rewriter.apply import apply
from rewriter.constants import LARGEST
from rewriter.edit import Keep
from rewriter.evaluation import evaluated
from rewriter.ir import MAIN, Edge, Entry, Error, Graph, Model, Spec, Value, Variable
from rewriter.prune import needed_without
from rewriter.terms import DEEP, Bound, Terms, cone
from rewriter.text import from_text, to_text
from tests.reliability.forks import Call, Server

FLOAT = "float32"


def long(text: str) -> str:
    """Return a text with lists of dtypes spelled out: $fr is a float and a resource."""
    names = {"f": "DT_FLOAT", "r": "DT_RESOURCE"}

    def spelled(match: re.Match[str]) -> str:
        return f'proto "list {{ {" ".join(f"type: {names[letter]}" for letter in match[1])} }}"'

    return re.sub(r"\$([fr]+)", spelled, text)


def model(*texts: str, entries: tuple[str, ...] = ("top",), captures: tuple[str, ...] = ("a", "b")) -> Model:
    """Return a model with functions in text form; its entries take one float and capture variables."""
    graphs = {g.name: g for g in (from_text(long(text)) for text in texts)}
    entry_points = {
        name: Entry(name, (Spec("x", FLOAT, ()),), (Spec("y", FLOAT, ()),), captures, (name,)) for name in entries
    }
    variables = {k: Variable(k, k, FLOAT, ()) for k in captures}
    values = {"a": np.float32(2), "b": np.float32(5)}
    return Model({MAIN: Graph(MAIN, {}), **graphs}, variables, entry_points, values=lambda key: values[key])


TOP = """\
stateful function top(x: float32, a: resource, b: resource) -> (y = call: float32) {
  read = ReadVariableOp(b) {dtype: float32}
  call = StatefulPartitionedCall(x, a, b, read) {Tin: $frrf, Tout: $f, f: @inner}
  effect read = read
  effect call = call
}
"""
INNER = """\
stateful function inner(x: float32, a: resource, b: resource, more: float32) -> (y = sum: float32) {
  first = ReadVariableOp(a) {dtype: float32}
  second = ReadVariableOp(b) {dtype: float32}
  unused = Mul(second, more) {T: float32}
  sum = AddV2(x, first) after(second) {T: float32}
  effect second = second
}
"""


def test_what_no_result_needs_goes_through_calls_up_to_the_variables() -> None:
    pruned = apply(model(TOP, INNER), [Keep(("top",))])
    assert to_text(pruned.graphs["top"]) == long("""\
stateful function top(x: float32, a: resource) -> (y = call: float32) {
  call = StatefulPartitionedCall(x, a) {Tin: $fr, Tout: $f, f: @inner}
  effect call = call
}
""")
    assert (
        to_text(pruned.graphs["inner"])
        == """\
stateful function inner(x: float32, a: resource) -> (y = sum: float32) {
  first = ReadVariableOp(a) {dtype: float32}
  sum = AddV2(x, first) {T: float32}
}
"""
    )
    assert pruned.entries["top"].captures == ("a",)
    assert set(pruned.variables) == {"a"}
    again = apply(pruned, [Keep(("top",))])
    assert again.graphs == pruned.graphs


def test_what_a_read_that_goes_has_waited_for_is_waited_for() -> None:
    text = """\
stateful function top(x: float32, a: resource, b: resource) -> (y = late: float32) {
  assign = AssignVariableOp(a, x) {dtype: float32}
  unused = ReadVariableOp(b) after(assign) {dtype: float32}
  late = ReadVariableOp(a) after(unused) {dtype: float32}
}
"""
    pruned = apply(model(text), [Keep(("top",))]).graphs["top"]
    assert pruned.nodes["late"].after == ("assign",)
    assert "unused" not in pruned.nodes
    # What runs only because a read waits for it still runs.
    alone = text.replace("  late = ReadVariableOp(a) after(unused) {dtype: float32}\n", "  effect unused = unused\n")
    pruned = apply(model(alone.replace("y = late", "y = x")), [Keep(("top",))]).graphs["top"]
    assert {"assign", "unused"} <= pruned.nodes.keys()
    assert [e.node for e in pruned.effects] == ["unused"]


LOOP = """\
stateful function top(x: float32, a: resource, b: resource) -> (y = result: float32) {
  dead = ReadVariableOp(b) {dtype: float32}
  loop = While(x, dead, a) {T: $ffr, cond: @cond, body: @body}
  read = ReadVariableOp(loop:2) {dtype: float32}
  result = AddV2(loop, read) {T: float32}
  effect loop = loop
}
"""
COND = """\
function cond(x: float32, dead: float32, a: resource) -> (more = less: bool) {
  less = Less(x, x) {T: float32}
}
"""
BODY = """\
stateful function body(x: float32, dead: float32, a: resource) -> (x = y: float32, d = dead: float32, a = a: resource) {
  y = Mul(x, x) {T: float32}
}
"""


def test_a_loop_loses_what_it_only_passes_on_and_its_outputs_move_up() -> None:
    pruned = apply(model(LOOP, COND, BODY), [Keep(("top",))])
    top = pruned.graphs["top"]
    assert top.nodes["loop"].inputs == (Value("x"), Value("a"))
    assert top.nodes["read"].inputs == (Value("loop", 1),)
    assert pruned.graphs["cond"].arguments == pruned.graphs["body"].arguments == ("x", "a")
    assert [r.name for r in pruned.graphs["body"].results] == ["x", "a"]
    assert set(pruned.variables) == {"a"}


def test_inputs_that_do_not_count_are_no_need_and_others_are() -> None:
    whole = model(TOP, INNER)
    assert needed_without(whole, []) == {"a"}
    assert needed_without(whole, [Edge("inner", "sum", 1)]) == frozenset()
    assert needed_without(whole, [Edge("inner", "sum", 0)]) == {"a"}


def test_terms_meet_again_across_calls_and_are_computed() -> None:
    other = TOP.replace("top(", "other(").replace("(x, a, b, read)", "(x, b, a, read)")
    two = model(TOP, other, INNER, entries=("top", "other"))
    terms = Terms(two)
    product = Value("unused")
    first, second = (terms.on("inner", product, way) for way in terms.ways("inner", [product]))
    # b times b, and a times b: both are read of what each caller passes.
    assert sorted(float(v) for v in evaluated(two, [first, second], {}, trust=False)) == [10.0, 25.0]
    reads = [t for t in cone([first, second]) if t.op == "ReadVariableOp"]
    assert len(reads) == 2
    with pytest.raises(Error, match="argument 0 of top, which is only known while the model runs"):
        evaluated(
            two, [terms.on("inner", Value("sum"), w) for w in terms.ways("inner", [Value("sum")])], {}, trust=True
        )


def test_a_long_chain_is_followed_and_deep_calls_are_not() -> None:
    lines = "".join(f"  n{i} = Mul(n{i - 1}, n{i - 1}) {{T: float32}}\n" for i in range(1, 3000))
    text = f"""\
stateful function top(x: float32, a: resource, b: resource) -> (y = n2999: float32) {{
  one = ReadVariableOp(a) {{dtype: float32}}
  n0 = Sub(one, one) {{T: float32}}
{lines}}}
"""
    chain = model(text)
    terms = Terms(chain)
    (way,) = terms.ways("top", [Value("n2999")])
    assert evaluated(chain, [terms.on("top", Value("n2999"), way)], {}, trust=False) == [0.0]
    nested = [
        f"function f{i}(a: resource) -> (y = c: float32) {{\n"
        f"  c = PartitionedCall(a) {{Tin: $r, Tout: $f, f: @f{i + 1}}}\n}}"
        for i in range(DEEP + 2)
    ]
    last = f"function f{DEEP + 2}(a: resource) -> (y = c: float32) {{\n  c = ReadVariableOp(a) {{dtype: float32}}\n}}"
    deep = model(*nested, last, entries=(), captures=())
    with pytest.raises(Error, match="nested too deep to be followed"):
        Terms(deep).on("f0", Value("c"), Bound({}))


@pytest.mark.parametrize("depth", [12, 40])
def test_calls_that_double_are_not_followed(depth: int) -> None:
    nested = [
        f"function f{i}(u: float32) -> (y = y: float32) {{\n  n = Neg(u) {{T: float32}}\n  e = Exp(u) {{T: float32}}\n"
        f"  p = PartitionedCall(n) {{Tin: $f, Tout: $f, f: @f{i + 1}}}\n"
        f"  q = PartitionedCall(e) {{Tin: $f, Tout: $f, f: @f{i + 1}}}\n  y = AddV2(p, q) {{T: float32}}\n}}"
        for i in range(depth)
    ]
    last = f"function f{depth}(u: float32) -> (y = y: float32) {{\n  y = Exp(u) {{T: float32}}\n}}"
    top = "stateful function top(x: float32, a: resource, b: resource) -> (y = y: float32) {\n"
    top += "  r = ReadVariableOp(a) {dtype: float32}\n  y = PartitionedCall(r) {Tin: $f, Tout: $f, f: @f0}\n}"
    doubling = model(top, *nested, last)
    with pytest.raises(Error, match="too many different values"):
        Terms(doubling).ways(f"f{depth}", [Value("y")])
    terms = Terms(doubling)
    (way,) = terms.ways("top", [Value("y")])
    with pytest.raises(Error, match="too many different values"):
        terms.on("top", Value("y"), way)


def _sizes(number: int) -> str:
    return f'proto "tensor {{ dtype: DT_INT32 tensor_shape {{ dim {{ size: 1 }} }} int_val: {number} }}"'


SIZES = _sizes(LARGEST + 1)


def hidden(number: int) -> str:
    """Return lines that fill a tensor whose size is the minimum of `number` values; shape inference computes it."""
    return f"""\
  n = Const() {{dtype: int32, value: {_sizes(number)}}}
  zero = Const() {{dtype: int32, value: {_sizes(0)}}}
  three = Const() {{dtype: int32, value: proto "tensor {{ dtype: DT_INT32 tensor_shape {{ }} int_val: 3 }}"}}
  big = Fill(n, three) {{T: int32, index_type: int32}}
  least = Min(big, zero) {{T: int32, Tidx: int32, keep_dims: true}}
  y = Fill(least, r) {{T: float32, index_type: int32}}"""


def test_sizes_are_looked_at_before_they_are_computed(forks: Server) -> None:
    """Sizes that follow from constants are computed one op at a time."""
    for number, code in ((1000, 0), (2**29, 2)):
        outcome = forks.run(Call("tests.rewriter.test_prune:computed", [hidden(number)]), mib=1500)
        assert (outcome.code, outcome.stopped) == (code, ""), outcome
    assert "(536870912,) by Fill, which may have more than" in outcome.err


def computed(lines: str) -> None:
    """Evaluate the text of a function of a scalar variable `r`; print an error to stderr and exit with 2."""
    text = f"stateful function top(x: float32, a: resource, b: resource) -> (y = y: float32) {{\n{lines}\n"
    bad = model(text + "  r = ReadVariableOp(a) {dtype: float32}\n}")
    terms = Terms(bad)
    (way,) = terms.ways("top", [Value("y")])
    try:
        (value,) = evaluated(bad, [terms.on("top", Value("y"), way)], {}, trust=False)
    except Error as e:
        sys.stderr.write(str(e))
        sys.exit(2)
    assert value.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("  y = ReadFile(r)", "ReadFile .* pass --trust"),
        (
            f"  n = Const() {{dtype: int32, value: {SIZES}}}\n  y = Fill(n, r) {{T: float32, index_type: int32}}",
            "a value of shape .* by Fill, which may have more than",
        ),
        ("  y = Round() {T: float32}", "cannot be computed"),
    ],
)
def test_what_is_not_harmless_is_not_computed(lines: str, sentence: str) -> None:
    text = f"stateful function top(x: float32, a: resource, b: resource) -> (y = y: float32) {{\n{lines}\n"
    text += "  r = ReadVariableOp(a) {dtype: float32}\n}"
    graph: Graph = from_text(text)
    assert graph.nodes["y"].op in ("ReadFile", "Fill", "Round")
    bad = model(text)
    terms = Terms(bad)
    (way,) = terms.ways("top", [Value("y")])
    with pytest.raises(Error, match=sentence):
        evaluated(bad, [terms.on("top", Value("y"), way)], {}, trust=False)

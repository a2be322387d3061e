from __future__ import annotations

from rewriter.ir import Edge, Value
from rewriter.pattern import any_value, matches, node, origin
from rewriter.text import from_text

GRAPH = from_text("""\
function f(x: float32, m: float32, v: float32) -> (y = sum: float32) {
  root = Rsqrt(v) {T: float32}
  shaped = Reshape(root, v) {T: float32}
  passed = Identity(shaped) {T: float32}
  scaled = Mul(passed, x) {T: float32}
  shift = Mul(m, root) {T: float32}
  sum = Sub(scaled, shift) {T: float32}
}
""")
INV = node("Rsqrt", any_value("v")).named("inv")
FORM = node("Sub", node("Mul", any_value("x"), INV), node("Mul", any_value("m"), INV))


def test_captures_are_named_and_inputs_commute() -> None:
    (match,) = matches(GRAPH, "sum", FORM)
    assert {name: capture.value.node for name, capture in match.captures.items()} == {
        "x": "x",
        "m": "m",
        "v": "v",
        "inv": "root",
    }


def test_one_name_is_one_value_and_keeps_every_use() -> None:
    (match,) = matches(GRAPH, "sum", FORM)
    assert match["inv"].edges == (Edge("f", "scaled", 0), Edge("f", "shift", 1))
    other = node("Sub", node("Mul", any_value("a"), any_value("b")), node("Mul", any_value("a"), any_value("b")))
    assert not list(matches(GRAPH, "sum", other))


def test_ops_that_forward_or_reshape_are_looked_through() -> None:
    assert origin(GRAPH, Value("passed")) == Value("root")


def test_what_does_not_fit_does_not_match() -> None:
    assert not list(matches(GRAPH, "sum", node("Add|AddV2", any_value("a"), any_value("b"))))
    assert not list(matches(GRAPH, "sum", node("Sub", any_value("a"))))
    swapped = node("Sub", node("Mul", any_value("m"), INV), node("Add", any_value("x"), INV))
    assert not list(matches(GRAPH, "sum", swapped))

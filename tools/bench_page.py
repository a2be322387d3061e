"""How long a comparison takes, how large its page is, and how long a browser needs for it.

    python -m tools.bench_page [--functions 12 120] [--json FILE]

The model has a number of functions, each of which computes the same 40 layers of convolution and batch norm. Opening is
from navigation to the end of the page's load event, with the first place drawn; selecting is the median over 50 places,
layout included. Needs the extra `test` and a browser, which `python -m tools.chromium` makes sure of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

import bnqat
from rewriter.savedmodel.read import load
from tests.models import FusedBatchNorm
from tools import chromium

LAYERS = 40
SELECT = """count => {
  const taken = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    step(1);
    document.body.getBoundingClientRect();
    taken.push(performance.now() - start);
  }
  return taken;
}"""


class Deep(tf.Module):
    """Model with a number of functions, each of which computes the same layers."""

    def __init__(self, functions: int) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal([1, 1, 4, 4], [1, 2]))
        self.norms = [FusedBatchNorm(4) for _ in range(LAYERS)]
        self.inner = [tf.function(lambda x, i=i: self._layers(x + float(i))) for i in range(functions)]

    def _layers(self, x: tf.Tensor) -> tf.Tensor:
        for number, norm in enumerate(self.norms):
            with tf.name_scope(f"layer_{number}"):
                x = tf.nn.relu(norm(tf.nn.conv2d(x, self.kernel, 1, "SAME"), training=False))
        return x

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 4], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        """Call all functions."""
        return tf.add_n([inner(x) for inner in self.inner])


def measure(browser: Browser, functions: int, scratch: Path, opens: int = 3) -> dict[str, Any]:
    """Measure one row of the table."""
    source, target, file = scratch / "source", scratch / "target", scratch / "page.html"
    module = Deep(functions)
    tf.saved_model.save(module, str(source), signatures={"serving_default": module.serve})
    start = time.perf_counter()
    bnqat.rewrite(source, target, bits=4)
    rewritten = time.perf_counter()
    comparison = bnqat.diff(source, target)
    compared = time.perf_counter()
    file.write_text(comparison.to_html(), encoding="utf-8")
    drawn = time.perf_counter()
    opened, selected = [], []
    for _ in range(opens):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(file.as_uri())
        opened.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        selected += page.evaluate(SELECT, 50)
        page.close()
    before, after = (sum(len(g.nodes) for g in load(path).graphs.values()) for path in (source, target))
    return {
        "nodes before": before,
        "nodes after": after,
        "changes": len(comparison.report.changes),
        "other changes": comparison.report.verdict.other_changes,
        "rewrite s": round(rewritten - start, 2),
        "diff s": round(compared - rewritten, 2),
        "page s": round(drawn - compared, 2),
        "page MB": round(file.stat().st_size / 1e6, 2),
        "open ms": round(statistics.median(opened)),
        "select ms": round(statistics.median(selected), 1),
        "slowest select ms": round(max(selected), 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, nargs="+", default=[4, 12, 120])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    with sync_playwright() as playwright:
        browser = chromium.launch(playwright)
        for functions in arguments.functions:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append({"functions": functions, **measure(browser, functions, Path(scratch))})
        browser.close()
    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    Console(width=180).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time and peak memory of inspect, rewrite, diff and finalize.

    python -m tools.bench_rewrite nodes [--shape flat functions deep] [--layers 10 30 100 300 1000 3000]
    python -m tools.bench_rewrite checkpoint [--gib 0.1 1 4]
    python -m tools.bench_rewrite start

`nodes`: models of so many layers, each a convolution, a batch norm and 9 small ops, in a serving and a training
function. They are in one function (flat), each in a function of its own (functions), or in functions that call each
other 50 deep (deep). `copy` is reading, parsing, writing and copying the model, which any rewrite does at least.
Exponents are the slopes of log time over log nodes between the two largest sizes. `checkpoint`: one small net beside
variables of so many GiB. `start`: whole commands, median of 7, and TensorFlow's import beside them.

Every figure is that of a process of its own: seconds without imports, and the peak of its resident memory in MiB, of
which TensorFlow's import takes what the first line says.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

COMMANDS = ("copy", "inspect", "rewrite", "diff", "finalize")

WORKER = r"""
import re, shutil, sys, time
from pathlib import Path
import bnqat
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
tf.constant(0)
bnqat.inspect, bnqat.rewrite, bnqat.diff, bnqat.finalize
command, source, target, final = sys.argv[1], *(Path(p) for p in sys.argv[2:])

def copy():
    shutil.copytree(source / "variables", target / "variables")
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((source / "saved_model.pb").read_bytes())
    (target / "saved_model.pb").write_bytes(proto.SerializeToString(deterministic=True))

run = {
    "nothing": lambda: None,
    "copy": copy,
    "inspect": lambda: bnqat.inspect(source),
    "rewrite": lambda: bnqat.rewrite(source, target),
    "diff": lambda: bnqat.diff(source, target),
    "finalize": lambda: bnqat.finalize(target, final),
}[command]
start = time.perf_counter()
run()
seconds = time.perf_counter() - start
# Not getrusage: its peak includes the size of the process that started this one.
print(seconds, int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""

MAKER = """
import sys
from pathlib import Path
from tools.bench_rewrite import make
make(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
"""


class Cost(NamedTuple):
    """Seconds and peak memory of a command."""

    seconds: float
    peak: float


def make(path: Path, shape: str, layers: int, gib: float) -> None:
    """Write a model of so many layers and so many GiB of other variables."""
    import tensorflow as tf

    from tests.models import FusedBatchNorm

    # AutoGraph takes so many frames of Python for a call that 50 of them are too deep.
    function = partial(tf.function, autograph=False)

    module = tf.Module()
    module.ballast = [tf.Variable(tf.zeros([1 << 20]), name=f"ballast_{i}") for i in range(round(gib * 256))]
    module.kernel = tf.Variable(tf.random.stateless_normal([1, 1, 8, 8], [1, 2]))
    module.norms = [FusedBatchNorm(8) for _ in range(layers)]
    width = 1 if shape == "functions" else -(-layers // 50) if shape == "deep" else layers

    def layer(x: tf.Tensor, norm: FusedBatchNorm, training: bool) -> tf.Tensor:
        x = norm(tf.nn.conv2d(x, module.kernel, 1, "SAME"), training)
        for _ in range(9):
            x = tf.raw_ops.Relu(features=x)
        return x

    def from_layer(x: tf.Tensor, first: int, training: bool) -> tf.Tensor:
        for norm in module.norms[first : first + width]:
            x = layer(x, norm, training)
        following = first + width
        if shape == "deep" and following < layers:
            return function(lambda x: from_layer(x, following, training))(x)
        return x

    def whole(x: tf.Tensor, training: bool) -> tf.Tensor:
        for first in range(0, layers, width) if shape == "functions" else (0,):
            inner = function(lambda x, first=first: from_layer(x, first, training))
            x = inner(x) if shape != "flat" else from_layer(x, first, training)
        return x

    spec = [tf.TensorSpec((None, 4, 4, 8), name="x")]
    module.serve = function(lambda x: whole(x, training=False), input_signature=spec)
    module.train = function(lambda x: whole(x, training=True), input_signature=spec)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})


def worked(command: str, *paths: Path) -> Cost:
    """Run a command in a process of its own, and return its cost."""
    arguments = [sys.executable, "-c", WORKER, command, *map(str, paths)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return Cost(*map(float, done.stdout.split()))


def measured(shape: str, layers: int, gib: float) -> tuple[int, Mapping[str, Cost]]:
    """Return a model's number of nodes and the cost of each command."""
    from rewriter.savedmodel.read import load

    with tempfile.TemporaryDirectory() as folder:
        source, target, final, copied = (Path(folder) / name for name in ("source", "target", "final", "copy"))
        copied.mkdir()
        arguments = [sys.executable, "-c", MAKER, str(source), shape, str(layers), str(gib)]
        subprocess.run(arguments, check=True, stderr=subprocess.DEVNULL)
        nodes = sum(len(graph.nodes) for graph in load(source).graphs.values())
        costs = {name: worked(name, source, copied if name == "copy" else target, final) for name in COMMANDS}
    return nodes, costs


def nodes(shapes: Sequence[str], sizes: Sequence[int]) -> None:
    """Print a table for each shape."""
    for shape in shapes:
        print(f"{shape}:\n\n| layers | nodes | {' | '.join(COMMANDS)} |\n|{'---|' * (2 + len(COMMANDS))}")
        measurements = []
        for layers in sizes:
            count, costs = measured(shape, layers, 0)
            measurements.append((count, costs))
            cells = (f"{cost.seconds:.2f} s, {cost.peak:.0f} MiB" for cost in costs.values())
            print(f"| {layers:,} | {count:,} | {' | '.join(cells)} |", flush=True)
        if measurements[1:]:
            (few, less), (many, more) = measurements[-2:]
            slopes = (math.log(more[n].seconds / less[n].seconds) / math.log(many / few) for n in COMMANDS)
            print(f"| exponent | | {' | '.join(f'{slope:.2f}' for slope in slopes)} |\n", flush=True)


def checkpoint(sizes: Sequence[float]) -> None:
    """Print a table over the checkpoint's size."""
    print(f"| checkpoint | {' | '.join(COMMANDS)} |\n|{'---|' * (1 + len(COMMANDS))}")
    for gib in sizes:
        _, costs = measured("flat", 2, gib)
        cells = (f"{cost.seconds:.2f} s, {cost.peak:.0f} MiB" for cost in costs.values())
        print(f"| {gib:g} GiB | {' | '.join(cells)} |", flush=True)


def start() -> None:
    """Print the seconds of whole commands."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        subprocess.run(
            [sys.executable, "-c", MAKER, str(source), "flat", "10", "0"], check=True, stderr=subprocess.DEVNULL
        )
        bnqat = [sys.executable, "-m", "rewriter.app.cli"]
        subprocess.run([*bnqat, "rewrite", str(source), str(target)], check=True, capture_output=True)
        commands = {
            "import tensorflow": [sys.executable, "-c", "import tensorflow"],
            "bnqat --help": [*bnqat, "--help"],
            "bnqat inspect": [*bnqat, "inspect", str(source)],
            "bnqat diff": [*bnqat, "diff", str(source), str(target)],
            "bnqat inspect of nothing": [*bnqat, "inspect", str(Path(folder) / "nothing")],
        }
        durations: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(7):
            for name, command in commands.items():
                begun = time.perf_counter()
                subprocess.run(command, check=False, capture_output=True)
                durations[name].append(time.perf_counter() - begun)
        print("| command | seconds |\n|---|---|")
        for name, seconds in durations.items():
            print(f"| {name} | {statistics.median(seconds):.2f} |")


def layers(text: str) -> int:
    """Parse a number of layers; raise a ValueError if it is none."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def gib(text: str) -> float:
    """Parse a checkpoint's size in GiB; raise a ValueError if it is none."""
    if not 0 <= float(text) < math.inf:
        raise ValueError(text)
    return float(text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nodes", "checkpoint", "start"])
    parser.add_argument("--shape", nargs="+", choices=["flat", "functions", "deep"], default=["flat"])
    parser.add_argument("--layers", type=layers, nargs="+", default=[10, 30, 100, 300, 1000, 3000])
    parser.add_argument("--gib", type=gib, nargs="+", default=[0.1, 1, 4])
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    with tempfile.TemporaryDirectory() as folder:
        peak = worked("nothing", *[Path(folder)] * 3).peak
    print(f"TensorFlow's import: {peak:.0f} MiB\n", flush=True)
    if options.what == "nodes":
        nodes(options.shape, sorted(set(options.layers)))
    elif options.what == "checkpoint":
        checkpoint(options.gib)
    else:
        start()


if __name__ == "__main__":
    main()

"""Time and peak memory of a rewrite.

    python -m tools.bench_rewrite time MODEL [MODEL ...]    seconds after imports, best and median of 5
    python -m tools.bench_rewrite memory [GIB ...]          peak memory against the checkpoint's size

Every figure is that of a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import resource, sys, tempfile, time
from pathlib import Path
from rewriter.app import api
import tensorflow as tf
tf.constant(0)
with tempfile.TemporaryDirectory(dir=Path(sys.argv[1]).parent) as folder:
    start = time.perf_counter()
    api.rewrite(sys.argv[1], Path(folder) / "out")
    seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

MAKER = """
import sys
import tensorflow as tf
from tests.models import Net, save_module
module = Net()
module.ballast = [tf.Variable(tf.random.normal([1 << 20]), name=f"ballast_{i}") for i in range(int(sys.argv[2]))]
save_module(module, sys.argv[1])
"""


def measure(model: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one rewrite."""
    done = subprocess.run([sys.executable, "-c", WORKER, str(model)], check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    """Print one line for each model or size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("values", nargs="*", help="models, or sizes in GiB (default: 0.03 0.5 2)")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.what == "time":
        for name in options.values:
            times = [measure(Path(name))[0] for _ in range(5)]
            print(f"{name}: {min(times):.2f} s best, {statistics.median(times):.2f} s median of 5")
        return
    for size in map(float, options.values or ("0.03", "0.5", "2")):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            count = max(1, round(size * 256))
            subprocess.run([sys.executable, "-c", MAKER, str(model), str(count)], check=True, stderr=subprocess.DEVNULL)
            seconds, peak = measure(model)
            print(f"checkpoint {count / 256:.2f} GiB: peak {peak:.0f} MiB, {seconds:.1f} s")


if __name__ == "__main__":
    main()

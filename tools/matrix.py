"""The tests under other releases of TensorFlow, and what this release writes, loaded by the oldest.

    python -m tools.matrix [--versions 2.19 2.20] [--only loads] [-- PYTEST ARGUMENTS]

Each release gets a virtual environment of its own in a temporary directory, with what `pyproject.toml` asks for and
TensorFlow and tf_keras of that release. Prints a row for each: what the tests came to, and how many of the models that
were rewritten and finalised here it loads and runs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import bnqat
from tests.models.all import ALL

REPOSITORY = Path(__file__).parents[1]
TESTS = (
    "tests/rewriter",
    "tests/passes/test_quantize.py",
    "tests/passes/quantization/test_batched.py",
    "tests/test_corpus.py",
)
"""What depends on the release: the format, its ops, and gradients."""
MODELS = (
    "keras_export",
    "keras_save",
    "module_train",
    "nested",
    "if",
    "form_by_hand",
    "v1_two_fused",
    "v1_loop",
    "keras3",
)
"""Written here and loaded there: each format, and what has functions in functions."""

OURS = re.compile(r"(tensorflow|tf_keras)[<>=]")

LOADER = """
import sys
from pathlib import Path
import tensorflow as tf
from tests.harness import inputs_of
ran = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    loaded = tf.saved_model.load(str(path))
    for name, signature in loaded.signatures.items():
        outputs = signature(**inputs_of(signature))
        assert all(tf.reduce_all(tf.math.is_finite(v)) for v in outputs.values()), (path, name)
    if hasattr(loaded, "quantization"):
        loaded.quantization.step.assign(5)
        (train,) = loaded.train.concrete_functions
    ran += 1
print(tf.__version__, ran)
"""


def requirements(version: str) -> Iterator[str]:
    """Yield the requirements of the package and its tests, with TensorFlow of a release."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in (
        *project["dependencies"],
        *(w for name in ("demo", "onnx", "plot", "test") for w in extras[name]),
    ):
        if not OURS.match(requirement) and not requirement.startswith("bnqat["):
            yield requirement
    yield from (f"{name}=={version}.*" for name in ("tensorflow", "tf_keras"))


def environment(folder: Path, version: str) -> Path:
    """Make a virtual environment with a release of TensorFlow, and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements(version)], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", REPOSITORY], check=True)
    return python


def tested(python: Path, arguments: Sequence[str]) -> str:
    """Run the tests, and return pytest's last line and the failures."""
    command: list[str | Path] = [python, "-m", "pytest", "-q", *(arguments or TESTS)]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([*lines[-1:], *failed]) or done.stderr[-500:]


def loaded(python: Path, folder: Path) -> str:
    """Load and run the models in a folder with a release, and return the counts as text."""
    setting = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [python, "-c", LOADER, folder], check=False, capture_output=True, text=True, env=setting, cwd=folder
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def written(folder: Path) -> int:
    """Rewrite and finalise models with the current release, and return their number.

    Models in TensorFlow 1's format are not finalised.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory() as sources:
        for name in MODELS:
            ALL[name](Path(sources) / name)
            bnqat.rewrite(Path(sources) / name, folder / name)
            if not name.startswith("v1"):
                bnqat.finalize(folder / name, folder / f"{name}_final")
    return len(list(folder.iterdir()))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["2.19", "2.20"])
    parser.add_argument("--only", choices=["tests", "loads"])
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = written(Path(folder) / "models")
        print(f"| TensorFlow | tests | models written here (Python {sys.version.split()[0]}): {count} |\n|---|---|---|")
        for version in options.versions:
            python = environment(Path(folder) / version, version)
            loads = loaded(python, Path(folder) / "models") if options.only != "tests" else ""
            tests = tested(python, options.arguments) if options.only != "loads" else ""
            print(f"| {version} | {tests} | {loads} |", flush=True)


if __name__ == "__main__":
    main()

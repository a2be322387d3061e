"""Every Python block of the documentation runs."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import reference, weight_reference
from tests.reliability.forks import Call, Server

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^# file: (\S+)\n")
CLIPPING = ("rewrite", "float_model", "clipped", "--passes", "clip_relu:ClipRelu")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/commands.md",
        "docs/contract.md",
        "docs/diff.md",
        "docs/numerics.md",
        "docs/passes.md",
        "docs/quantisation.md",
        "docs/report.md",
        "docs/weights.md",
    ],
)
def test_blocks_run_in_order(
    name: str, forks: Server, model: Callable[[str], Path], rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "float_model").symlink_to(model("module"))
    shutil.copytree(rewritten("module", start_step=5), tmp_path / "qat_model")  # which a block overwrites
    blocks = BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
    several = {"docs/numerics.md": 2, "docs/passes.md": 2, "docs/quantisation.md": 3, "docs/weights.md": 2}
    assert len(blocks) == several.get(name, 1)
    for block in blocks:
        file = FILE.match(block)
        if file:
            (tmp_path / file[1]).write_text(block, encoding="utf-8")
            command = [str(Path(sys.executable).parent / "bnqat"), *CLIPPING]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            outcome = forks.python(block, cwd=tmp_path)
            assert outcome.code == 0, outcome.err[-2000:]


def test_a_third_partys_pass_does_its_work(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    import tensorflow as tf

    from tests import harness

    (tmp_path / "float_model").symlink_to(model("module"))
    block = BLOCK.findall((ROOT / "docs/passes.md").read_text(encoding="utf-8"))[0]
    (tmp_path / "clip_relu.py").write_text(block.replace("top: float = 6.0", "top: float = 0.5"), encoding="utf-8")
    done = forks.cli(*CLIPPING, before=[Call("os:chdir", [str(tmp_path)])])
    assert done.code == 0, done.err
    x = harness.images((None, 8, 8, 3))
    source, clipped = tf.saved_model.load(str(model("module"))), tf.saved_model.load(str(tmp_path / "clipped"))
    assert source.serve(x).numpy().max() > 0.5
    assert clipped.serve(x).numpy().max() <= 0.5


@pytest.mark.parametrize("bits", range(2, 17))
def test_the_arithmetic_by_hand_is_the_references(bits: int, tmp_path: Path) -> None:
    block = BLOCK.findall((ROOT / "docs/numerics.md").read_text(encoding="utf-8"))[0]
    (tmp_path / "by_hand.py").write_text(block, encoding="utf-8")
    by_hand = runpy.run_path(str(tmp_path / "by_hand.py"))["affine"]
    rng = np.random.default_rng(bits)
    for offset in (-3, 0, 0.5, 3):
        v = rng.normal(offset, 1, 64).astype(np.float32)
        assert by_hand(v, bits).dtype == np.float32
        np.testing.assert_array_equal(by_hand(v, bits), reference.affine(v, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_the_arithmetic_of_weights_by_hand_is_the_references(bits: int, tmp_path: Path) -> None:
    block = BLOCK.findall((ROOT / "docs/numerics.md").read_text(encoding="utf-8"))[1]
    (tmp_path / "by_hand.py").write_text(block, encoding="utf-8")
    by_hand = runpy.run_path(str(tmp_path / "by_hand.py"))["symmetric"]
    w = np.random.default_rng(bits).normal(0, 0.3, (3, 3, 8, 16)).astype(np.float32)
    w[..., 0] = 0
    expected = weight_reference.quantize_weight("symmetric", w, bits, (-1,)).value
    assert by_hand(w, bits).dtype == np.float32
    np.testing.assert_array_equal(by_hand(w, bits), expected)


def test_links_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_links_into_pages_lead_to_headings() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#\s]*\.md)?#([^)]+)\)", path.read_text(encoding="utf-8"))
        for page, anchor in links:
            assert anchor in _anchors(path.parent / page if page else path), f"{path}: {page}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

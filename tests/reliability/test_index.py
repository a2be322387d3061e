"""Indexes of checkpoints that TensorFlow would not survive, or that send it elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewriter.ir import Error
from rewriter.savedmodel import index
from tests.mutate import with_value
from tests.reliability.forks import Server
from tests.reliability.indexes import edited
from tests.reliability.trials import judged

Paths = Callable[[str], Path]
KEY = b"variables/2/.ATTRIBUTES/VARIABLE_VALUE"
OBJECTS = b"_CHECKPOINTABLE_OBJECT_GRAPH"


def _shape(entry: Any, *sizes: int) -> None:
    entry.shape.Clear()
    for size in sizes:
        entry.shape.dim.add().size = size


DAMAGE: dict[str, Callable[[bytes, Any], None]] = {
    "has the dtype 0, which does not exist": lambda k, e: setattr(e, "dtype", 0) if k == KEY else None,
    "has the dtype 999": lambda k, e: setattr(e, "dtype", 999) if k == KEY else None,
    "has the dtype float32_ref": lambda k, e: setattr(e, "dtype", 101) if k == KEY else None,
    "has a shape that is none": lambda k, e: _shape(e, -5) if k == KEY else None,
    "has the shape [1099511627776, 1099511627776]": lambda k, e: _shape(e, 1 << 40, 1 << 40) if k == KEY else None,
    "has the shape [268435456], and less data": lambda k, e: _shape(e, 1 << 28) if k == OBJECTS else None,
}


@pytest.mark.parametrize("why", sorted(DAMAGE))
def test_what_would_end_tensorflow(forks: Server, model: Paths, tmp_path: Path, why: str) -> None:
    source = edited(model("keras_export"), tmp_path / "source", DAMAGE[why])
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target"), ("diff", source, source)):
        outcome = forks.cli(*arguments, limit=10, mib=1500)
        assert judged(outcome, str(arguments)) == "refused"
        assert why in outcome.err


def test_an_index_written_by_hand_is_read(forks: Server, model: Paths, tmp_path: Path) -> None:
    """The other tests rely on this: bnqat refuses their damage, not the way in which the index was written."""
    source = edited(model("keras_export"), tmp_path / "source", lambda _key, _entry: None)
    assert judged(forks.cli("rewrite", source, tmp_path / "target"), "rewrite") == "done"


def test_compressed_blocks(forks: Server, model: Paths, tmp_path: Path) -> None:
    source = edited(model("keras_export"), tmp_path / "source", lambda _key, _entry: None, kind=1)
    outcome = forks.cli("inspect", source)
    assert judged(outcome, "inspect") == "refused"
    assert "variables.index is damaged" in outcome.err


def test_damaged_bytes(model: Paths, tmp_path: Path) -> None:
    whole = (model("module_train") / "variables" / "variables.index").read_bytes()
    file = tmp_path / "variables.index"
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(Error, match="is damaged"):
            index.refuse_index(file, 1 << 20)
        file.write_bytes(whole[:size] + b"\x80" * 20 + whole[size + 20 :])
        with suppress(Error):  # some damage is to padding, or what is not looked at
            index.refuse_index(file, 1 << 20)


def test_another_checkpoint_is_not_followed(forks: Server, model: Paths, tmp_path: Path) -> None:
    """A directory of the checkpoint's name may hold a file that makes TensorFlow read another checkpoint."""
    key = "variables/0/.ATTRIBUTES/VARIABLE_VALUE"
    outside = with_value(model("keras_export"), tmp_path / "outside", key, lambda v: np.full_like(v, 1234.5))
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    (source / "variables" / "variables").mkdir()
    prefix = outside / "variables" / "variables"
    (source / "variables" / "variables" / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\n')
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target")):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "refused"
        assert "is a directory, where TensorFlow looks for another checkpoint" in outcome.err

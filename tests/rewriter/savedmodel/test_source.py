from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.ir import Error
from rewriter.savedmodel.source import require_model

FILES = {
    "net.keras": "is a Keras model: load it and call model.export(dir), or in Keras 2 model.save(dir, ",
    "net.H5": "is a Keras model or its weights: load it and call model.export(dir), or in Keras 2 model.save(dir",
    "net.tflite": "pass the SavedModel that it was converted from",
    "net.onnx": "pass the SavedModel that it was converted from",
    "frozen.pb": "import it and save it with tf.saved_model.save",
    "ckpt.meta": "restore both in a session",
    "ckpt.index": "is a checkpoint, which holds values and no graph",
    "saved_model.pb": "is a file of a SavedModel; pass its folder, ",
    "notes.txt": "is not a directory; a SavedModel is one",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_told_by_its_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(Error) as caught:
        require_model(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} is ")
    assert FILES[name] in str(caught.value)


def test_a_prefix_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ckpt-3.index").touch()
    for path in (tmp_path / "ckpt-3", tmp_path):
        with pytest.raises(Error, match="is a checkpoint, which holds values and no graph"):
            require_model(path)


def test_a_folder_above_or_below(tmp_path: Path) -> None:
    for version in range(1, 6):
        (tmp_path / str(version) / "variables").mkdir(parents=True)
        (tmp_path / str(version) / "saved_model.pb").touch()
    with pytest.raises(Error, match="holds SavedModels in 1, 2, 3 and 2 more; pass the folder of one"):
        require_model(tmp_path)
    with pytest.raises(Error, match=f"pass the folder above it, {tmp_path / '1'}"):
        require_model(tmp_path / "1" / "variables")
    assert require_model(tmp_path / "1") == tmp_path / "1" / "saved_model.pb"


def test_what_is_nothing_of_that(tmp_path: Path) -> None:
    with pytest.raises(Error, match="nowhere does not exist"):
        require_model(tmp_path / "nowhere")
    with pytest.raises(Error, match=r"holds no saved_model\.pb, so it is not a SavedModel"):
        require_model(tmp_path)

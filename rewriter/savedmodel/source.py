"""Source paths: a directory that holds a SavedModel, or a sentence on what is there and what to do."""

from __future__ import annotations

from pathlib import Path

from rewriter.ir import Error

MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")
"""Names of the graph's file, binary and text; if both exist, TensorFlow reads the binary one."""

EXPORT = "load it and call model.export(dir), or in Keras 2 model.save(dir, save_format='tf')"
GRAPH = "graph without a SavedModel around it; import it and save it with tf.saved_model.save"
KINDS = {
    ".keras": f"is a Keras model: {EXPORT}",
    ".h5": f"is a Keras model or its weights: {EXPORT}",
    ".hdf5": f"is a Keras model or its weights: {EXPORT}",
    ".tflite": "is a LiteRT model; pass the SavedModel that it was converted from",
    ".onnx": "is an ONNX model; pass the SavedModel that it was converted from",
    ".pb": f"is a {GRAPH}",
    ".pbtxt": f"is a {GRAPH}",
    ".meta": "is a checkpoint's graph; restore both in a session and save them with tf.compat.v1.saved_model.Builder",
}
"""Other files that hold models, by their endings, each with what it is and what to do."""
CHECKPOINT = (
    "is a checkpoint, which holds values and no graph; restore it in the program that makes the model, and call "
    "model.export(dir)"
)
NO_DIRECTORY = "is not a directory; a SavedModel is one, with a file saved_model.pb in it"
LISTED = 3
"""Largest number of folders that a message names."""


def require_model(path: Path) -> Path:
    """Return the file with a SavedModel's graph.

    Raises:
        Error: the path is no directory with such a file, or TensorFlow cannot read a path with this name.
    """
    refuse_name(path)
    for name in MODEL_FILES:
        if (path / name).is_file():
            return path / name
    raise Error(f"{path} {_folder(path) if path.is_dir() else _file(path)}")


def refuse_name(path: Path) -> None:
    """Refuse a path that TensorFlow cannot read or write.

    Raises:
        Error: its name is not UTF-8, or holds a bracket.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise Error(f"{path} is not UTF-8, and TensorFlow takes no other paths") from None
    if "[" in str(path):
        raise Error(f"{path} holds [, which TensorFlow takes for the beginning of a pattern")


def _file(path: Path) -> str:
    """Return what a path that is no directory holds, and what to do."""
    if path.with_name(f"{path.name}.index").is_file() or (path.is_file() and path.suffix == ".index"):
        return CHECKPOINT
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return NO_DIRECTORY
    if path.name in MODEL_FILES:
        return f"is a file of a SavedModel; pass its folder, {path.parent}"
    return KINDS.get(path.suffix.lower(), NO_DIRECTORY)


def _folder(path: Path) -> str:
    """Return what a directory without a graph's file holds, and what to do."""
    if path.name == "variables" and any((path.parent / name).is_file() for name in MODEL_FILES):
        return f"is part of a SavedModel; pass the folder above it, {path.parent}"
    models = sorted({file.parent.name for name in MODEL_FILES for file in path.glob(f"*/{name}")})
    if models:
        more = f" and {len(models) - LISTED} more" if len(models) > LISTED else ""
        return f"holds SavedModels in {', '.join(models[:LISTED])}{more}; pass the folder of one"
    if any(path.glob("*.index")):
        return CHECKPOINT
    return "holds no saved_model.pb, so it is not a SavedModel"

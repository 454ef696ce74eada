"""Loading a model."""

from __future__ import annotations

import os
from pathlib import Path

from onnx import ModelProto

from onnxq.model.boundary import build
from onnxq.model.checks import check_structure
from onnxq.model.inline import inline_functions
from onnxq.model.reader import as_path, copy_of, read_file
from onnxq.model.text import check_text
from onnxq.model.types import Model


def load(source: str | os.PathLike[str] | ModelProto) -> Model:
    """Load a model from a path, or from a `ModelProto`, which is not modified.

    External data stay on disk and are memory-mapped when somebody asks for values. Functions of
    the model are inlined. Nodes out of topological order are sorted.

    Raises:
        ModelError: the file cannot be read, is no valid ONNX model, or holds something that
            onnx-graphsurgeon would corrupt.

    """
    if isinstance(source, ModelProto):
        path: Path | None = None
        where, proto = "model in memory", copy_of(source)
    else:
        path = as_path(source)
        where, proto = str(path), read_file(path)
    check_text(proto, where)
    proto = inline_functions(proto, where)
    check_structure(proto, where)
    return build(proto, where, path)

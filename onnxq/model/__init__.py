"""The boundary between model files and the working graph.

model = load("model.onnx")      # nothing of the file is lost
...                             # passes edit model.graph
save(model, "out.onnx")         # all or nothing
"""

from onnxq.model.boundary import constant, refilled, renamed
from onnxq.model.evaluate import element_type, evaluate
from onnxq.model.opset import raise_opset
from onnxq.model.properties import get_properties, set_properties
from onnxq.model.read import load
from onnxq.model.types import (
    Model,
    get_metadata,
    graphs,
    is_constant,
    is_initializer,
    set_metadata,
    values,
)
from onnxq.model.write import save, to_proto

__all__ = [
    "Model",
    "constant",
    "element_type",
    "evaluate",
    "get_metadata",
    "get_properties",
    "graphs",
    "is_constant",
    "is_initializer",
    "load",
    "raise_opset",
    "refilled",
    "renamed",
    "save",
    "set_metadata",
    "set_properties",
    "to_proto",
    "values",
]

"""The one place where onnx-graphsurgeon (gs) makes its objects: graphs from files, and constants.

gs's own exporter is not used at all: see export.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, OperatorSetIdProto, TensorProto
from onnx.helper import OP_SET_ID_VERSION_MAP
from onnx_graphsurgeon.logger import G_LOGGER

from onnxq.errors import ModelError
from onnxq.model.dtypes import DATA_TYPE, WIDE, Array
from onnxq.model.export import STUB
from onnxq.model.external import is_external, locate
from onnxq.model.protos import bodies
from onnxq.model.stash import Attacher, Holder
from onnxq.model.stored import Stored, to_tensor
from onnxq.model.types import Model, Source


@contextmanager
def quiet() -> Iterator[None]:
    """Silence gs's log, here only: what it calls critical it also raises."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL + 1
    try:
        yield
    finally:
        G_LOGGER.severity = severity


def build(
    proto: ModelProto, where: str, path: Path | None, held: list[Holder] | None = None
) -> Model:
    """A model around a checked proto, which it takes over; stubs take their data from `held`.

    Raises:
        ModelError: gs cannot import the model, or an external tensor is not there.

    """
    file = path.absolute() if path is not None else None
    folder = file.parent if file is not None else None
    files: set[Path] = set()

    def resolve(tensor: TensorProto) -> Holder:
        if not is_external(tensor):
            return Stored(tensor)
        location = tensor.external_data[0].value if tensor.external_data else ""
        if held is not None and location.startswith(STUB):
            holder = held[int(location.removeprefix(STUB))]
            if isinstance(holder, Stored):  # its own object: `overridable` differs per model
                return Stored(holder.tensor, holder.file, holder.offset)
            return holder
        data_file, offset = locate(tensor, folder, where)
        files.add(data_file)
        return Stored(tensor, data_file, offset)

    shown = _hide_binary_strings(proto)
    try:
        with quiet():
            graph = gs.import_onnx(shown)
    except Exception as error:  # gs raises whatever comes; a file must never end in a traceback
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{where}: onnx-graphsurgeon cannot import the model: {reason}") from error
    initializers = {tensor.name for tensor in proto.graph.initializer}
    initializers |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    overridable = {value.name for value in proto.graph.input if value.name in initializers}
    Attacher(resolve, overridable).graph(graph, proto.graph)
    imports = [OperatorSetIdProto.FromString(e.SerializeToString()) for e in proto.opset_import]
    opset = _opset(proto)
    for inner in (graph, *graph.subgraphs(recursive=True)):
        inner.import_domains, inner.opset = imports, opset
    graph.ir_version = proto.ir_version
    return Model(graph, path, overridable, Source(proto, file, frozenset(files)))


def _opset(proto: ModelProto) -> int:
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    if proto.ir_version < 3:
        return 1
    table = OP_SET_ID_VERSION_MAP.items()
    return max(v for (domain, v), ir in table if domain == "ai.onnx" and ir <= proto.ir_version)


def _hide_binary_strings(proto: ModelProto) -> ModelProto:
    """Gs decodes every string as UTF-8; it is shown a model without those that are not."""
    if not _has_binary(proto.graph):
        return proto
    shown = ModelProto()
    shown.CopyFrom(proto)
    _drop_binary(shown.graph)
    return shown


def _binary(attribute: AttributeProto) -> bool:
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return True
    return False


def _has_binary(graph: GraphProto) -> bool:
    return any(
        any(_binary(attribute) for attribute in node.attribute)
        or any(_has_binary(body) for _, body in bodies(node))
        for node in graph.node
    )


def _drop_binary(graph: GraphProto) -> None:
    for node in graph.node:
        for index in reversed(range(len(node.attribute))):
            if _binary(node.attribute[index]):
                del node.attribute[index]
        for _, body in bodies(node):
            _drop_binary(body)


def constant(name: str, array: Array, *, data_type: int | None = None) -> Any:
    """A new `gs.Constant`.

    `data_type` is an `onnx.TensorProto` element type. INT4, UINT4, INT2 and UINT2 take an int8 or
    uint8 array of the logical shape and are packed as onnx packs them; other types are cast
    (integers only if every value fits). Without it the array's own dtype decides, and the array
    is not copied.

    Raises:
        ModelError: a value does not fit, or ONNX has no such element type.

    """
    array = np.asarray(array)
    if data_type is None and (DATA_TYPE.get(array.dtype) in WIDE or array.dtype.kind in "US"):
        return gs.Constant(name, Stored(to_tensor(name, array)))
    if data_type is None:
        if array.dtype not in DATA_TYPE and array.dtype.kind != "O":
            raise ModelError(f"tensor {name!r}: ONNX has no element type for numpy's {array.dtype}")
        return gs.Constant(name, array)
    return gs.Constant(name, Stored(to_tensor(name, array, data_type)))


def renamed(constant: Any, name: str) -> Any:
    """A new `gs.Constant` with the data and element type of another one, which is left as it is."""
    held = constant._values
    if isinstance(held, Stored):
        held = Stored(held.tensor, held.file, held.offset)
    return gs.Constant(name, held)


def refilled(constant: Any, array: Array) -> Any:
    """A new `gs.Constant` with the name and element type of another one, and other values.

    Raises:
        ModelError: a value does not fit.

    """
    held = constant._values
    data_type = held.tensor.data_type if isinstance(held, Stored) else None
    return gs.Constant(constant.name, Stored(to_tensor(constant.name, array, data_type)))

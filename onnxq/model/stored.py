"""Values of a constant as they lie in a file: a `TensorProto`, embedded or in an external file.

`Stored` takes the place of gs's own lazy values, so that nothing is converted, cached or renamed
before somebody asks, and external bytes stay on disk.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from onnx import SparseTensorProto, TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxq.errors import ModelError
from onnxq.model.dtypes import (
    BITS,
    DATA_TYPE,
    DTYPE,
    WIDE,
    Array,
    integer_range,
    pack,
    raw_size,
    sign_extend,
    type_name,
    unpack,
)

Bytes = npt.NDArray[np.uint8]
_TYPED = {  # where a value without raw_data lies, and the width of one entry there
    "float_data": "<f4",
    "double_data": "<f8",
    "int64_data": "<i8",
}


class Stored(LazyValues):  # type: ignore[misc]  # gs is untyped
    """Lazy values of one initializer or tensor attribute."""

    def __init__(
        self,
        tensor: TensorProto,
        file: Path | None = None,
        offset: int = 0,
        overridable: tuple[Collection[str], str] | None = None,
    ) -> None:
        super().__init__(tensor)
        self.shape = tuple(tensor.dims)
        self.file = file
        self.offset = offset
        # (names that are still graph inputs, own name): shared with the model, so that dropping a
        # name from the model's set freezes the constant at once
        self.overridable = overridable

    def load(self) -> Array:
        """What gs caches when somebody reads `.values`: the exact ONNX element type."""
        array = read_stored(self)
        if self.tensor.data_type in WIDE:
            array = array.astype(DTYPE[self.tensor.data_type])
        return np.array(array)


def raw(stored: Stored) -> Bytes:
    """The bytes of a tensor as a file holds them (sub-byte types packed), mapped when external.

    Raises:
        ModelError: the bytes are missing, or not as many as type and shape need.

    """
    tensor = stored.tensor
    size = raw_size(tensor.data_type, tensor.dims)
    if stored.file is not None:
        return _mapped(stored.file, stored.offset, size)
    if tensor.HasField("raw_data"):
        data = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        data = _typed(tensor)
    if data.size != size:
        raise ModelError(
            f"tensor {tensor.name!r}: {data.size} bytes of data, but {type_name(tensor.data_type)} "
            f"of shape {list(tensor.dims)} needs {size}; the model is damaged, export it again"
        )
    return data


def raw_of(name: str, holder: Any) -> Bytes:
    """`raw` for whatever a constant holds; an array of a whole-byte type is not copied.

    Raises:
        ModelError: the bytes are missing, or ONNX has no such element type.

    """
    if isinstance(holder, Stored):
        return raw(holder)
    array = np.asarray(holder)
    code = DATA_TYPE.get(array.dtype)
    if code is not None and BITS[code] >= 8:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.frombuffer(to_tensor(name, array).raw_data, np.uint8)


def _mapped(file: Path, offset: int, size: int) -> Bytes:
    if size == 0:
        return np.empty(0, np.uint8)
    try:
        return np.memmap(file, np.uint8, "r", offset, (size,))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read external data file {file}: {error}") from error


def _typed(tensor: TensorProto) -> Bytes:
    for field, entry in _TYPED.items():
        if len(getattr(tensor, field)):
            return np.asarray(getattr(tensor, field), entry).view(np.uint8)
    bits = BITS[tensor.data_type]
    if len(tensor.uint64_data):
        return np.asarray(tensor.uint64_data, "<u8").astype(f"<u{bits // 8}").view(np.uint8)
    entry = f"<i{max(bits, 8) // 8}"  # sub-byte: one entry holds one packed byte
    if bits < 8 or not len(tensor.int32_data):
        entry = "<i1"
    return np.asarray(tensor.int32_data, "<i4").astype(entry).view(np.uint8)


def read_stored(stored: Stored) -> Array:
    """Read-only values; integers below one byte as int8 or uint8, other types as they are."""
    tensor = stored.tensor
    if tensor.data_type == TensorProto.STRING:
        return _frozen(cast(Array, numpy_helper.to_array(tensor)))
    data = raw(stored)
    dims, bits = tuple(tensor.dims), BITS[tensor.data_type]
    if bits == 6:  # four values in three bytes: rare enough to leave it to onnx
        whole = TensorProto(dims=dims, data_type=tensor.data_type, raw_data=data.tobytes())
        return _frozen(cast(Array, numpy_helper.to_array(whole)))
    if bits < 8:
        fields = unpack(data, bits, prod(dims))
        wide = WIDE.get(tensor.data_type)
        if wide is None:
            return _frozen(fields.view(DTYPE[tensor.data_type]).reshape(dims))
        signed = sign_extend(fields, bits) if wide.kind == "i" else fields
        return _frozen(signed.reshape(dims))
    return _frozen(data.view(DTYPE[tensor.data_type]).reshape(dims))


def read(values: Any) -> Array:
    """Read-only values of whatever a `gs.Constant` holds; nothing is cached."""
    if isinstance(values, Stored):
        return read_stored(values)
    if isinstance(values, SparseValues):
        return _frozen(_dense(values.tensor))
    if isinstance(values, LazyValues):
        return read_stored(Stored(values.tensor))
    array = np.asarray(values)
    wide = WIDE.get(DATA_TYPE.get(array.dtype, 0))
    return _frozen(array.astype(wide) if wide is not None else array)


def _frozen(array: Array) -> Array:
    view: Array = array.view()
    view.flags.writeable = False
    return view


def _dense(sparse: SparseTensorProto) -> Array:
    entries = read_stored(Stored(sparse.values))
    indices = read_stored(Stored(sparse.indices)).astype(np.int64)
    dense = np.zeros(tuple(sparse.dims), entries.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = entries
    else:
        dense[tuple(indices.T)] = entries
    return dense


def to_tensor(name: str, array: Array, data_type: int | None = None) -> TensorProto:
    """A `TensorProto` with raw data, packed as onnx packs it.

    Raises:
        ModelError: the array does not fit `data_type`, or has a dtype that ONNX does not have.

    """
    array = np.asarray(array)
    if array.dtype.kind in "OUS":
        # numpy_helper writes object arrays of str or bytes as string_data
        return numpy_helper.from_array(array.astype(object), name)
    code = DATA_TYPE.get(array.dtype) if data_type is None else data_type
    if code is None:
        raise ModelError(f"tensor {name!r}: ONNX has no element type for numpy's {array.dtype}")
    if code not in BITS:
        raise ModelError(f"tensor {name!r}: cannot store values as {type_name(code)}")
    fitted = _fit(name, array, code)
    if BITS[code] == 6:
        return numpy_helper.from_array(fitted, name)
    if BITS[code] < 8:
        data = pack(fitted if code in WIDE else fitted.view(np.uint8), BITS[code])
    else:
        data = fitted.tobytes()
    return TensorProto(name=name, data_type=code, dims=array.shape, raw_data=data)


def _fit(name: str, array: Array, code: int) -> Array:
    """`array` in the dtype that holds `code`, after a check that no integer changes its value."""
    target = WIDE.get(code, DTYPE[code])
    if array.dtype == target and code not in WIDE:
        return array
    if DATA_TYPE.get(array.dtype) in WIDE:  # ml_dtypes' int4 and kin: no arithmetic of their own
        array = array.astype(WIDE[DATA_TYPE[array.dtype]])
    if target.kind in "iu":
        low, high = integer_range(code)
        if array.dtype.kind not in "iu":
            raise ModelError(
                f"tensor {name!r}: {type_name(code)} needs an integer array, not {array.dtype}"
            )
        if array.size and (int(array.min()) < low or int(array.max()) > high):
            raise ModelError(
                f"tensor {name!r}: values {array.min()} .. {array.max()} do not fit in "
                f"{type_name(code)} ({low} .. {high})"
            )
    return array.astype(target)

"""Names and texts must be UTF-8: protobuf takes in other bytes, and fails when asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from onnx import ModelProto, TensorProto

from onnxq.errors import ModelError

_TENSOR_TEXT = ("name", "doc_string")


def check_text(proto: ModelProto, where: str) -> None:
    """Ask for every text of the model once.

    Raises:
        ModelError: one of them is not UTF-8.

    """
    try:
        good = _good(proto)
    except UnicodeDecodeError:
        good = False
    if not good:
        raise ModelError(
            f"{where}: a name or text is not UTF-8: the file is damaged, copy or export it again"
        )


def _good(message: Any) -> bool:
    if isinstance(message, TensorProto):  # its data are no text, and may be large
        return all(isinstance(getattr(message, name), str) for name in _TENSOR_TEXT)
    for field, value in message.ListFields():
        several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        parts = value if several else (value,)
        if field.message_type is not None:
            good = all(map(_good, parts))
        else:  # protobuf hands over text that is not UTF-8 as bytes
            text = field.type == FieldDescriptor.TYPE_STRING
            good = not text or all(isinstance(part, str) for part in parts)
        if not good:
            return False
    return True

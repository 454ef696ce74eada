"""Running a float model on calibration samples and handing out its inner tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from onnxq.errors import CalibrationError, ValidationError
from onnxq.feeds import Feed
from onnxq.model import Model, to_proto
from onnxq.passes.observation import Observe
from onnxq.session import first_line

Array = npt.NDArray[Any]
Failing = Callable[[int, ValidationError], CalibrationError]

# Outputs of one run, estimated from the first sample; a single tensor may be larger.
BYTES_PER_RUN = 256 * 2**20
# Tensors that one run on the first sample hands out, before their sizes are known.
FIRST_TENSORS = 16


def observer(model: Model, feeds: Iterable[Feed], failing: Failing) -> Observe:
    """A way to see inner tensors of a model on samples; see `passes.observation.Observe`.

    Args:
        model: float model; it may be changed after this call.
        feeds: can be iterated again and again: once for every BYTES_PER_RUN of tensors per sample.
        failing: the error that names sample number i of `feeds`, on which the model fails.

    The values are those of onnxruntime without fusions, so that every tensor exists.
    """
    proto = to_proto(model)

    def observe(names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        for part in _parts(proto, names, feeds, failing):
            yield from _values(proto, part, feeds, failing)

    return observe


def _parts(
    proto: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feed], failing: Failing
) -> list[list[str]]:
    """The names in portions of at most BYTES_PER_RUN; the first sample tells the sizes."""
    if len(names) <= FIRST_TENSORS:
        return [list(names)] if names else []
    parts: list[list[str]] = [[]]
    filled = 0
    for start in range(0, len(names), FIRST_TENSORS):
        some = names[start : start + FIRST_TENSORS]
        first = next(_values(proto, some, feeds, failing), None)
        if first is None:  # no samples
            return []
        for name in some:
            size = first[name].nbytes
            if parts[-1] and filled + size > BYTES_PER_RUN:
                parts.append([])
                filled = 0
            parts[-1].append(name)
            filled += size
    return parts


def _values(
    proto: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feed], failing: Failing
) -> Iterator[dict[str, Array]]:
    inputs = {value.name for value in proto.graph.input}
    wanted = [name for name in names if name not in inputs]
    session = _session(proto, wanted)
    for index, feed in enumerate(feeds):
        try:
            found = session.run(wanted, feed) if wanted else []
        except Exception as error:  # onnxruntime raises many unrelated types
            raise failing(index, ValidationError(first_line(error))) from None
        values = dict(zip(wanted, map(np.asarray, found), strict=True))
        yield {name: values[name] if name in values else feed[name] for name in names}


def _session(proto: onnx.ModelProto, wanted: Sequence[str]) -> ort.InferenceSession:
    given = {value.name for value in proto.graph.output}
    count = len(proto.graph.output)
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in given)
    try:
        serialized = proto.SerializeToString()
    finally:
        del proto.graph.output[count:]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(
            serialized, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # onnxruntime raises many unrelated types
        raise CalibrationError(
            f"the float model cannot be observed in onnxruntime: {first_line(error)}"
        ) from None

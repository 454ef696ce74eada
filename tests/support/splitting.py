"""Models to split, and a split model run by hand: no threads, one sum at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import onnx
from expanding import rewritten
from small import model, run, weights

from onnxq import parts as onnxq_parts
from onnxq.model import load, to_proto
from onnxq.passes import SelectNodes
from onnxq.passes.split_parts import SplitModel, split_parts

Array = np.ndarray
Sum = Callable[[Sequence[Array]], Array]


def chain(*, batch: str = "1") -> onnx.ModelProto:
    """x -> Conv `one` -> Relu -> Conv `two` -> Add of the Relu's output -> y, both with bias."""
    return model(
        f"""g (float[{batch},3,6,6] x) => (float[{batch},3,6,6] y) {{
            [one] a = Conv <pads = [1,1,1,1]> (x, v, b)
            [relu] r = Relu (a)
            [two] c = Conv <pads = [1,1,1,1]> (r, w, b)
            [skip] y = Add (c, r)
        }}""",
        {
            "v": weights(3, 3, 3, 3, scale=0.3),
            "w": weights(3, 3, 3, 3, seed=2, scale=0.3),
            "b": weights(3, seed=1),
        },
    )


def quantized(
    proto: onnx.ModelProto, terms: int | Mapping[str, int] = 2, **options: object
) -> onnx.ModelProto:
    """The model in parallel layout; `terms` may differ by node."""
    most = terms if isinstance(terms, int) else max(terms.values())
    plan = SelectNodes(terms=most, **options)(load(proto))  # type: ignore[arg-type]
    if not isinstance(terms, int):
        for i, entry in enumerate(plan.nodes):
            if entry.name in terms:
                plan.nodes[i] = entry.model_copy(update={"terms": terms[entry.name]})
    return to_proto(rewritten(proto, plan).model)


def split(proto: onnx.ModelProto, parts: int = 2) -> SplitModel:
    """The split of a model in memory."""
    return split_parts(load(proto), parts)


def in_order(partials: Sequence[Array]) -> Array:
    """The sum as the single file takes it."""
    return reduce(add, partials)


def run_split(
    made: SplitModel, feed: Mapping[str, Array], outputs: Sequence[str], total: Sum = in_order
) -> list[Array]:
    """Outputs of part 0; `total` adds up the partial sums. Unoptimised."""
    known: list[dict[str, Array]] = [dict(feed) for _ in made.stages[0]]
    for stages, sums in zip(made.stages, made.sums, strict=True):
        for stage, own in zip(stages, known, strict=True):
            if stage.model is not None:
                given = {name: own[name] for name in stage.inputs}
                found = run(to_proto(stage.model), given, optimize=False)
                own.update(zip(stage.outputs, found, strict=True))
        for each in sums:
            name = each.output.name
            shares = [
                own[stage.partials[name]]
                for stage, own in zip(stages, known, strict=True)
                if name in stage.partials
            ]
            for own in known:
                own[name] = total(shares)
    return [known[0][name] for name in outputs]


def split_to(folder: Path, whole: onnx.ModelProto, parts: int = 2) -> Path:
    """The split of a model, in files; says where."""
    onnx.save(whole, folder / "whole.onnx")
    onnxq_parts.split(folder / "whole.onnx", folder / "out", parts=parts)
    return folder / "out"

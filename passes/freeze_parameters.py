"""Weights that an old exporter listed as graph inputs become plain initializers."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.model import Model, graphs
from onnxq.passes.base import PassResult
from onnxq.passes.parameters import parameter_slots


@dataclass(frozen=True)
class FreezeParameters:
    """Stop listing trained parameters as graph inputs.

    IR version 3 required every initializer to be an input too, and some exporters went on doing
    it; from IR 4 on that means "may be overridden at run time", which forbids onnxruntime to fold
    it and onnxq to quantize it. Initializers that feed anything else stay overridable.

    Given:   initializer W, also a graph input, read only as a parameter (Conv, BatchNormalization…)
    Result:  initializer W
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        if not model.overridable:
            return PassResult()
        read_as: dict[str, list[bool]] = {name: [] for name in model.overridable}
        for _, graph in graphs(model):
            for node in graph.nodes:
                for i, tensor in enumerate(node.inputs):
                    if tensor.name in read_as:
                        read_as[tensor.name].append(i in parameter_slots(node))
        frozen = [name for name, uses in read_as.items() if all(uses)]
        model.overridable.difference_update(frozen)
        kept = set(read_as) - set(frozen)
        return PassResult(
            tuple(sorted(frozen)),
            dict.fromkeys(sorted(kept), "an overridable input that is no trained parameter"),
        )

"""A float model whose weights are inputs: any combination of weights runs in one session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto

from onnxq.model import Model, to_proto
from onnxq.passes.edit import Names
from onnxq.passes.search_scales import match_plan
from onnxq.passes.weights import Weight
from onnxq.plan import Plan


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model that reads the weights of planned nodes from inputs.

    Attributes:
        proto: the model; it does not hold these weights.
        inputs: name of a plan's entry -> name of the input, float32 of the weight's stored shape.
        weights: name of a plan's entry -> the weight as it stands in the model.
    """

    proto: ModelProto
    inputs: Mapping[str, str]
    weights: Mapping[str, Weight]


def open_weights(model: Model, plan: Plan) -> OpenModel:
    """Make an input of the weight of every node that the plan quantizes.

    Every node has an input of its own, also where several share a weight, so that they may be told
    apart; nodes in bodies of If, Loop and Scan read it from the graph around them. `model` is as it
    was before when this returns.

    Given:   Conv(x, W), W constant
    Result:  Conv(x, probe), probe an input

    Raises:
        ConfigError: the plan was made for another model.
        ModelError: what remains passes protobuf's 2 GiB.
    """
    sites = match_plan(model, plan)
    names = Names(model)
    opened: dict[str, gs.Variable] = {}
    given = len(model.graph.inputs)
    try:
        for entry, (candidate, weight) in sites:
            made = gs.Variable(
                names.tensor(f"{entry.name}/probe"), dtype=np.float32, shape=list(weight.shape)
            )
            candidate.node.inputs[weight.slot] = made
            model.graph.inputs.append(made)
            opened[entry.name] = made
        proto = to_proto(model)
    finally:
        for entry, (candidate, weight) in sites:
            if entry.name in opened:
                candidate.node.inputs[weight.slot] = weight.tensor
        del model.graph.inputs[given:]
    proto.ir_version = max(proto.ir_version, 4)  # earlier ones want every initializer as an input
    return OpenModel(
        proto,
        {name: variable.name for name, variable in opened.items()},
        {entry.name: weight for entry, (_, weight) in sites},
    )

"""HardSwish as its two parts, of which static compute has 8-bit kernels."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.model import Model, graphs
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names, remove_node


@dataclass(frozen=True)
class SplitHardSwish:
    """Write HardSwish as the product that defines it (ONNX operators, HardSwish-14).

    Given:   y = HardSwish(x)
    Result:  y = Mul(x, HardSigmoid(x) with alpha 1/6 and beta 1/2)

    onnxruntime does the same when it loads a model, so that nothing is lost in float.
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        found = [
            (graph, node)
            for _, graph in graphs(model)
            for node in graph.nodes
            if node.op == "HardSwish" and node.domain in (None, "", "ai.onnx")
        ]
        rewritten = tuple(node.name for _, node in found)
        for graph, node in found:
            builder = Builder(graph, node, names, "split_hard_swish")
            x, y, name = node.inputs[0], node.outputs[0], node.name
            remove_node(graph, node)
            names.free_node(name)
            attrs = {"alpha": 1 / 6, "beta": 0.5}
            gate = builder.add("HardSigmoid", f"{name}/gate", [x], attrs=attrs)
            builder.add("Mul", name, [x, gate], output=y)
        return PassResult(rewritten)

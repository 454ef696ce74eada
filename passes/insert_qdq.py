"""Static integer compute: Q/DQ pairs at the tensors whose ranges a plan states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import ConfigError
from onnxq.kernels_ref import activation_params
from onnxq.model import Model, get_metadata, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.edit import (
    Builder,
    Names,
    consumers,
    is_graph_output,
    remove_node,
    replace_input,
)
from onnxq.passes.forms import type_pair
from onnxq.passes.integer_ops import activation_bounds, data_inputs, hard_sigmoid, integer_op
from onnxq.passes.lower_static import input_scale, static_bias
from onnxq.passes.quantize_activations import REST
from onnxq.passes.ranks import tensor_shapes
from onnxq.passes.static_matmul import bias_add, bias_of, is_gemm
from onnxq.plan import Plan

# Of a step; what float32 makes of a level that SearchRanges has put on a step is far less.
_ALIGNED = 0.01


@dataclass(frozen=True)
class InsertQDQ:
    """Quantize each tensor that has a static range, once, behind what writes it.

    Given:   x -> Conv (from Expand) -> Relu -> MaxPool -> …, ranges of x, the Relu's and the
             MaxPool's output
    Result:  x -> QuantizeLinear -> DequantizeLinear -> Conv -> QuantizeLinear -> … : one pair per
             tensor; a Relu or Clip that the range implies is taken out, and its tensor stays

    Integer nodes read the pair. So do all others, if an integer node writes the tensor: its float
    value would cost a float node; else they go on reading the float tensor. Outputs of the graph
    stay float and keep their names. MatMul + bias takes the forms of `static_matmul`.
    """

    plan: Plan

    def __call__(self, model: Model) -> PassResult:
        """Rewrite the main graph of `model`, which Expand has left, in place.

        Raises:
            ConfigError: the plan's ranges name a tensor that the model does not have.
        """
        if not self.plan.ranges:
            return PassResult()
        return _Insertion(model, self.plan).run()


@dataclass(eq=False)
class _Insertion:
    model: Model
    plan: Plan
    scalars: dict[str, Any] = field(default_factory=dict)
    rewritten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = self.model.graph
        self.names = Names(self.model)
        self.static = {n.name for n in self.plan.quantized if n.activations == "static"}
        targets = {n.target for n in self.plan.quantized if n.activations == "static"}
        self.signed = all(type_pair("Conv", "static", 8, t).activation == "int8" for t in targets)
        self.kind = np.int8 if self.signed else np.uint8

    def run(self) -> PassResult:
        self._join_biases()
        split = {get_metadata(node).get(REST) for node in self.graph.nodes}
        chosen = {id(t) for name, t in self._tensors().items() if name not in split}
        for tensor in list(self._tensors().values()):
            self._absorb(tensor, chosen)
        tensors = self._tensors()
        missing = [name for name in self.plan.ranges if name not in tensors]
        if missing:
            raise ConfigError(
                f"plan: ranges has a tensor {missing[0]!r}, which the model does not have; make "
                "the plan again with --calibration"
            )
        # Decided before any pair is there, since pairs change what a node reads.
        integer = {id(n): n for n in self.graph.nodes if self._is_integer(n, chosen)}
        for tensor in list(tensors.values()):  # in graph order
            self._insert(tensor, integer)
        return PassResult(tuple(self.rewritten))

    def _tensors(self) -> dict[str, Any]:
        found = {t.name: t for t in self.graph.inputs}
        found.update((t.name, t) for node in self.graph.nodes for t in node.outputs)
        return {name: t for name, t in found.items() if name in self.plan.ranges}

    def _is_static(self, node: gs.Node) -> bool:
        """Whether a node is the one integer kernel of a static node."""
        return node.op in ("Conv", "MatMul", "Gemm") and (
            get_metadata(node).get("onnxq.node") in self.static
        )

    def _is_integer(self, node: gs.Node, chosen: set[int]) -> bool:
        if self._is_static(node):
            return True
        op = integer_op(node)
        if op is None:
            return False
        return all(id(t) in chosen for t in (*data_inputs(node, op), *node.outputs))

    # ---------------------------------------------------------------- MatMul + bias

    def _join_biases(self) -> None:
        static = [n for n in self.graph.nodes if n.op == "MatMul" and self._is_static(n)]
        pairs = [
            (n, add)
            for n in static
            if n.outputs[0].name not in self.plan.ranges
            and (add := bias_add(self.model, n)) is not None
        ]
        shapes = tensor_shapes(self.model) if pairs else {}
        for node, add in pairs:
            if is_gemm(self.model, node, shapes):
                self._write_gemm(node, add)
            elif (
                len(shapes.get(node.inputs[0].name, ())) > 2
                and None not in shapes[node.inputs[0].name]
            ):
                self._hide_bias(node, add)

    def _write_gemm(self, node: gs.Node, add: gs.Node) -> None:
        name = get_metadata(node)["onnxq.node"]
        builder = Builder(self.graph, add, self.names, "insert_qdq", self.scalars)
        x_scale = input_scale(name, node.inputs[0].name, self.plan.ranges)
        weight = node.inputs[1].inputs[0]
        columns = values(weight.inputs[1])
        row = np.broadcast_to(bias_of(node, add).reshape(-1), columns.shape)
        bias = static_bias(builder, node.name, row, x_scale * columns)
        inputs, metadata = [*node.inputs, bias], get_metadata(node)
        output = add.outputs[0]
        self.rewritten += [node.name, add.name]
        self.names.free_node(node.name)
        builder.back(1)
        node_name = node.name
        remove_node(self.graph, node)
        remove_node(self.graph, add)
        builder.add("Gemm", node_name, inputs, output=output, metadata=metadata)

    def _hide_bias(self, node: gs.Node, add: gs.Node) -> None:
        """Write a bias [N] as [1, N], which onnxruntime's MatMul + Add fusion does not take."""
        bias = bias_of(node, add)
        if bias.ndim != 1:
            return
        builder = Builder(self.graph, add, self.names, "insert_qdq", self.scalars)
        slot = 1 if add.inputs[0] is node.outputs[0] else 0
        add.inputs[slot] = builder.constant(f"{add.inputs[slot].name}/row", bias[None])
        self.rewritten.append(add.name)

    # ---------------------------------------------------------------- Relu and Clip

    def _absorb(self, tensor: Any, chosen: set[int]) -> None:
        """Let what is before a Relu or Clip write its output, if saturation does the same.

        It does for an integer kernel, whose output all read quantized; and behind a float node
        where all that read it quantize it.
        """
        node = tensor.inputs[0] if tensor.inputs else None
        bounds = None if node is None else activation_bounds(node)
        if node is None or bounds is None or not self._saturates(tensor.name, bounds):
            return
        before = node.inputs[0]
        if not before.inputs or before.name in self.plan.ranges:
            return
        if len(consumers(before)) != 1 or is_graph_output(self.model, before):
            return
        producer = before.inputs[0]
        written = self._is_integer(producer, chosen | {id(before)})
        if not written and not self._all_quantize(tensor, chosen):
            return
        slot = next(i for i, t in enumerate(producer.outputs) if t is before)
        self.rewritten.append(node.name)
        remove_node(self.graph, node)
        producer.outputs[slot] = tensor

    def _all_quantize(self, tensor: Any, chosen: set[int]) -> bool:
        """Whether nothing reads the float values of a tensor that a float node writes."""
        return not is_graph_output(self.model, tensor) and all(
            self._quantizes(node, tensor) or self._is_integer(node, chosen)
            for node in consumers(tensor)
        )

    def _quantizes(self, node: gs.Node, tensor: Any) -> bool:
        """Whether a node brings a tensor to 8 bits with the scale of its range."""
        if node.op != "QuantizeLinear" or not is_constant(node.inputs[1]):
            return False
        return bool(values(node.inputs[1]) == self._params(tensor.name)[0])

    def _saturates(self, name: str, bounds: tuple[float, float]) -> bool:
        """Whether the quantized range lies within the bounds, but for half a step."""
        scale, zero_point = self._params(name)
        low, high = (-128, 127) if self.signed else (0, 255)
        lowest, highest = (low - zero_point) * scale, (high - zero_point) * scale
        low_fits = lowest >= bounds[0] - 0.51 * scale
        return bool(low_fits and highest <= bounds[1] + 0.51 * scale)

    def _params(self, name: str) -> tuple[np.float32, int]:
        return activation_params(*self.plan.ranges[name], signed=self.signed)

    # ---------------------------------------------------------------- pairs

    def _insert(self, tensor: Any, integer: dict[int, gs.Node]) -> None:
        producer = tensor.inputs[0] if tensor.inputs else None
        readers = [node for node in consumers(tensor) if not _is_own(node, tensor)]
        if producer is None or id(producer) not in integer:
            wide = producer is not None and _is_own(producer, tensor)  # in an earlier run
            readers = [node for node in readers if id(node) in integer and not wide]
            if readers:
                self._rewire(readers, tensor, self._pair(self._behind(producer), tensor))
            return
        op = integer_op(producer)
        if op is not None and op.plain:
            self._compute_on_integers(producer, tensor)
        elif is_graph_output(self.model, tensor):
            source = gs.Variable(self.names.tensor(f"{tensor.name}/float"))
            slot = next(i for i, t in enumerate(producer.outputs) if t is tensor)
            producer.outputs[slot] = source
            self._pair(self._behind(producer), tensor, source)
        elif readers:
            self._rewire(readers, tensor, self._pair(self._behind(producer), tensor))
        if producer.op in ("Relu", "HardSigmoid"):
            self._write_leaky_relu(producer, tensor)

    def _pair(self, builder: Builder, tensor: Any, source: Any = None) -> Any:
        """Quantize `tensor`; with a source, quantize that, and let the pair write `tensor`."""
        name = tensor.name
        scale, zero_point = self._params(name)
        params = [builder.scalar(scale), builder.scalar(self.kind(zero_point))]
        own = {"onnxq.tensor": name}
        source, output = (tensor, None) if source is None else (source, tensor)
        self.rewritten.append(name)
        q = builder.add("QuantizeLinear", f"{name}/quantized", [source, *params], metadata=own)
        return builder.add(
            "DequantizeLinear", f"{name}/dequantized", [q, *params], output=output, metadata=own
        )

    def _rewire(self, readers: list[gs.Node], old: Any, new: Any) -> None:
        for node in readers:
            replace_input(node, old, new)

    def _write_leaky_relu(self, node: gs.Node, tensor: Any) -> None:
        """Write a Relu or HardSigmoid as LeakyRelu, which onnxruntime looks up in a table.

        HardSigmoid is alpha·x + beta, saturated. Read with scale alpha·s and the zero point moved
        to where it is 0, the integers of x are that sum already, and LeakyRelu of slope 1 is
        identity; the pair behind it, of `tensor`, saturates at 0, and at 1 if its range ends there.
        HardSigmoid stays float where the range is otherwise, where x does not reach down to that
        zero point, and where that is no level of x.
        """
        if node.op == "Relu":
            node.op, node.attrs = "LeakyRelu", {"alpha": 0.0}
            return
        dequantize = node.inputs[0].inputs[0]
        q, scale, zero_point = dequantize.inputs[:3]
        alpha, beta = hard_sigmoid(node)
        step = float(values(scale))
        steps = beta / alpha / step
        moved = int(values(zero_point)) - round(steps)
        reached = moved >= (-128 if self.signed else 0) and abs(steps - round(steps)) <= _ALIGNED
        if not reached or not self._saturates(tensor.name, (0.0, 1.0)):
            return
        builder = Builder(self.graph, node, self.names, "insert_qdq", self.scalars)
        params = [builder.scalar(np.float32(alpha * step)), builder.scalar(self.kind(moved))]
        node.inputs = [builder.add("DequantizeLinear", f"{node.name}/sum", [q, *params])]
        node.op, node.attrs = "LeakyRelu", {"alpha": 1.0}
        self._drop_unread(dequantize)

    def _compute_on_integers(self, node: gs.Node, tensor: Any) -> None:
        """Move a Pad to the quantized tensor; it then adds zero points."""
        dequantize = node.inputs[0].inputs[0]
        scale, zero_point = dequantize.inputs[1:]
        builder = self._behind(node)
        quantized = builder.variable(f"{tensor.name}/quantized")
        axes = node.inputs[3:]
        node.inputs = [dequantize.inputs[0], node.inputs[1], zero_point, *axes]
        node.outputs = [quantized]
        builder.add(
            "DequantizeLinear",
            f"{tensor.name}/dequantized",
            [quantized, scale, zero_point],
            output=tensor,
            metadata={"onnxq.tensor": tensor.name},
        )
        self._drop_unread(dequantize)
        self.rewritten.append(tensor.name)

    def _drop_unread(self, node: gs.Node) -> None:
        """Take a DequantizeLinear out that has lost its last reader; onnxruntime would run it."""
        output = node.outputs[0]
        if not consumers(output) and not is_graph_output(self.model, output):
            remove_node(self.graph, node)

    def _behind(self, producer: gs.Node | None) -> Builder:
        before = self.graph.nodes[0] if producer is None else producer
        builder = Builder(self.graph, before, self.names, "insert_qdq", self.scalars)
        if producer is not None:
            builder.skip()
        return builder


def _is_own(node: gs.Node, tensor: Any) -> bool:
    """Whether the pass has put this node there, in an earlier run."""
    return get_metadata(node).get("onnxq.tensor") == str(tensor.name)

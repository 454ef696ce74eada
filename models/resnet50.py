"""Two networks of realistic shape with random weights, for speed, size and fidelity.

A random network says nothing about accuracy on a task, but its size, its latency and the distance
between its float and its quantized outputs are real, provided that its activations are: were they
to grow, vanish or die with depth, an error measured behind them would mean nothing. So a sample of
images runs through the network while it is built, in numpy, and each BatchNormalization gets the
statistics that its input really has, up to some noise: what training would have left there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # the one that goes with opset 17; older runtimes refuse a newer one
EPSILON = 1e-5
SAMPLE_COUNT = 16
SAMPLE_SIZE = 64  # independent of the model's image size: that changes no weight and no statistic


def sample_images(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Random images float32 [count, 3, size, size], mean 0 and variance 1, coarse and fine detail.

    Noise of several scales is added up, because white noise has no large structure: a global
    average pool would hardly tell one image from another.
    """
    rng = np.random.default_rng(seed)
    scales = (1, 2, 4, 8, 16, 32)
    total = np.zeros((count, 3, size, size), np.float32)
    for scale in scales:
        coarse = -(-size // scale)
        noise = rng.standard_normal((count, 3, coarse, coarse), dtype=np.float32)
        total += noise.repeat(scale, axis=2).repeat(scale, axis=3)[:, :, :size, :size]
    total /= np.float32(np.sqrt(len(scales)))
    return total


def _windows(x: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """The views [N, C, H', W', kernel, kernel] that a convolution or a pool sees, padded alike."""
    border = (kernel // 2, kernel // 2)
    padded = np.pad(x, ((0, 0), (0, 0), border, border), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return views[:, :, ::stride, ::stride]


@dataclass(frozen=True)
class Activation:
    """A tensor of the graph and its value for the sample images."""

    name: str
    sample: np.ndarray  # float32 [SAMPLE_COUNT, C, H, W]

    @property
    def channels(self) -> int:
        return int(self.sample.shape[1])


class Network:
    """An ONNX graph under construction; each method adds one node and returns its output."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        # images expected normalised, as usual: mean 0 and variance 1 per channel
        self.input = Activation("input", sample_images(SAMPLE_COUNT, SAMPLE_SIZE, seed=seed))

    def _node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"{name}/{op}_output"
        self.nodes.append(
            helper.make_node(op, list(inputs), [output], name=f"{name}/{op}", **attributes)
        )
        return output

    def _initializer(self, name: str, array: np.ndarray) -> str:
        values = array.astype(np.float32, copy=False)
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self, x: Activation, name: str, channels: int, kernel: int, *, stride: int, group: int
    ) -> Activation:
        """Convolution without bias; He-normal weights [channels, C / group, kernel, kernel]."""
        fan_in = x.channels // group * kernel**2
        shape = (channels, x.channels // group, kernel, kernel)
        weight = self.rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / fan_in) ** 0.5)
        output = self._node(
            "Conv",
            name,
            [x.name, self._initializer(f"{name}.weight", weight)],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=group,
        )
        views = _windows(x.sample, kernel, stride, 0.0)
        n, _, height, width, _, _ = views.shape
        columns = views.transpose(0, 1, 4, 5, 2, 3).reshape(n, group, fan_in, height * width)
        sample = weight.reshape(group, channels // group, fan_in) @ columns
        return Activation(output, sample.reshape(n, channels, height, width))

    def batch_norm(self, x: Activation, name: str, *, gain: float = 1.0) -> Activation:
        """Inference-mode normalization by x's own statistics, each off by some 10 %.

        Args:
            gain: the standard deviation wanted of the output (root mean square over the channels).
        """
        shape = x.channels
        true_mean, true_var = x.sample.mean((0, 2, 3)), x.sample.var((0, 2, 3))
        mean = true_mean + 0.1 * np.sqrt(true_var) * self.rng.standard_normal(shape)
        var = true_var * np.exp(0.1 * self.rng.standard_normal(shape))
        gamma = gain * self.rng.uniform(0.5, 1.5, shape) / np.sqrt(13 / 12)  # E[U²] = 13/12
        beta = 0.2 * gain * self.rng.standard_normal(shape)
        parameters = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
        output = self._node(
            "BatchNormalization",
            name,
            [x.name, *(self._initializer(f"{name}.{key}", a) for key, a in parameters.items())],
            epsilon=EPSILON,
        )
        factor = gamma / np.sqrt(var + EPSILON)
        offset = beta - mean * factor
        sample = x.sample * factor[:, None, None] + offset[:, None, None]
        return Activation(output, sample.astype(np.float32))

    def add(self, a: Activation, b: Activation, name: str) -> Activation:
        return Activation(self._node("Add", name, [a.name, b.name]), a.sample + b.sample)

    def relu(self, x: Activation, name: str) -> Activation:
        return Activation(self._node("Relu", name, [x.name]), np.maximum(x.sample, 0))

    def max_pool(self, x: Activation, name: str) -> Activation:
        """3×3, stride 2."""
        output = self._node(
            "MaxPool", name, [x.name], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
        )
        return Activation(output, _windows(x.sample, 3, 2, -np.inf).max((4, 5)))

    def classifier(self, x: Activation, num_classes: int) -> None:
        """Global average pool, Flatten and Gemm, whose output is `logits`.

        The bias takes out what the mean activation adds to each logit: otherwise one class would
        win for every image, and whether a quantized model agrees on it would say nothing.
        """
        pooled = self._node("GlobalAveragePool", "pool", [x.name])
        flat = self._node("Flatten", "flatten", [pooled])
        weight = self.rng.standard_normal((num_classes, x.channels), dtype=np.float32)
        weight *= np.float32(x.channels**-0.5)
        bias = 0.1 * self.rng.standard_normal(num_classes) - weight @ x.sample.mean((0, 2, 3))
        inputs = [
            flat,
            self._initializer("classifier.weight", weight),
            self._initializer("classifier.bias", bias),
        ]
        self.nodes.append(
            helper.make_node("Gemm", inputs, ["logits"], name="classifier/Gemm", transB=1)
        )

    def model(self, name: str, image_size: int, num_classes: int) -> onnx.ModelProto:
        def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            name,
            [value("input", ["N", 3, image_size, image_size])],
            [value("logits", ["N", num_classes])],
            self.initializers,
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="onnxq models/resnet50.py",
        )


def _conv_bn(
    net: Network,
    x: Activation,
    name: str,
    channels: int,
    kernel: int,
    *,
    stride: int = 1,
    group: int = 1,
    gain: float = 1.0,
) -> Activation:
    y = net.conv(x, f"{name}/conv", channels, kernel, stride=stride, group=group)
    return net.batch_norm(y, f"{name}/bn", gain=gain)


def _write(model: onnx.ModelProto, path: Path | str | None) -> onnx.ModelProto:
    if path is not None:
        onnx.save(model, Path(path))
    return model


def build_resnet50(
    path: Path | str | None = None,
    *,
    seed: int = 0,
    image_size: int = 224,
    num_classes: int = 1000,
) -> onnx.ModelProto:
    """ResNet-50 (v1.5: the stride sits in the 3×3 convolution) with random weights.

    Args:
        path: where to write the model; None: only return it.
        image_size: side of the input [N, 3, image_size, image_size].

    Returns:
        The model, logits [N, num_classes]; 25.6 M parameters at 1,000 classes.

    Source: arXiv 1512.03385, table 1.
    """
    net = Network(seed)
    x = _conv_bn(net, net.input, "stem", 64, 7, stride=2)
    x = net.max_pool(net.relu(x, "stem"), "stem")
    for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(depth):
            name = f"stage{stage}/block{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = net.relu(_conv_bn(net, x, f"{name}/reduce", width, 1), f"{name}/reduce")
            y = _conv_bn(net, y, f"{name}/spatial", width, 3, stride=stride)
            y = net.relu(y, f"{name}/spatial")
            # a smaller gain on the residual, as trained networks have it, keeps the sum near unit
            # variance for the whole stage; the next stage's first block normalises it anew
            y = _conv_bn(net, y, f"{name}/expand", 4 * width, 1, gain=0.5)
            if block == 0:
                x = _conv_bn(net, x, f"{name}/shortcut", 4 * width, 1, stride=stride)
            x = net.relu(net.add(y, x, name), name)
    net.classifier(x, num_classes)
    return _write(net.model("resnet50", image_size, num_classes), path)


def build_mobileone_like(
    path: Path | str | None = None,
    *,
    seed: int = 0,
    image_size: int = 32,
    num_classes: int = 10,
    widths: Sequence[int] = (32, 48, 96, 160),
    depth: int = 2,
    branches: int = 3,
) -> onnx.ModelProto:
    """A small network of MobileOne blocks as they are trained, before re-parameterisation.

    A block is a depthwise and then a pointwise part. The depthwise part sums `branches` 3×3
    depthwise convs, one 1×1 depthwise conv and the identity; the pointwise part sums `branches` 1×1
    convs and the identity. Each branch has its own BatchNormalization; the identity is left out
    where shapes differ. Each stage halves the resolution in its first block.

    Args:
        path: where to write the model; None: only return it.
        widths: channels per stage.
        depth: blocks per stage.
        branches: parallel convolutions of the same shape (k in the paper), at least 1.

    Returns:
        The model: input [N, 3, image_size, image_size], logits [N, num_classes].

    Source: MobileOne, arXiv 2206.04040, figure 3.
    """
    net = Network(seed)

    def part(
        x: Activation,
        name: str,
        channels: int,
        kernels: Sequence[int],
        *,
        stride: int = 1,
        group: int = 1,
    ) -> Activation:
        identity = channels == x.channels and stride == 1
        gain = (len(kernels) + identity) ** -0.5  # the branches' variances add up to one
        outputs = [
            _conv_bn(net, x, f"{name}/{i}", channels, kernel, stride=stride, group=group, gain=gain)
            for i, kernel in enumerate(kernels)
        ]
        if identity:
            outputs.append(net.batch_norm(x, f"{name}/identity", gain=gain))
        total = outputs[0]
        for i, output in enumerate(outputs[1:]):
            total = net.add(total, output, f"{name}/sum{i}")
        return net.relu(total, name)

    x = part(net.input, "stem", widths[0], [3] * branches + [1])
    for stage, width in enumerate(widths, start=1):
        for block in range(depth):
            name = f"stage{stage}/block{block}"
            stride = 2 if block == 0 else 1
            group = x.channels
            x = part(
                x, f"{name}/depthwise", group, [3] * branches + [1], stride=stride, group=group
            )
            x = part(x, f"{name}/pointwise", width, [1] * branches)
    net.classifier(x, num_classes)
    return _write(net.model("mobileone_like", image_size, num_classes), path)


class Which(str, Enum):
    """The network to build."""

    RESNET50 = "resnet50"
    MOBILEONE = "mobileone"


def main(
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    network: Annotated[Which, typer.Option(help="What to build.")] = Which.RESNET50,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a random-weight ResNet-50 (102 MB) or a small MobileOne-like network as ONNX."""
    build = build_resnet50 if network is Which.RESNET50 else build_mobileone_like
    model = build(out, seed=seed)
    typer.echo(f"{out}: {len(model.graph.node)} nodes, {out.stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)

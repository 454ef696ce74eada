"""Published re-parameterised blocks: one Conv each, with the kernel that their papers give."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small import assert_pass, model, ops, run, weights

from onnxq.model import load, to_proto
from onnxq.passes import FoldBatchNorm, FoldLinearBranches
from onnxq.pipeline import canonicalize

FIXTURES = Path(__file__).parent.parent / "fixtures"
EPSILON = 1e-3
# A fold rounds each weight once (2^-24), each of a few hundred products and sums once more; see
# test_fold_linear_random for the bound element by element.
FOLD = 1e-5


class Block:
    """The text and constants of a block, with its fused kernel kept in float64 beside it.

    The kernel is put together as the papers do: pad to the common size, scale by γ/σ, sum up. No
    code of the package is used for it.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, groups: int = 1, stride: int = 1):
        self.lines: list[str] = []
        self.constants: dict[str, np.ndarray] = {}
        self.ends: list[str] = []
        self.inputs, self.outputs, self.groups, self.stride = inputs, outputs, groups, stride
        self.kernel = np.zeros((outputs, inputs // groups, size, size))
        self.bias = np.zeros(outputs)
        self.rng = np.random.default_rng(sum(map(ord, f"{inputs} {outputs} {size} {groups}")))

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, np.float32)
        return name

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def conv(self, x: str, kernel: np.ndarray, *, pads=None, stride=None, groups=None) -> str:
        name = f"conv{len(self.lines)}"
        rows, columns = kernel.shape[2:]
        pads = pads or [rows // 2, columns // 2] * 2
        step = self.stride if stride is None else stride
        group = self.groups if groups is None else groups
        self.lines.append(
            f"[{name}] {name} = Conv <pads = {pads}, strides = [{step},{step}], group = {group}> "
            f"({x}, {self.constant(kernel)})"
        )
        return name

    def batch_norm(self, x: str, channels: int) -> tuple[str, np.ndarray, np.ndarray]:
        """The node, γ/σ and β − μγ/σ."""
        gamma, beta, mean = (self.normal(channels) for _ in range(3))
        variance = self.rng.uniform(0.1, 3, channels).astype(np.float32)
        name = f"bn{len(self.lines)}"
        parameters = ", ".join(self.constant(a) for a in (gamma, beta, mean, variance))
        self.lines.append(
            f"[{name}] {name} = BatchNormalization <epsilon = {EPSILON}> ({x}, {parameters})"
        )
        std = np.sqrt(variance.astype(np.float64) + np.float64(np.float32(EPSILON)))
        factor = gamma / std
        return name, factor, beta - mean * factor

    def into(self, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Add a branch's kernel in the middle of the block's."""
        size = self.kernel.shape[2]
        rows, columns = kernel.shape[2:]
        top, left = (size - rows) // 2, (size - columns) // 2
        self.kernel[:, :, top : top + rows, left : left + columns] += kernel
        self.bias += bias

    def conv_bn(self, rows: int, columns: int | None = None) -> None:
        """Conv -> BatchNormalization."""
        columns = rows if columns is None else columns
        kernel = self.normal(self.outputs, self.inputs // self.groups, rows, columns)
        end, factor, offset = self.batch_norm(self.conv("x", kernel), self.outputs)
        self.into(kernel * factor[:, None, None, None], offset)
        self.ends.append(end)

    def identity(self) -> None:
        """BatchNormalization alone."""
        end, factor, offset = self.batch_norm("x", self.inputs)
        dirac = np.zeros((self.outputs, self.inputs // self.groups, 1, 1))
        for o in range(self.outputs):
            dirac[o, o % (self.inputs // self.groups)] = factor[o]
        self.into(dirac, offset)
        self.ends.append(end)

    def pad_then_shift(self, x: str, channels: int) -> tuple[str, np.ndarray, np.ndarray]:
        """DBB pads with BatchNormalization's value of zero: scale, pad, shift."""
        factor, offset = self.normal(channels), self.normal(channels)
        at = len(self.lines)
        scale, shift = (self.constant(a.reshape(-1, 1, 1)) for a in (factor, offset))
        self.constants["amounts"] = np.int64([0, 0, 1, 1, 0, 0, 1, 1])
        self.lines += [
            f"[mul{at}] mul{at} = Mul ({x}, {scale})",
            f"[pad{at}] pad{at} = Pad (mul{at}, amounts)",
            f"[shift{at}] shift{at} = Add (pad{at}, {shift})",
        ]
        return f"shift{at}", factor.astype(np.float64), offset.astype(np.float64)

    def one_then_three(self) -> None:
        """1×1 -> scale, pad, shift -> 3×3 -> BatchNormalization."""
        one = self.normal(self.inputs, self.inputs, 1, 1)
        middle = self.conv("x", one, stride=1, groups=1)
        padded, factor, offset = self.pad_then_shift(middle, self.inputs)
        three = self.normal(self.outputs, self.inputs, 3, 3)
        end = self.conv(padded, three, pads=[0, 0, 0, 0])
        end, gain, last = self.batch_norm(end, self.outputs)
        first = one[:, :, 0, 0] * factor[:, None]
        kernel = np.einsum("omhw,mi->oihw", three.astype(np.float64), first)
        bias = np.einsum("omhw,m->o", three.astype(np.float64), offset)
        self.into(kernel * gain[:, None, None, None], bias * gain + last)
        self.ends.append(end)

    def one_then_average(self) -> None:
        """1×1 -> scale, pad, shift -> 3×3 average -> BatchNormalization."""
        one = self.normal(self.outputs, self.inputs, 1, 1)
        middle = self.conv("x", one, stride=1, groups=1)
        padded, factor, offset = self.pad_then_shift(middle, self.outputs)
        at, s = f"pool{len(self.lines)}", self.stride
        pool = f"AveragePool <kernel_shape = [3, 3], strides = [{s}, {s}]>"
        self.lines.append(f"[{at}] {at} = {pool} ({padded})")
        end, gain, last = self.batch_norm(at, self.outputs)
        kernel = np.broadcast_to(one * factor[:, None, None, None] / 9, (*one.shape[:2], 3, 3))
        self.into(kernel * gain[:, None, None, None], offset * gain + last)
        self.ends.append(end)

    def proto(self) -> onnx.ModelProto:
        """The sum of the branches, named `y`."""
        lines, total = list(self.lines), self.ends[0]
        for i, end in enumerate(self.ends[1:], start=1):
            name = "y" if i == len(self.ends) - 1 else f"sum{i}"
            lines.append(f"[sum{i}] {name} = Add ({total}, {end})")
            total = name
        text = f"g (float[N,{self.inputs},H,W] x) => (float[N,{self.outputs},P,Q] y) {{"
        return model("\n".join([text, *lines, "}"]), self.constants)


def check(block: Block, name: str) -> onnx.ModelProto:
    """One Conv `name` -> y with the block's own kernel, each weight rounded to float32 once."""
    # symbolic sizes are 2 in `feeds`: borders all over
    after = assert_pass(block.proto(), FoldLinearBranches(), expect=["Conv"], rtol=FOLD)
    assert after.graph.node[0].name == name
    assert after.graph.node[0].output[0] == "y"
    arrays = [numpy_helper.to_array(i) for i in after.graph.initializer]
    kernel = next(a for a in arrays if a.ndim == 4)
    bias = next(a for a in arrays if a.ndim == 1)
    # the reference's own order of float64 sums may differ: 2^-24 and a few 2^-53
    scale = np.abs(block.kernel).max()
    np.testing.assert_allclose(kernel, block.kernel, rtol=2.0**-24 * 1.001, atol=1e-14 * scale)
    np.testing.assert_allclose(
        bias, block.bias, rtol=2.0**-24 * 1.001, atol=1e-14 * np.abs(block.bias).max()
    )
    for size in (7, 12):
        x = weights(2, block.inputs, size, size + 1, seed=size)
        for optimize in (False, True):
            want = run(block.proto(), {"x": x}, optimize=optimize)[0]
            got = run(after, {"x": x}, optimize=optimize)[0]
            np.testing.assert_allclose(got, want, rtol=0, atol=FOLD * np.abs(want).max())
    return after


class TestBlocks:
    @pytest.mark.parametrize("groups", [1, 2])
    def test_repvgg(self, groups):
        block = Block(4, 4, 3, groups=groups)
        block.conv_bn(1)
        block.conv_bn(3)
        block.identity()
        check(block, "conv2")  # the name of the largest

    @pytest.mark.parametrize("groups", [1, 2])
    def test_repvgg_with_stride(self, groups):
        block = Block(4, 6, 3, groups=groups, stride=2)
        block.conv_bn(3)
        block.conv_bn(1)
        check(block, "conv0")

    def test_mobileone_depthwise(self):
        block = Block(6, 6, 3, groups=6)
        for size in (3, 3, 3, 1):
            block.conv_bn(size)
        block.identity()
        check(block, "conv0")

    def test_mobileone_pointwise(self):
        block = Block(6, 6, 1)
        for _ in range(3):
            block.conv_bn(1)
        block.identity()
        check(block, "conv0")

    @pytest.mark.parametrize("stride", [1, 2])
    def test_acnet(self, stride):
        block = Block(3, 5, 3, stride=stride)
        block.conv_bn(3)
        block.conv_bn(1, 3)
        block.conv_bn(3, 1)
        check(block, "conv0")

    @pytest.mark.parametrize("stride", [1, 2])
    def test_dbb(self, stride):
        block = Block(3, 5, 3, stride=stride)
        block.conv_bn(3)
        block.conv_bn(1)
        block.one_then_three()
        block.one_then_average()
        check(block, "conv0")

    def test_replk(self):
        block = Block(4, 4, 13, groups=4)
        block.conv_bn(13)
        block.conv_bn(5)
        check(block, "conv0")

    def test_repconv_without_identity(self):
        block = Block(4, 4, 3)
        block.conv_bn(3)
        block.conv_bn(1)
        check(block, "conv0")

    def test_resrep_compactor(self):
        block = Block(3, 4, 3)
        kernel, compactor = block.normal(8, 3, 3, 3), block.normal(4, 8, 1, 1)
        block.ends.append(block.conv("x", kernel))
        end, factor, offset = block.batch_norm(block.ends.pop(), 8)
        block.lines.append(f"[one] y = Conv ({end}, {block.constant(compactor)})")
        block.ends.append("y")
        first = kernel * factor[:, None, None, None]
        matrix = compactor[:, :, 0, 0].astype(np.float64)
        block.into(np.einsum("om,mihw->oihw", matrix, first), matrix @ offset)
        check(block, "conv0")

    def test_after_batch_norm_is_folded_the_branches_fold_as_well(self):
        block = Block(4, 4, 3)
        block.conv_bn(3)
        block.conv_bn(1)
        block.identity()
        loaded = load(block.proto())
        FoldBatchNorm()(loaded)
        assert FoldLinearBranches()(loaded).rewritten == ("conv0",)
        assert ops(to_proto(loaded)) == ["Conv"]


BLOCKS = {
    "repvgg": 2,
    "repvgg_grouped": 2,
    "mobileone": 4,
    "acnet": 2,
    "dbb": 2,
    "replk": 3,
    "repconv": 2,
    "resrep": 2,
}


class TestExported:
    """What torch's two exporters write (see fixtures/export.py), the whole way."""

    @pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
    @pytest.mark.parametrize("name", BLOCKS)
    def test_one_conv_per_block(self, name, exporter):
        path = FIXTURES / f"{name}_{exporter}.onnx"
        source = onnx.load(path)
        have = Counter(ops(source))
        assert have["BatchNormalization"] >= 2, "the exporter has folded what is to be folded"
        loaded = load(path)
        canonicalize(loaded)
        after = to_proto(loaded)
        onnx.checker.check_model(after, full_check=True)
        assert ops(after) == ["Conv", "Relu"] * BLOCKS[name]
        shape = [d.dim_value for d in source.graph.input[0].type.tensor_type.shape.dim]
        assert source.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        for batch in (1, 3):
            x = weights(batch, *shape[1:], seed=batch)
            for optimize in (False, True):
                want = run(source, {"x": x}, optimize=optimize)[0]
                got = run(after, {"x": x}, optimize=optimize)[0]
                assert np.abs(want).max() > 0.1
                np.testing.assert_allclose(got, want, rtol=0, atol=FOLD * np.abs(want).max())

    def test_fixtures_are_small(self):
        found = sorted(FIXTURES.glob("*.onnx"))
        assert len(found) == 2 * len(BLOCKS)
        assert max(path.stat().st_size for path in found) < 40_000

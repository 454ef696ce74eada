"""Every form in the table reaches its kernel, and the facts that the table rests on still hold.

Where one of these fails with a new onnxruntime, passes/forms.py has to be thought over.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from expanding import expand, of_type, optimized
from onnx import TensorProto
from small import feeds, model, ops, run, weights

import onnxq
from onnxq.passes import forms
from onnxq.passes.forms import FORMS, TARGETS, Form, TypePair, choose_form, type_pair
from onnxq.session import CASTS_INT4, CONVOLVES_INT8, runtime_version

NEWER = f"onnxruntime {ort.__version__} does otherwise; mend passes/forms.py and its lowering"
OLD = runtime_version(None) < CONVOLVES_INT8
pytestmark = pytest.mark.skipif(runtime_version(None) < CASTS_INT4, reason="no Cast of INT4")

CODE = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
DTYPE = {"int8": np.int8, "uint8": np.uint8}
FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4)
RNG = np.random.default_rng(3)

# --- the table itself


def pairs(op: str, activations: str, target: str) -> list[str]:
    return [str(type_pair(op, activations, bits, target)) for bits in range(2, 9)]


@pytest.mark.parametrize("target", ["cpu-vnni", "cpu-avx2"])
def test_x86_mixes_types_up_to_seven_bits(target):
    full = {"cpu-vnni": None, "cpu-avx2": "uint8·uint8"}[target]
    for op, activations, safe in [
        ("Conv", "dynamic", "int8·uint8"),
        ("MatMul", "dynamic", "uint8·int8"),
        ("Conv", "static", "uint8·int8"),
        ("MatMul", "static", "uint8·int8"),
    ]:
        assert pairs(op, activations, target) == [safe] * 6 + [full or safe]
    assert pairs("DepthwiseConv", "static", target) == ["uint8·int8"] * 7


def test_arm_takes_alike_types_but_for_what_dynamic_quantize_linear_gives():
    for op, activations in [("Conv", "dynamic"), ("Conv", "static"), ("MatMul", "static")]:
        assert pairs(op, activations, "cpu-arm") == ["int8·int8"] * 7
    assert pairs("MatMul", "dynamic", "cpu-arm") == ["uint8·int8"] * 7


@pytest.mark.parametrize("target", TARGETS)
def test_convs_for_older_runtimes_have_uint8_activations(target):
    for bits in range(2, 9):
        pair = type_pair("Conv", "dynamic", bits, target, convolves_int8=False)
        assert pair == TypePair("uint8", "uint8")


@pytest.mark.parametrize("bits", range(2, 9))
def test_two_products_fit_into_16_bits_on_avx2(bits):
    """The kernel multiplies the unsigned operand as it is stored, zero point and all."""
    for op, activations in [
        ("Conv", "dynamic"),
        ("MatMul", "dynamic"),
        ("Conv", "static"),
        ("MatMul", "static"),
    ]:
        pair = type_pair(op, activations, bits, "cpu-avx2")
        if pair.activation == pair.weight:
            continue  # runs in 16-bit integers, added in 32 bits
        zero = forms.weight_zero_point(pair.weight, bits)
        stored = max(zero + 2 ** (bits - 1) - 1, 2 ** (bits - 1) - zero)
        activation = 255 if pair.activation == "uint8" else 128
        assert 2 * stored * activation <= 2**15 - 1


def test_integers_with_their_zero_point_fit_the_type():
    for bits in range(2, 9):
        zero = forms.weight_zero_point("uint8", bits)
        assert (zero - 2 ** (bits - 1), zero + 2 ** (bits - 1) - 1) == (0, 2**bits - 1)
        assert forms.weight_zero_point("int8", bits) == 0


def test_what_has_no_form_is_said():
    with pytest.raises(ValueError, match="computed in float: float is faster"):
        type_pair("DepthwiseConv", "dynamic", 4, "cpu-vnni")
    with pytest.raises(ValueError, match="no form for Conv with 9-bit weights"):
        choose_form("Conv", "dynamic", 9, "cpu-vnni")


def test_every_width_has_a_form_and_every_form_is_of_use():
    chosen = {
        choose_form(op, compute, bits, target, convolves_int8=convolves)
        for op in ("Conv", "DepthwiseConv", "MatMul")
        for compute in ("none", "dynamic", "static")
        for bits in range(2, 9)
        for target in TARGETS
        for convolves in (True, False)
    }
    assert [form for form in FORMS if form not in chosen] == [
        form for form in FORMS if form.kernels == ("MatMulNBits",)
    ]


# --- the integer forms, built here from the table


def weight_nodes(bits: int, shape: tuple[int, ...], kind: str) -> tuple[str, dict, int]:
    """Nodes that make w8 of 4-bit constants, the constants, and the zero point."""
    zero = forms.weight_zero_point(kind, bits)
    if bits <= 4:
        q = RNG.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), shape) + zero
        packed = ml_dtypes.int4 if kind == "int8" else ml_dtypes.uint4
        return f"w8 = Cast <to = {CODE[kind]}> (w4)", {"w4": q.astype(packed)}, zero
    top = 2 ** (bits - 5) - 1
    constants = {
        "wh": RNG.integers(-top, top + 1, shape).astype(ml_dtypes.int4),
        "wl": RNG.integers(-7, 8, shape).astype(ml_dtypes.int4),
        "radix": np.array(16, np.int32),
        "offset": np.array(zero, np.int32),
    }
    nodes = f"""
        h = Cast <to = 6> (wh)  l = Cast <to = 6> (wl)  r = Mul (h, radix)  d = Add (r, l)
        s = Add (d, offset)  w8 = Cast <to = {CODE[kind]}> (s)"""
    return nodes, constants, zero


SHAPES = {  # x, w, y
    "Conv": ((1, 4, 8, 8), (8, 4, 3, 3), "float[1,8,6,6]"),
    "DepthwiseConv": ((1, 8, 8, 8), (8, 1, 3, 3), "float[1,8,6,6]"),
    "MatMul": ((2, 16), (16, 8), "float[2,8]"),
}
SX, SY = np.array(0.02, np.float32), np.array(0.05, np.float32)
QDQ_X = "xq = QuantizeLinear (x, sx, zx)  xd = DequantizeLinear (xq, sx, zx)"
QDQ_Y = "yq = QuantizeLinear (c, sy, zy)  y = DequantizeLinear (yq, sy, zy)"


def build(op: str, nodes: str, constants: dict) -> onnx.ModelProto:
    x, _, y = SHAPES[op]
    dims = ",".join(map(str, x))
    text = f"g (float[{dims}] x) => ({y} y) {{ {nodes} }}"
    return model(text, constants, opset=21, ir=10)


def static_model(
    op: str = "Conv",
    pair: TypePair = TypePair("uint8", "int8"),  # noqa: B008 - frozen
    bits: int = 4,
    *,
    middle: str | None = None,
    end: str = QDQ_Y,
    w_zero: bool = True,
    weight: tuple[str, dict, int] | None = None,
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """A quantized node between QuantizeLinear and DequantizeLinear; `middle` makes c of xd, wd."""
    shape = SHAPES[op][1]
    out_axis = 1 if op == "MatMul" else 0
    made, stored, zero = weight or weight_nodes(bits, shape, pair.weight)
    scale = np.full(8, 0.02, np.float32)
    named = {
        **stored,
        "sx": SX,
        "zx": np.array(128 if pair.activation == "uint8" else 0, DTYPE[pair.activation]),
        "sw": scale,
        "zw": np.full(8, zero, DTYPE[pair.weight]),
        "b": RNG.integers(-99, 99, 8).astype(np.int32),
        "sb": SX * scale,
        "sy": SY,
        "zy": np.array(0 if pair.activation == "int8" else 128, DTYPE[pair.activation]),
        **constants,
    }
    group = "<group = 8>" if op == "DepthwiseConv" else ""
    middle = middle or (
        "c = MatMul (xd, wd)" if op == "MatMul" else f"c = Conv {group} (xd, wd, bd)"
    )
    zeros = ", zw" if w_zero else ""
    nodes = f"""
        {QDQ_X} {made} wd = DequantizeLinear <axis = {out_axis}> (w8, sw{zeros})
        bd = DequantizeLinear <axis = 0> (b, sb) {middle} {end}"""
    used = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return build(op, nodes, {name: array for name, array in named.items() if name in used})


def dynamic_model(op: str, pair: TypePair, bits: int) -> onnx.ModelProto:
    made, constants, zero = weight_nodes(bits, SHAPES[op][1], pair.weight)
    quantized = "xq, sx, zx = DynamicQuantizeLinear (x)"
    if pair.activation == "int8":
        quantized = """
            top = ReduceMax <keepdims = 0> (x)  sx = Mul (top, step)
            xq = QuantizeLinear (x, sx, zx)"""
        constants |= {"step": np.array(1 / 255, np.float32), "zx": np.array(-128, np.int8)}
    constants |= {"zw": np.array(zero, DTYPE[pair.weight]), "sw": np.full(8, 0.02, np.float32)}
    product = "p = ConvInteger (xq, w8, zx, zw)  y = DequantizeLinear <axis = 1> (p, both)"
    if op == "MatMul":
        product = "p = MatMulInteger (xq, w8, zx, zw)  f = Cast <to = 1> (p)  y = Mul (f, both)"
    return build(op, f"{made} {quantized} both = Mul (sx, sw) {product}", constants)


def check_kernels(proto: onnx.ModelProto, kernels: tuple[str, ...], weight: int) -> None:
    """The optimized graph has the kernels, and the folded weight in place of the nodes before."""
    final = optimized(proto)
    found = ops(final)
    assert set(kernels) <= set(found), f"{kernels} is not among {found}: {NEWER}"
    assert not {"Cast", "Conv", "MatMul", "Gemm"} & set(found) - set(kernels), f"{found}: {NEWER}"
    assert of_type(final, *FOUR_BITS) == [], f"a weight is not computed at load: {NEWER}"
    big = [t for t in final.graph.initializer if np.prod(t.dims) >= 8 * 9]
    assert [t.data_type for t in big] == [weight], NEWER


INTEGER = [form for form in FORMS if form.pair is not None]


def widths(form: Form) -> set[int]:
    low, high = form.bits
    return {max(low, 4), high} if low < high else {high}


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        pytest.param(f, b, id=f"{f.op}-{f.activations}-{f.pair}-{b}-{i}")
        for i, f in enumerate(INTEGER)
        for b in sorted(widths(f))
    ],
)
def test_a_form_reaches_its_kernel(form, bits):
    if form.convolves_int8 and OLD:
        pytest.skip("ConvInteger takes no int8 here")
    make = dynamic_model if form.activations == "dynamic" else static_model
    proto = make(form.op, form.pair, bits)
    check_kernels(proto, form.kernels, CODE[form.pair.weight])


@pytest.mark.parametrize("op", ["Conv", "DepthwiseConv", "MatMul"])
@pytest.mark.parametrize("pair", ["uint8·int8", "uint8·uint8", "int8·int8"])
@pytest.mark.parametrize("bits", [4, 7])
def test_the_kernel_computes_what_the_nodes_say(op, pair, bits):
    """QLinear kernels against the same nodes one by one in float: a rounding step at most."""
    proto = static_model(op, TypePair(*pair.split("·")), bits)
    feed = feeds(proto)
    (want,) = run(proto, feed, optimize=False)
    (got,) = run(proto, feed)
    assert np.abs(want).max() >= 5 * SY  # the test is not of zeros
    assert np.abs(got - want).max() <= SY * (1 + 1e-5)


@pytest.mark.parametrize("op", ["Conv", "DepthwiseConv", "MatMul"])
@pytest.mark.parametrize("worst", [-64, 63])
def test_the_largest_static_products_do_not_saturate(op, worst):
    """255 times the largest 7-bit weight everywhere; depthwise Convs take 8 bits too."""
    worst = 2 * worst if op == "DepthwiseConv" else worst
    x, shape, _ = SHAPES[op]
    q = np.full(shape, worst, np.int8)
    proto = static_model(
        op,
        weight=("w8 = Identity (q)", {"q": q}, 0),
        zx=np.array(0, np.uint8),
        sy=np.array(2, np.float32),
    )
    feed = {"x": np.full(x, 255 * SX, np.float32)}
    (want,) = run(proto, feed, optimize=False)
    (got,) = run(proto, feed)
    assert abs(want).min() >= 10 * 2
    assert np.abs(got - want).max() <= 2 * (1 + 1e-5)


# --- facts of static forms that a lowering has to know


def static_ops(*args, **kwargs) -> list[str]:
    return ops(optimized(static_model(*args, **kwargs)))


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_without_output_quantization(bits):
    proto = static_model("MatMul", bits=bits, middle="y = MatMul (xd, wd)", end="")
    check_kernels(proto, ("MatMulIntegerToFloat",), TensorProto.INT8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("end", [QDQ_Y, "y = Identity (c)"], ids=["quantized", "float"])
def test_matmul_and_bias_become_one_integer_node(bits, end):
    """The Add makes a Gemm of MatMul, which is an integer one only if zero points are stated."""
    added = {"middle": "m = MatMul (xd, wd)  c = Add (m, bd)", "end": end}
    proto = static_model("MatMul", bits=bits, **added)
    check_kernels(proto, ("QGemm",), TensorProto.INT8)
    found = static_ops("MatMul", bits=bits, w_zero=False, **added)
    assert "QGemm" not in found, f"the weight's zero point may be left out: {NEWER}"


def test_a_float_bias_keeps_a_matmul_without_output_quantization_float():
    added = "m = MatMul (xd, wd)  y = Add (m, f)"
    found = static_ops("MatMul", middle=added, end="", f=np.ones(8, np.float32))
    assert "Gemm" in found, f"a float bias may follow a static MatMul: {NEWER}"


def test_a_bias_of_another_scale_keeps_the_conv_float():
    found = static_ops("Conv", sb=np.full(8, 0.02, np.float32))
    assert "Conv" in found, f"any bias scale will do: {NEWER}"


@pytest.mark.parametrize(
    ("zero", "kernel"), [(0, "QLinearConv"), (128, "FusedConv")], ids=["lowest", "other"]
)
def test_relu_vanishes_only_into_the_lowest_zero_point(zero, kernel):
    middle = "m = Conv (xd, wd, bd)  c = Relu (m)"
    found = static_ops("Conv", middle=middle, zy=np.array(zero, np.uint8))
    assert kernel in found, f"{found}: {NEWER}"


def test_relu6_vanishes_into_the_range():
    found = static_ops(
        "Conv",
        middle="m = Conv (xd, wd, bd)  c = Clip (m, low, high)",
        low=np.array(0, np.float32),
        high=np.array(6, np.float32),
        sy=np.array(6 / 255, np.float32),
        zy=np.array(0, np.uint8),
    )
    assert "QLinearConv" in found and "Clip" not in found, f"{found}: {NEWER}"


def test_conv_without_output_quantization_stays_float():
    found = static_ops("Conv", middle="y = Conv (xd, wd)", end="")
    assert "Conv" in found, f"a static Conv needs no output scale: {NEWER}"


def test_two_parallel_convs_stay_float():
    middle = "m = Conv (xd, wd, bd)  n = Conv (xd, wd)  c = Add (m, n)"
    found = static_ops("Conv", middle=middle)
    assert "QLinearConv" not in found, f"parallel terms may be static: {NEWER}"


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_an_int4_weight_without_a_cast_stays_float(op):
    q = RNG.integers(-7, 8, SHAPES[op][1]).astype(ml_dtypes.int4)
    found = static_ops(op, weight=("w8 = Identity (w4)", {"w4": q}, 0), w_zero=False)
    assert op in found, f"DequantizeLinear of INT4 may stand before {op}: {NEWER}"


# --- what the lowerings write


def depthwise_model() -> onnx.ModelProto:
    return model(
        "g (float[1,8,8,8] x) => (float[1,8,6,6] y) { [op] y = Conv <group = 8> (x, w) }",
        {"w": weights(8, 1, 3, 3)},
    )


def linear_model() -> onnx.ModelProto:
    return model(
        "g (float[2,32] x) => (float[2,16] y) { [fc] y = MatMul (x, w) }", {"w": weights(32, 16)}
    )


def conv_only() -> onnx.ModelProto:
    return model(
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv (x, w, b) }",
        {"w": weights(4, 3, 3, 3), "b": weights(4, seed=1)},
    )


SOURCES = {"Conv": conv_only, "DepthwiseConv": depthwise_model, "MatMul": linear_model}


@pytest.mark.parametrize("op", list(SOURCES))
@pytest.mark.parametrize("layout", ["parallel", "merged"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("runtime", ["1.23", "1.22"], ids=["int4", "packed"])
def test_float_compute_is_float_after_loading(op, layout, terms, runtime):
    """Nothing of the stored form is left: the nodes of the float model, once per term."""
    made = onnxq.quantize(
        SOURCES[op](), activations="none", terms=terms, layout=layout, min_runtime=runtime
    ).model
    (kernel,) = choose_form(op, "none", 4, "cpu-avx2").kernels
    found = ops(optimized(made))
    count = terms if layout == "parallel" else 1
    products = {kernel, "Gemm" if op == "MatMul" else "FusedConv"}  # with the Add of the sum
    assert sum(name in products for name in found) == count, f"{found}: {NEWER}"
    left = set(found) - products - {"Add", "ReorderInput", "ReorderOutput"}
    assert not left, f"{found}: {NEWER}"


@pytest.mark.skipif(OLD, reason="ConvInteger takes no int8 here")
@pytest.mark.parametrize(
    ("layout", "bits", "terms", "wide"),
    [("parallel", 4, 1, 4), ("parallel", 4, 2, 4), ("merged", 4, 2, 8), ("parallel", 8, 1, 8)],
)
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_dynamic_compute_reaches_the_table_s_kernel(op, layout, bits, terms, wide):
    after, _ = expand(SOURCES[op](), activations="dynamic", bits=bits, terms=terms, layout=layout)
    final = optimized(after)
    count = terms if layout == "parallel" else 1
    kernel = choose_form(op, "dynamic", wide, "cpu-avx2").kernels[0]
    if op == "MatMul" and count > 1:
        kernel = "MatMulIntegerToFloat"  # the terms share one DynamicQuantizeLinear
    products = [node for node in final.graph.node if node.op_type == kernel]
    assert len(products) == count, f"{ops(final)}: {NEWER}"
    written = {str(type_pair(op, "dynamic", wide, target)) for target in TARGETS}
    stored = {t.name: t.data_type for t in final.graph.initializer}
    kinds = {stored[node.input[1]] for node in products}
    assert kinds <= {CODE[pair.split("·")[1]] for pair in written}
    assert of_type(final, *FOUR_BITS) == [], NEWER


def test_depthwise_convs_are_not_made_integer():
    after, _ = expand(depthwise_model(), activations="dynamic", bits=4, terms=1)
    assert "ConvInteger" not in ops(optimized(after))


def test_a_dequantized_weight_is_not_folded_for_conv():
    """Why float compute writes Cast and Mul."""
    proto = model(
        """g (float[1,3,8,8] x) => (float[1,4,6,6] y) {
            w = DequantizeLinear <axis = 0> (q, s)  y = Conv (x, w)
        }""",
        {"q": weights(4, 3, 3, 3).astype(np.int8), "s": np.ones(4, np.float32)},
    )
    assert "DequantizeLinear" in ops(optimized(proto)), f"DequantizeLinear is folded: {NEWER}"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_along_the_inputs_become_matmulnbits(axis, bits):
    shape, block = (64, 32), 16
    scales = [n // block if i == axis else n for i, n in enumerate(shape)]
    q = RNG.integers(-7, 8, shape).astype(ml_dtypes.int4 if bits == 4 else np.int8)
    proto = model(
        f"""g (float[2,64] x) => (float[2,32] y) {{
            w = DequantizeLinear <axis = {axis}, block_size = {block}> (q, s)  y = MatMul (x, w)
        }}""",
        {"q": q, "s": np.ones(scales, np.float32)},
        opset=21,
        ir=10,
    )
    want = ["MatMulNBits"] if axis == 0 else ["DequantizeLinear", "MatMul"]
    assert ops(optimized(proto)) == want, NEWER

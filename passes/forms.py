"""The forms in which onnxruntime runs quantized nodes fast: one table, for lowerings and docs.

A lowering asks `type_pair` which 8-bit types to write; `FORMS` says which nodes they are written
in, which kernel of onnxruntime that reaches, and why. tests/passes/test_forms.py builds every form
and looks for its kernel in the graph that onnxruntime makes of it.

Three kinds of CPU differ in the pairs that are exact and fast:

- cpu-vnni: x86 that multiplies uint8 by int8 and adds in 32 bits (VNNI, AMX)
- cpu-avx2: x86 without it adds two such products in 16 bits, which saturate: 255·127·2 > 32767
  (onnxruntime issue 6004); no pair of products may exceed 16 bits there
- cpu-arm: every pair is exact; the two types should be alike (onnxruntime pull request 9902)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxq.plan import Activations, Layout, Target

IntType = Literal["int8", "uint8"]
Operator = Literal["Conv", "DepthwiseConv", "MatMul"]

TARGETS: tuple[Target, ...] = ("cpu-vnni", "cpu-avx2", "cpu-arm")
X86: tuple[Target, ...] = ("cpu-vnni", "cpu-avx2")
# Widest weight whose products with 8-bit activations fit, in pairs, into 16 bits.
SAFE_BITS = 7


@dataclass(frozen=True)
class TypePair:
    """The types of the two operands of an integer product."""

    activation: IntType
    weight: IntType

    def __str__(self) -> str:
        return f"{self.activation}·{self.weight}"


@dataclass(frozen=True)
class Form:
    """How a node is written for some targets, and what onnxruntime makes of it.

    Attributes:
        op: Conv and DepthwiseConv (one input and one output channel per group) are both Conv nodes.
        activations: as in a plan: none (float), dynamic or static.
        bits: narrowest and widest integer weight of one product; merged terms count together.
        layouts: which layouts of several terms are written so; one term is either.
        targets: the CPUs for which the form is chosen.
        pair: the types of the product; None where it is computed in float.
        nodes: the nodes as they are written.
        kernels: node types, all of which onnxruntime's optimized graph must show.
        reason: why this form and no other.
        fact: what onnxruntime does that makes it so, and where that is known from.
        convolves_int8: whether ConvInteger has to take int8 activations (onnxruntime 1.24).
    """

    op: Operator
    activations: Activations
    bits: tuple[int, int]
    layouts: tuple[Layout, ...]
    targets: tuple[Target, ...]
    pair: TypePair | None
    nodes: str
    kernels: tuple[str, ...]
    reason: str
    fact: str
    convolves_int8: bool = False

    def fits(self, op: Operator, activations: Activations, bits: int, target: Target) -> bool:
        """Whether this form is one for such a weight there."""
        low, high = self.bits
        return (
            self.op == op
            and self.activations == activations
            and low <= bits <= high
            and target in self.targets
        )


_U8S8, _S8U8 = TypePair("uint8", "int8"), TypePair("int8", "uint8")
_U8U8, _S8S8 = TypePair("uint8", "uint8"), TypePair("int8", "int8")
_ANY, _SAFE, _FULL = (2, 8), (2, SAFE_BITS), (SAFE_BITS + 1, 8)
_BOTH: tuple[Layout, ...] = ("parallel", "merged")
_MERGED: tuple[Layout, ...] = ("merged",)

_SATURATES = "uint8·int8 kernels of x86 without VNNI add two products in 16 bits (issue 6004)"
_NO_FAST_PAIR = "the faster pair would saturate: 8-bit weights times 255, two of them in 16 bits"
_UNLESS_FITTED = (
    f"{_NO_FAST_PAIR}; one term whose scales FitPairs has widened cannot, and runs as uint8·int8"
)
_ARM_CONV = (
    "ConvInteger multiplies weight by activation: with unlike types one operand is flipped at "
    "every run, and int8 weights with uint8 activations have no fast kernel (pull requests 9902, "
    "29787)"
)
_ARM = "alike types run without flipping one operand (pull request 9902); not measured here"

_RESCALE = "DequantizeLinear(int32, one scale per channel)"
_CONV_INT8 = f"ReduceMax … QuantizeLinear(int8) → ConvInteger → {_RESCALE}"
_CONV_UINT8 = f"DynamicQuantizeLinear → ConvInteger → {_RESCALE}"
_MATMUL_DYNAMIC = "DynamicQuantizeLinear → MatMulInteger → Cast → Mul"
_QDQ = "QuantizeLinear → DequantizeLinear"
_QDQ_WEIGHT = "Cast(int4 → 8 bits; digits: int32 · 16 + int32) → DequantizeLinear(per channel)"
_QDQ_CONV = f"{_QDQ}, {_QDQ_WEIGHT}, DequantizeLinear(int32 bias) → Conv → {_QDQ}"
_QDQ_MATMUL = f"{_QDQ}, {_QDQ_WEIGHT} → MatMul [→ {_QDQ}]"

_CONV_DYNAMIC = (
    Form(
        "Conv", "dynamic", _SAFE, _BOTH, X86, _S8U8, _CONV_INT8, ("ConvInteger",),
        "the fastest pair, and exact: an integer weight plus its zero point is at most 127",
        "ConvInteger multiplies weight by activation, so int8·uint8 reaches the uint8·int8 kernel",
        convolves_int8=True,
    ),
    Form(
        "Conv", "dynamic", _FULL, _BOTH, ("cpu-vnni",), _S8U8, _CONV_INT8, ("ConvInteger",),
        "the fastest pair, and exact",
        "VNNI adds four products in 32 bits",
        convolves_int8=True,
    ),
    Form(
        "Conv", "dynamic", _FULL, _BOTH, ("cpu-avx2",), _U8U8, _CONV_UINT8, ("ConvInteger",),
        _NO_FAST_PAIR, _SATURATES,
    ),
    Form(
        "Conv", "dynamic", _ANY, _BOTH, ("cpu-arm",), _S8S8, _CONV_INT8, ("ConvInteger",),
        "the pair that ARM's dot product takes as it is", _ARM_CONV,
        convolves_int8=True,
    ),
    Form(
        "Conv", "dynamic", _ANY, _BOTH, TARGETS, _U8U8, _CONV_UINT8, ("ConvInteger",),
        "for onnxruntime before 1.24",
        "its ConvInteger takes no int8 activations; uint8·uint8 is exact everywhere",
    ),
    Form(
        "DepthwiseConv", "dynamic", _ANY, _BOTH, TARGETS, None, "Cast → Mul → Conv", ("Conv",),
        "float is faster",
        "ConvInteger has no depthwise kernel: 1.6 to 12 × the time of a float Conv (measured)",
    ),
)  # fmt: skip

_MATMUL_DYNAMIC_FORMS = (
    Form(
        "MatMul", "dynamic", _SAFE, _BOTH, TARGETS, _U8S8, _MATMUL_DYNAMIC,
        ("DynamicQuantizeMatMul",),
        "the fastest pair, and exact: two products of at most 64·255 fit into 16 bits",
        "one node of all four; several terms share DynamicQuantizeLinear: MatMulIntegerToFloat",
    ),
    Form(
        "MatMul", "dynamic", _FULL, _BOTH, ("cpu-vnni", "cpu-arm"), _U8S8, _MATMUL_DYNAMIC,
        ("DynamicQuantizeMatMul",),
        "the fastest pair, and exact",
        "VNNI adds four products in 32 bits; ARM flips the constant weight once, at load",
    ),
    Form(
        "MatMul", "dynamic", _FULL, _BOTH, ("cpu-avx2",), _U8U8, _MATMUL_DYNAMIC,
        ("DynamicQuantizeMatMul",),
        _NO_FAST_PAIR, _SATURATES,
    ),
)  # fmt: skip

_STATIC = (
    Form(
        "Conv", "static", _SAFE, _MERGED, X86, _U8S8, _QDQ_CONV, ("QLinearConv",),
        "the fastest pair, and exact",
        "the weight's nodes are computed at load; the bias's scale must be that of the product, "
        "and only Relu or Clip that the output's range implies may stand before the last pair",
    ),
    Form(
        "Conv", "static", _FULL, _MERGED, ("cpu-vnni",), _U8S8, _QDQ_CONV, ("QLinearConv",),
        "the fastest pair, and exact",
        "VNNI adds four products in 32 bits",
    ),
    Form(
        "Conv", "static", _FULL, _MERGED, ("cpu-avx2",), _U8U8, _QDQ_CONV, ("QLinearConv",),
        _UNLESS_FITTED, _SATURATES,
    ),
    Form(
        "Conv", "static", _ANY, _MERGED, ("cpu-arm",), _S8S8, _QDQ_CONV, ("QLinearConv",),
        "the pair that ARM's dot product takes as it is", _ARM,
    ),
    Form(
        "DepthwiseConv", "static", _ANY, _MERGED, X86, _U8S8, _QDQ_CONV, ("QLinearConv",),
        "the fastest pair, and exact with 8 bits too",
        "QLinearConv's depthwise kernel adds in 32 bits on every x86 (measured)",
    ),
    Form(
        "DepthwiseConv", "static", _ANY, _MERGED, ("cpu-arm",), _S8S8, _QDQ_CONV,
        ("QLinearConv",), "the type of the neighbouring Convs' activations", _ARM,
    ),
    Form(
        "MatMul", "static", _SAFE, _MERGED, X86, _U8S8, _QDQ_MATMUL, ("QLinearMatMul",),
        "the fastest pair, and exact",
        "without the last pair of nodes: MatMulIntegerToFloat; with an Add after it: QGemm, if the "
        "bias is DequantizeLinear(int32) and the weight's DequantizeLinear states a zero point",
    ),
    Form(
        "MatMul", "static", _FULL, _MERGED, ("cpu-vnni",), _U8S8, _QDQ_MATMUL, ("QLinearMatMul",),
        "the fastest pair, and exact",
        "VNNI adds four products in 32 bits",
    ),
    Form(
        "MatMul", "static", _FULL, _MERGED, ("cpu-avx2",), _U8U8, _QDQ_MATMUL, ("QLinearMatMul",),
        _UNLESS_FITTED, _SATURATES,
    ),
    Form(
        "MatMul", "static", _ANY, _MERGED, ("cpu-arm",), _S8S8, _QDQ_MATMUL, ("QLinearMatMul",),
        "the pair that ARM's dot product takes as it is", _ARM,
    ),
)  # fmt: skip

_FLOAT_WEIGHT = "Cast(int4 → float) → Mul(scale) [→ Add] [→ Reshape]"
_FLOAT_FACT = (
    "a Cast is computed at load; DequantizeLinear would be run with every inference "
    "(1.2 to 1.7 × the time of a float Conv)"
)
_FLOAT = (
    Form(
        "Conv", "none", _ANY, _BOTH, TARGETS, None, f"{_FLOAT_WEIGHT} → Conv", ("Conv",),
        "float speed, small file", _FLOAT_FACT,
    ),
    Form(
        "DepthwiseConv", "none", _ANY, _BOTH, TARGETS, None, f"{_FLOAT_WEIGHT} → Conv", ("Conv",),
        "float speed, small file", _FLOAT_FACT,
    ),
    Form(
        "MatMul", "none", _ANY, _BOTH, TARGETS, None, f"{_FLOAT_WEIGHT} → MatMul", ("MatMul",),
        "float speed, small file", _FLOAT_FACT,
    ),
    Form(
        "MatMul", "none", _ANY, _MERGED, TARGETS, None,
        "DequantizeLinear(4 or 8 bits, blocks along axis 0) → MatMul", ("MatMulNBits",),
        "4-bit weights in memory too; faster for one row, with activations rounded to int8",
        "blocks along axis 1, or nodes between the two, keep DequantizeLinear and MatMul apart",
    ),
)  # fmt: skip

# In order of preference: the first that fits is taken.
FORMS: tuple[Form, ...] = (*_CONV_DYNAMIC, *_MATMUL_DYNAMIC_FORMS, *_STATIC, *_FLOAT)


def choose_form(
    op: Operator,
    activations: Activations,
    bits: int,
    target: Target,
    *,
    convolves_int8: bool = True,
) -> Form:
    """The form in which a weight of that width is written.

    Args:
        op: the operator; DepthwiseConv is a Conv with one input and one output channel per group.
        activations: how activations are quantized.
        bits: width of the integer weight of one product, 2 to 8: terms × bits when merged.
        target: the CPU that it is made for.
        convolves_int8: False where the file has to run in onnxruntime before 1.24.

    Raises:
        ValueError: no form has such a weight.
    """
    for form in FORMS:
        if form.fits(op, activations, bits, target) and (convolves_int8 or not form.convolves_int8):
            return form
    raise ValueError(
        f"no form for {op} with {bits}-bit weights, activations {activations}, {target}"
    )


def type_pair(
    op: Operator,
    activations: Literal["dynamic", "static"],
    bits: int,
    target: Target,
    *,
    convolves_int8: bool = True,
) -> TypePair:
    """The types of an integer product; the arguments are those of `choose_form`.

    Raises:
        ValueError: no form has such a weight, or it is computed in float there.
    """
    form = choose_form(op, activations, bits, target, convolves_int8=convolves_int8)
    if form.pair is None:
        raise ValueError(f"{op} with activations {activations} is computed in float: {form.reason}")
    return form.pair


def weight_zero_point(kind: IntType, bits: int) -> int:
    """The zero point of an integer weight of that width, the lowest that makes it unsigned.

    128 for every width would be shorter to say, but 4-bit weights would then saturate too where
    8-bit ones do: what the kernel multiplies is the weight with its zero point.
    """
    return 0 if kind == "int8" else 2 ** (bits - 1)

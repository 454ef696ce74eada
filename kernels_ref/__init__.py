"""The arithmetic of onnxq, in numpy alone."""

from onnxq.kernels_ref.digit import merge_digits
from onnxq.kernels_ref.error_sums import ErrorSums
from onnxq.kernels_ref.errors import (
    cosine,
    mae,
    max_abs_error,
    relative_error,
    sqnr_db,
    top1_agreement,
)
from onnxq.kernels_ref.fixed_ratio import fixed_ratio_bound
from onnxq.kernels_ref.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    reduce_absmax,
    scale_shape,
    spread,
)
from onnxq.kernels_ref.integer import conv, conv_integer, matmul_integer
from onnxq.kernels_ref.quantize import (
    absmax_scale,
    affine_params,
    dequantize,
    half_range,
    qrange,
    quantize,
)
from onnxq.kernels_ref.series import (
    Series,
    SeriesKind,
    expand,
    realize,
    restore,
    series_scales,
)
from onnxq.kernels_ref.term import Term

__all__ = [
    "ErrorSums",
    "Granularity",
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "Series",
    "SeriesKind",
    "Term",
    "absmax_scale",
    "affine_params",
    "conv",
    "conv_integer",
    "cosine",
    "dequantize",
    "expand",
    "fixed_ratio_bound",
    "half_range",
    "mae",
    "matmul_integer",
    "max_abs_error",
    "merge_digits",
    "qrange",
    "quantize",
    "realize",
    "reduce_absmax",
    "relative_error",
    "restore",
    "scale_shape",
    "series_scales",
    "spread",
    "sqnr_db",
    "top1_agreement",
]

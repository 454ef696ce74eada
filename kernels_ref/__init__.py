"""The arithmetic of onnxq, in numpy alone."""

from onnxq.kernels_ref.affine_fit import fit_affine, keep_if_better
from onnxq.kernels_ref.centre import split_centre
from onnxq.kernels_ref.clip_search import CLIP_RATIOS, ClipMeasure, OutputSamples, search_clip
from onnxq.kernels_ref.descent import descend
from onnxq.kernels_ref.digit import merge_digits
from onnxq.kernels_ref.equalize import equalization_scales
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
from onnxq.kernels_ref.hessian import least_squares_target
from onnxq.kernels_ref.integer import conv, conv_integer, matmul_integer
from onnxq.kernels_ref.moments import InputMoments, conv_patches
from onnxq.kernels_ref.quantize import (
    absmax_scale,
    affine_params,
    dequantize,
    half_range,
    qrange,
    quantize,
)
from onnxq.kernels_ref.ranges import RangeHistogram, activation_params
from onnxq.kernels_ref.second_order import Rounded, round_second_order
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
    "CLIP_RATIOS",
    "ClipMeasure",
    "ErrorSums",
    "Granularity",
    "InputMoments",
    "OutputSamples",
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "RangeHistogram",
    "Rounded",
    "Series",
    "SeriesKind",
    "Term",
    "absmax_scale",
    "activation_params",
    "affine_params",
    "conv",
    "conv_integer",
    "conv_patches",
    "cosine",
    "dequantize",
    "descend",
    "equalization_scales",
    "expand",
    "fit_affine",
    "fixed_ratio_bound",
    "half_range",
    "keep_if_better",
    "least_squares_target",
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
    "round_second_order",
    "scale_shape",
    "search_clip",
    "series_scales",
    "split_centre",
    "spread",
    "sqnr_db",
    "top1_agreement",
]

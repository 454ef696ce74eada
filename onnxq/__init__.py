"""onnxq rewrites an ONNX model into parallel integer-weight basis nodes summed by Add nodes.

Names are imported when first used, so that `onnxq.kernels_ref` needs numpy alone.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.api import Result, quantize
    from onnxq.benchmarking import Benchmark, bench
    from onnxq.comparison import Comparison, compare
    from onnxq.errors import (
        CalibrationError,
        ConfigError,
        ModelError,
        OnnxqError,
        PassError,
        ValidationError,
    )
    from onnxq.folding import FoldReport, FoldResult, fold
    from onnxq.inspection import Inspection, inspect
    from onnxq.plan import NodePlan, Plan
    from onnxq.report import Report

__version__ = version("onnxq")

_HOME = {
    "Benchmark": "benchmarking",
    "CalibrationError": "errors",
    "Comparison": "comparison",
    "ConfigError": "errors",
    "FoldReport": "folding",
    "FoldResult": "folding",
    "Inspection": "inspection",
    "ModelError": "errors",
    "NodePlan": "plan",
    "OnnxqError": "errors",
    "PassError": "errors",
    "Plan": "plan",
    "Report": "report",
    "Result": "api",
    "ValidationError": "errors",
    "bench": "benchmarking",
    "compare": "comparison",
    "fold": "folding",
    "inspect": "inspection",
    "quantize": "api",
}

__all__ = [
    "Benchmark",
    "CalibrationError",
    "Comparison",
    "ConfigError",
    "FoldReport",
    "FoldResult",
    "Inspection",
    "ModelError",
    "NodePlan",
    "OnnxqError",
    "PassError",
    "Plan",
    "Report",
    "Result",
    "ValidationError",
    "bench",
    "compare",
    "fold",
    "inspect",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    return getattr(import_module(f"onnxq.{_HOME[name]}"), name)

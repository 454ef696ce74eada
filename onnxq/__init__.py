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
    from onnxq.doctor import Diagnosis, diagnose
    from onnxq.errors import (
        CalibrationError,
        ConfigError,
        ModelError,
        OnnxqError,
        PassError,
        ValidationError,
    )
    from onnxq.folding import FoldReport, FoldResult, fold
    from onnxq.goal import Infeasible
    from onnxq.images import ImageOptions
    from onnxq.inspection import Inspection, inspect
    from onnxq.options import Options
    from onnxq.parts import PartsRunner, SplitReport, run_parts, split
    from onnxq.plan import NodePlan, Plan
    from onnxq.progressive import TermsReport, TermsResult, extend, truncate
    from onnxq.report import Report
    from onnxq.sweep import Sweep
    from onnxq.sweeping import sweep_model

__version__ = version("onnxq")

_HOME = {
    "Benchmark": "benchmarking",
    "CalibrationError": "errors",
    "Comparison": "comparison",
    "ConfigError": "errors",
    "Diagnosis": "doctor",
    "FoldReport": "folding",
    "FoldResult": "folding",
    "ImageOptions": "images",
    "Infeasible": "goal",
    "Inspection": "inspection",
    "ModelError": "errors",
    "NodePlan": "plan",
    "OnnxqError": "errors",
    "PassError": "errors",
    "Options": "options",
    "PartsRunner": "parts",
    "Plan": "plan",
    "Report": "report",
    "Result": "api",
    "SplitReport": "parts",
    "Sweep": "sweep",
    "TermsReport": "progressive",
    "TermsResult": "progressive",
    "ValidationError": "errors",
    "bench": "benchmarking",
    "compare": "comparison",
    "diagnose": "doctor",
    "extend": "progressive",
    "fold": "folding",
    "inspect": "inspection",
    "quantize": "api",
    "run_parts": "parts",
    "split": "parts",
    "sweep_model": "sweeping",
    "truncate": "progressive",
}

__all__ = [
    "Benchmark",
    "CalibrationError",
    "Comparison",
    "ConfigError",
    "Diagnosis",
    "FoldReport",
    "FoldResult",
    "ImageOptions",
    "Infeasible",
    "Inspection",
    "ModelError",
    "NodePlan",
    "OnnxqError",
    "Options",
    "PartsRunner",
    "PassError",
    "Plan",
    "Report",
    "Result",
    "SplitReport",
    "Sweep",
    "TermsReport",
    "TermsResult",
    "ValidationError",
    "bench",
    "compare",
    "diagnose",
    "extend",
    "fold",
    "inspect",
    "quantize",
    "run_parts",
    "split",
    "sweep_model",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    return getattr(import_module(f"onnxq.{_HOME[name]}"), name)

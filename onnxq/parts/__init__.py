"""The model as a sum of basis models: split into parts, and run side by side."""

from onnxq.parts.runner import PartsRunner, run_parts, run_parts_file
from onnxq.parts.splitting import SplitReport, split

__all__ = ["PartsRunner", "SplitReport", "run_parts", "run_parts_file", "split"]

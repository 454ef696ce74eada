"""The errors a user can meet. Each message says what, where, and what to do."""

from __future__ import annotations


class OnnxqError(Exception):
    """Base of every error that onnxq raises on purpose."""


class ModelError(OnnxqError):
    """The model file cannot be used: unreadable, invalid, or of a kind that is not supported."""


class ConfigError(OnnxqError):
    """An option, a plan or a data file contradicts itself or the model."""


class CalibrationError(OnnxqError):
    """Calibration data do not fit the model."""


class PassError(OnnxqError):
    """A pass left an invalid graph behind; names the pass, the node and the tensor."""


class ValidationError(OnnxqError):
    """The written model does not load, or its outputs cannot be right."""

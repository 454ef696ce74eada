"""onnxq rewrites an ONNX model into parallel integer-weight basis nodes summed by Add nodes."""

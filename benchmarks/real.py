"""The trained models and samples that benchmarks and tests read, where they are at hand.

`ONNXQ_REAL` names the folder (models/ and data/ in it).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

REAL = Path(os.environ.get("ONNXQ_REAL", Path(__file__).parents[2] / "shared" / "real"))
MODELS = REAL / "models"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


def imagenet(normalisation: str, start: int = 0, stop: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 3, 224, 224] float32, labels), `normalisation` is "torch" or "tf"."""
    from PIL import Image

    archive = np.load(REAL / "data" / "imagenet_500.npz")
    jpeg, offset = archive["jpeg"], archive["offset"]
    images = []
    for i in range(start, stop):
        picture = Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB")
        x = np.asarray(picture, np.float32).transpose(2, 0, 1)
        images.append(x / 127.5 - 1 if normalisation == "tf" else (x / 255 - _MEAN) / _STD)
    return np.stack(images).astype(np.float32), archive["label"][start:stop].astype(np.int64)


def cifar(count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 3, 32, 32] float32, labels)."""
    archive = np.load(REAL / "data" / "cifar10_jpeg.npz")
    x = archive["x"][:count].astype(np.float32).transpose(0, 3, 1, 2) / 255
    return ((x - _MEAN) / _STD).astype(np.float32), archive["y"][:count].astype(np.int64)


def classifier_data(name: str, count: int = 500) -> dict[str, np.ndarray]:
    """Samples with labels for one of the three classifiers."""
    if name == "cifar10_resnet20":
        x, label = cifar(count)
        return {"input": x, "label": label}
    x, label = imagenet("tf" if name.startswith("mobilenet") else "torch", 0, count)
    return {"input": x, "label": label}


CLASSIFIERS = ("cifar10_resnet20", "squeezenet1.1", "mobilenet_v1_0.75_224")

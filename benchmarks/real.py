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


def _pages(count: int) -> np.ndarray:
    """Pictures of a few words, 3×224×224: a text detector has nothing to say about other images."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)
    pages = []
    for _ in range(count):
        page = Image.new("RGB", (224, 224), tuple(int(v) for v in rng.integers(180, 256, 3)))
        draw = ImageDraw.Draw(page)
        for line in range(4):
            word = "".join(chr(int(c)) for c in rng.integers(97, 123, 9))
            place = (int(rng.integers(5, 60)), 20 + 50 * line)
            draw.text(place, word, fill=(20, 20, 40), font_size=28)
        pages.append((np.asarray(page, np.float32).transpose(2, 0, 1) / 255 - _MEAN) / _STD)
    return np.stack(pages).astype(np.float32)


def samples(name: str, count: int = 16) -> dict[str, np.ndarray]:
    """Inputs of the right kind for any of the models, without labels."""
    rng = np.random.default_rng(0)
    if name in CLASSIFIERS:
        return {"input": classifier_data(name, count)["input"]}
    if name == "minilm_l6_v2":
        ids = rng.integers(1000, 20000, (count, 64))
        ids[:, 0], ids[:, -1] = 101, 102
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
    if name == "magika_standard_v3_3":
        return {"bytes": rng.integers(0, 256, (count, 2048)).astype(np.int32)}
    if name == "silero_vad_op18_ifless":
        time = np.arange(512) / 16000
        pitch = rng.uniform(80, 400, (count, 1, 1))
        voice = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.05 * rng.standard_normal((count, 1, 512))
        return {
            "input": voice.astype(np.float32),
            "state": np.zeros((count, 2, 1, 128), np.float32),
            "sr": np.full(count, 16000, np.int64),
        }
    x = imagenet("tf" if name == "version-RFB-320" else "torch", 0, count)[0]
    if name == "version-RFB-320":
        padded = np.zeros((count, 3, 240, 320), np.float32)
        padded[:, :, 8:232, 48:272] = x
        return {"input": padded}
    if name == "ch_PP-OCRv3_det_infer":
        return {"x": _pages(count)}
    assert name == "sr_rlfn_x4"
    return {"lr": np.clip((x * _STD + _MEAN) * 255, 0, 255)[:, :, :96, :96].astype(np.float32)}

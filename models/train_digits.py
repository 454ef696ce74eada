"""Train the demo model: a small multi-branch RepVGG on scikit-learn's 8×8 digits.

The network is exported as it is trained: every block still has its three branches, and no
BatchNormalization is folded into a Conv. Folding them is the quantizer's work, so the demo model
must not come with that done. Needs the `train` extra: torch and scikit-learn.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime as ort
import torch
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

OPSET = 13
TEST_SIZE = 450
CALIBRATION_SIZE = 64
PIXEL_MAX = 16.0  # the data set's own range is 0..16; the model takes 0..1
WIDTHS = (24, 48, 72)


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalization."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class RepVGGBlock(nn.Module):
    """ReLU(3×3 conv+BN  +  1×1 conv+BN  +  BN), the last where input and output shapes agree.

    Source: RepVGG, arXiv 2101.03697, figure 4.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = ConvBN(in_channels, out_channels, 3, stride)
        self.pointwise = ConvBN(in_channels, out_channels, 1, stride)
        same_shape = in_channels == out_channels and stride == 1
        self.identity = nn.BatchNorm2d(out_channels) if same_shape else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.relu(y)


class Stage(nn.Module):
    """A block that changes width and resolution, then one that keeps both."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = RepVGGBlock(in_channels, out_channels, stride)
        self.second = RepVGGBlock(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class DigitsRepVGG(nn.Module):
    """Image [N, 1, 8, 8] in 0..1 to logits [N, 10]; 8×8, 4×4 and 2×2 feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = Stage(1, WIDTHS[0], stride=1)
        self.stage2 = Stage(WIDTHS[0], WIDTHS[1], stride=2)
        self.stage3 = Stage(WIDTHS[1], WIDTHS[2], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(WIDTHS[2], 10)
        # The betas of parallel branches get the same gradient. From a common start they would stay
        # equal, and the exporter would share one initializer among them through Identity nodes.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(image)))
        return self.classifier(self.flatten(self.pool(x)))


def load_split(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train image, test image (float32 [M, 1, 8, 8], 0..1), train label, test label (int64 [M])."""
    digits = load_digits()
    image = (digits.images / PIXEL_MAX).astype(np.float32)[:, None]
    label = digits.target.astype(np.int64)
    return tuple(
        train_test_split(image, label, test_size=TEST_SIZE, stratify=label, random_state=seed)
    )


def augment(image: Tensor) -> Tensor:
    """Rotate by up to ±10°, scale by ±10 % and shift by up to one pixel, each image its own way."""
    n = len(image)
    angle = (torch.rand(n) * 2 - 1) * np.deg2rad(10)
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * (2 / image.shape[-1])
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = functional.affine_grid(rows.view(n, 2, 3), list(image.shape), align_corners=False)
    return functional.grid_sample(image, grid, align_corners=False)


def train(image: Tensor, label: Tensor, *, epochs: int, batch: int = 64) -> DigitsRepVGG:
    """The trained network, in eval mode."""
    model = DigitsRepVGG()
    steps = len(image) // batch  # the incomplete last batch is dropped: its statistics are noisy
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, epochs=epochs, steps_per_epoch=steps
    )
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(image))[: steps * batch].view(steps, batch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(augment(image[index])), label[index])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            typer.echo(f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.4f}")
    return model.eval()


def export(model: DigitsRepVGG, path: Path) -> onnx.ModelProto:
    """Write the model with its branches and BatchNormalization nodes, and check that it has them.

    TrainingMode.PRESERVE is what keeps them: with EVAL the exporter folds Conv + BN on its own.
    The modules are in eval mode, so BatchNormalization is exported with its running statistics.
    """
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )
    proto = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    found = Counter(node.op_type for node in proto.graph.node)["BatchNormalization"]
    if found != norms:
        raise SystemExit(f"{path}: {found} BatchNormalization nodes, expected {norms}")
    onnx.save(proto, path)
    return proto


def check_runtime(model: DigitsRepVGG, path: Path, image: np.ndarray, label: np.ndarray) -> float:
    """The test accuracy in onnxruntime; stops where it is not torch's, image by image."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": image})
    with torch.no_grad():
        expected = model(torch.from_numpy(image)).numpy()
    if not np.array_equal(logits.argmax(1), expected.argmax(1)):
        raise SystemExit(f"{path}: onnxruntime and torch disagree on the class of some test image")
    typer.echo(f"max |onnxruntime - torch| on the logits: {np.abs(logits - expected).max():.1e}")
    return float((logits.argmax(1) == label).mean())


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 80,
    seed: Annotated[int, typer.Option(help="Fixes split, weights, order, augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write the three files to.")] = Path(
        __file__
    ).parent,
) -> None:
    """Train on scikit-learn's digits; write the model, the test set and the calibration set."""
    torch.set_num_threads(1)  # one thread: the same sums in the same order
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    train_image, test_image, train_label, test_label = load_split(seed)

    model = train(torch.from_numpy(train_image), torch.from_numpy(train_label), epochs=epochs)

    out.mkdir(parents=True, exist_ok=True)
    path = out / "digits_repvgg.onnx"
    proto = export(model, path)
    accuracy = check_runtime(model, path, test_image, test_label)
    np.savez_compressed(out / "digits_test.npz", image=test_image, label=test_label)
    # train_test_split shuffled the training part, so its head is a fair sample of it
    np.savez_compressed(out / "digits_calibration.npz", image=train_image[:CALIBRATION_SIZE])

    ops = Counter(node.op_type for node in proto.graph.node)
    parameters = sum(p.numel() for p in model.parameters())
    typer.echo(f"{path}: {parameters} parameters, {path.stat().st_size} bytes")
    typer.echo(", ".join(f"{count} {op}" for op, count in ops.most_common()))
    typer.echo(f"test accuracy {accuracy:.2%} on {len(test_label)} images (torch = onnxruntime)")


if __name__ == "__main__":
    typer.run(main)

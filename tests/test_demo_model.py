"""The demo model and its data as shipped, and the builders of the random networks."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest

MODELS = Path(__file__).resolve().parents[1] / "models"
DEMO = MODELS / "digits_repvgg.onnx"


def op_counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: onnx.ModelProto, image: np.ndarray, *outputs: str) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(outputs) or None, {model.graph.input[0].name: image})


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def builders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_resnet50", MODELS / "resnet50.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def demo() -> onnx.ModelProto:
    return onnx.load(DEMO)


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray]:
    with np.load(MODELS / "digits_test.npz") as file:
        return dict(file)


def test_demo_passes_the_checker_and_is_small(demo):
    onnx.checker.check_model(demo, full_check=True)
    assert DEMO.stat().st_size < 1_000_000


def test_demo_signature(demo):
    assert [(v.name, shape_of(v)) for v in demo.graph.input] == [("image", ["N", 1, 8, 8])]
    assert [(v.name, shape_of(v)) for v in demo.graph.output] == [("logits", ["N", 10])]
    assert {o.domain: o.version for o in demo.opset_import} == {"": 13}


def test_demo_is_unfused(demo):
    # six blocks: 3×3 and 1×1 conv, each with its norm; three of them with an identity norm as well
    assert op_counts(demo) == {
        "Conv": 12,
        "BatchNormalization": 15,
        "Add": 9,
        "Relu": 6,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_demo_sums_parallel_branches(demo):
    producer = {name: node for node in demo.graph.node for name in node.output}
    adds = [node for node in demo.graph.node if node.op_type == "Add"]
    joined = [{producer[name].op_type for name in node.input} for node in adds]
    assert joined.count({"BatchNormalization"}) == 6
    assert joined.count({"Add", "BatchNormalization"}) == 3


def test_demo_norms_are_not_trivial(demo):
    values = {t.name: onnx.numpy_helper.to_array(t) for t in demo.graph.initializer}
    for node in demo.graph.node:
        if node.op_type == "BatchNormalization":
            gamma, beta, mean, var = (values[name] for name in node.input[1:])
            assert all(np.ptp(x) > 0.01 for x in (gamma, beta, mean, var)), node.name
            assert var.min() > 0, node.name


def test_demo_names_are_readable(demo):
    names = [node.name for node in demo.graph.node]
    assert len(set(names)) == len(names)
    assert "/stage1/first/dense/conv/Conv" in names
    assert "/stage3/second/identity/BatchNormalization" in names


def test_demo_reaches_its_accuracy(demo, digits):
    assert digits["image"].shape == (450, 1, 8, 8)
    assert digits["image"].dtype == np.float32
    assert digits["label"].dtype == np.int64
    (logits,) = run(demo, digits["image"])
    assert (logits.argmax(1) == digits["label"]).mean() >= 0.97


def test_calibration_images_share_the_scaling_but_no_image_with_the_test(digits):
    with np.load(MODELS / "digits_calibration.npz") as file:
        assert file.files == ["image"]
        calibration = file["image"]
    assert calibration.shape == (64, 1, 8, 8)
    assert calibration.dtype == np.float32
    for images in (calibration, digits["image"]):
        assert images.min() == 0
        assert images.max() == 1
    seen = {image.tobytes() for image in digits["image"]}
    assert not any(image.tobytes() in seen for image in calibration)


def test_demo_files_are_small():
    assert sum(p.stat().st_size for p in MODELS.glob("digits_*.npz")) < 50_000


def test_resnet50_has_the_shape_of_resnet50(builders):
    model = builders.build_resnet50()
    ops = op_counts(model)
    assert (ops["Conv"], ops["BatchNormalization"], ops["Relu"], ops["Add"]) == (53, 53, 49, 16)
    assert shape_of(model.graph.input[0]) == ["N", 3, 224, 224]
    assert shape_of(model.graph.output[0]) == ["N", 1000]
    statistics = (".mean", ".var")
    parameters = [t for t in model.graph.initializer if not t.name.endswith(statistics)]
    assert sum(int(np.prod(t.dims)) for t in parameters) == 25_557_032


@pytest.mark.parametrize("name", ["build_resnet50", "build_mobileone_like"])
def test_random_networks_keep_unit_variance_through_depth(builders, name):
    model = getattr(builders, name)(image_size=64, num_classes=10)
    onnx.checker.check_model(model, full_check=True)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    for relu in relus:
        model.graph.output.append(onnx.helper.make_tensor_value_info(relu, 1, None))
    image = builders.sample_images(8, 64, seed=1)  # not the images it was built on
    logits, *activations = run(model, image, "logits", *relus)
    assert logits.shape == (8, 10)
    assert np.isfinite(logits).all()
    for relu, activation in zip(relus, activations, strict=True):
        # a rectified unit Gaussian has 0.58; 2 either way, and a residual sum may come to two units
        assert 0.29 < np.sqrt(activation.var((0, 2, 3)).mean()) < 1.6, relu


def test_random_networks_are_seeded(builders):
    build = builders.build_mobileone_like
    assert build(seed=3) == build(seed=3)
    assert build(seed=3) != build(seed=4)


def test_mobileone_like_is_multi_branch(builders):
    model = builders.build_mobileone_like()
    ops = op_counts(model)
    assert ops["BatchNormalization"] > ops["Conv"], "identity branches are norms without a conv"
    groups = {a.i for node in model.graph.node for a in node.attribute if a.name == "group"}
    assert groups == {1, 32, 48, 96, 160}
    (logits,) = run(model, builders.sample_images(2, 32))
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


def test_builder_writes_what_it_returns(builders, tmp_path):
    path = tmp_path / "small.onnx"
    model = builders.build_mobileone_like(path, widths=(8, 16), depth=1, branches=1)
    assert onnx.load(path) == model
    assert model.ir_version == 8
    assert {o.domain: o.version for o in model.opset_import} == {"": 17}


def test_command_line_writes_a_model(tmp_path):
    path = tmp_path / "mobileone.onnx"
    script = str(MODELS / "resnet50.py")
    subprocess.run(  # noqa: S603
        [sys.executable, script, str(path), "--network", "mobileone"], check=True
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)

"""The Python API: nothing but the named output is touched, and a result can be used in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from command import contents, works, write

import onnxq
from onnxq.errors import ConfigError, ModelError
from onnxq.validation import reference_of


@pytest.mark.parametrize("as_path", [str, Path])
def test_without_output_nothing_is_written(tmp_path: Path, as_path: type) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    before = contents(tmp_path)
    result = onnxq.quantize(as_path(source))
    assert contents(tmp_path) == before
    assert result.path is None
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.size_after == len(result.model.SerializeToString())


def test_a_model_in_memory_is_not_modified() -> None:
    proto = small.conv_model()
    before = proto.SerializeToString(deterministic=True)
    result = onnxq.quantize(proto)
    result.model.graph.node[0].name = "changed"
    assert proto.SerializeToString(deterministic=True) == before
    assert result.model.graph.node[0].name != "changed"


def test_path_and_memory_give_the_same_model(tmp_path: Path) -> None:
    proto = small.conv_model()
    source = write(proto, tmp_path / "in.onnx")
    written = onnxq.quantize(source, tmp_path / "out.onnx")
    assert written.path == tmp_path / "out.onnx"
    assert onnx.load(written.path) == onnxq.quantize(proto).model == written.model


def test_save(tmp_path: Path) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    result = onnxq.quantize(source)
    for name in ("a.onnx", "b.onnx"):
        result.save(tmp_path / name)
        assert onnx.load(tmp_path / name) == result.model


@pytest.mark.parametrize("link", [False, True])
def test_save_onto_the_source_refuses(tmp_path: Path, link: bool) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    result = onnxq.quantize(source)
    target = source
    if link:
        target = tmp_path / "link.onnx"
        target.symlink_to(source)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="output path equals the input path"):
        result.save(target)
    assert contents(tmp_path) == before


def test_the_callers_plan_is_not_modified() -> None:
    proto = small.conv_model()
    plan = onnxq.quantize(proto).plan
    plan.scales.clear()
    result = onnxq.quantize(proto, plan=plan)
    assert plan.scales == {}
    assert result.plan.scales.keys() == {"conv"}


def test_a_plan_can_be_made_in_memory_and_edited() -> None:
    proto = small.conv_model()
    plan = onnxq.quantize(proto, activations="none").plan
    edited = plan.model_copy(
        update={"nodes": [plan["conv"].model_copy(update={"terms": 1})], "scales": {}}
    )
    result = onnxq.quantize(proto, plan=edited)
    assert [node.terms for node in result.plan.nodes] == [1]


def test_a_single_glob_is_not_taken_apart() -> None:
    result = onnxq.quantize(small.conv_model(), include="conv")  # type: ignore[arg-type]
    assert result.report.quantized == 1


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--terms 0: must be greater than or equal to 1"):
        onnxq.quantize(small.conv_model(), terms=0)


def test_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    onnxq.quantize(small.conv_model(), progress=lambda *args: seen.append(args))
    assert {what for what, _, _ in seen} == {"planning", "expanding"}
    for what in ("planning", "expanding"):
        counts = [done for name, done, total in seen if name == what and total == 1]
        assert counts[-1] == 1 and counts == sorted(counts)


def test_opset_raise_is_reported() -> None:
    report = onnxq.quantize(small.conv_model(opset=13), terms=2).report
    assert (report.opset_before, report.opset_after) == (13, 21)
    report = onnxq.quantize(small.conv_model(opset=17), weight_bits=8).report
    assert (report.opset_before, report.opset_after) == (17, 17)


def test_weights_that_could_be_overridden_are_reported() -> None:
    proto = small.conv_model()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [4, 3, 3, 3]))
    warnings = onnxq.quantize(proto).report.warnings
    assert any("listed as graph inputs" in warning for warning in warnings)


def _picky(folder: Path) -> Path:
    """A model that fails on zeros and ones: its index must be 5."""
    text = """g (float[1,4] x, int64[1] i) => (float[1,3] y) {
        five = Constant <value = int64[1] {5}> ()
        off = Sub (i, five)
        p = Gather (x, off)
        [dot] y = MatMul (p, w)
    }"""
    return write(small.model(text, {"w": small.weights(4, 3)}), folder / "in.onnx")


def test_a_model_that_made_up_inputs_do_not_suit(tmp_path: Path) -> None:
    source, target = _picky(tmp_path), tmp_path / "out.onnx"
    result = onnxq.quantize(source, target)
    (warning,) = result.report.warnings
    assert warning.startswith("not validated: the float model fails on made-up inputs (")
    assert warning.endswith("); give --data")
    assert result.report.comparison is None
    onnx.checker.check_model(target, full_check=True)
    out = " ".join(works("quantize", source, target).split())
    assert "warning: not validated: " in out and "give --data" in out
    assert "error against the float model" not in out
    x, i = np.ones((3, 4), np.float32), np.full(3, 5)
    np.savez(tmp_path / "x.npz", x=x, i=i)
    out = works("quantize", source, target, "--data", tmp_path / "x.npz")
    assert "warning" not in out
    assert "error against the float model on 3 samples" in out


def test_inputs_that_cannot_be_made_up() -> None:
    text = """g (float[2,4] x, string[1] s) => (float[2,3] y, string[1] t) {
        [dot] y = MatMul (x, w)
        t = Identity (s)
    }"""
    result = onnxq.quantize(small.model(text, {"w": small.weights(4, 3)}))
    assert "input 's' is not a numeric tensor" in result.report.warnings[0]


def test_inputs_that_are_too_large_to_be_made_up() -> None:
    text = f"g (float[{10**12},4] x) => (float[{10**12},3] y) {{ [dot] y = MatMul (x, w) }}"
    result = onnxq.quantize(small.model(text, {"w": small.weights(4, 3)}))
    assert "'x'" in result.report.warnings[0] and "too large" in result.report.warnings[0]


def test_several_inputs_and_outputs() -> None:
    text = """g (float[N,4] x, bool[N] keep, int64[N] k, float scale) => (
        float[N,3] y, int64[N] best, float[M,3] kept, float total
    ) {
        [dot] d = MatMul (x, w)
        y = Mul (d, scale)
        best = ArgMax <axis = 1, keepdims = 0> (y)
        kept = Compress <axis = 0> (y, keep)
        kf = Cast <to = 1> (k)
        total = ReduceSum <keepdims = 0> (kf)
    }"""
    proto = small.model(text, {"w": small.weights(4, 3)})
    found = onnxq.quantize(proto, data=_data(5)).report.comparison
    assert found is not None and found.samples == 5
    errors = {output.name: output for output in found.outputs}
    assert errors.keys() == {"y", "best", "kept", "total"}
    assert errors["y"].mae > 0
    assert errors["total"].mae == 0 and np.isinf(errors["total"].sqnr_db)


def _data(samples: int) -> dict[str, np.ndarray]:
    return {
        "x": small.weights(samples, 4, seed=3),
        "keep": np.arange(samples) % 2 == 0,
        "k": np.arange(samples),
        "scale": np.linspace(0.5, 2, samples, dtype=np.float32),
    }


def test_an_output_that_is_a_sequence() -> None:
    text = """g (float[2,4] x) => (seq(float[2,3]) s, float[2,3] y) {
        [dot] y = MatMul (x, w)
        s = SequenceConstruct (y, y)
    }"""
    proto = small.model(text, {"w": small.weights(4, 3)})
    report = onnxq.quantize(proto).report
    assert report.warnings == ()
    assert report.comparison is not None
    assert [output.name for output in report.comparison.outputs] == ["y"]
    data = {"x": np.ones((2, 4), np.float32), "label": np.zeros(2, int)}
    with pytest.raises(ConfigError, match="`label` needs a classifier"):
        onnxq.quantize(proto, data=data)


@pytest.mark.parametrize(
    ("output", "last"),
    [
        ("float[3]", "ReduceMax <axes = [0], keepdims = 0> (d)"),
        ("float", "ReduceMax <keepdims = 0> (d)"),
        ("float[1,2,3]", "Unsqueeze (d, zero)"),
        ("float[3,2]", "Transpose (d)"),
    ],
)
def test_labels_need_a_classifier(output: str, last: str) -> None:
    text = f"""g (float[2,4] x) => ({output} y) {{
        zero = Constant <value = int64[1] {{0}}> ()
        [dot] d = MatMul (x, w)
        y = {last}
    }}"""
    proto = small.model(text, {"w": small.weights(4, 3)})
    data = {"x": np.ones((2, 4), np.float32), "label": np.zeros(2, int)}
    with pytest.raises(ConfigError, match="`label` needs a classifier"):
        onnxq.quantize(proto, data=data)
    assert onnxq.quantize(proto, data={"x": data["x"]}).report.comparison is not None


def test_data_may_be_lists() -> None:
    text = "g (float[N,4] x) => (float[N,3] y) { [dot] y = MatMul (x, w) }"
    proto = small.model(text, {"w": small.weights(4, 3)})
    data = {"x": [[1.0, 2, 3, 4]] * 2, "label": [0, 1]}
    found = onnxq.quantize(proto, data=data).report.comparison  # type: ignore[arg-type]
    assert found is not None and found.float_accuracy in (0.0, 0.5, 1.0)


def test_a_model_larger_than_protobuf_allows() -> None:
    class Model:
        """Stands for a ModelProto of more than 2 GiB."""

        __class__ = onnx.ModelProto  # type: ignore[assignment]

        def SerializeToString(self) -> bytes:  # noqa: N802
            raise ValueError("Message exceeds maximum protobuf size of 2GB")

    with pytest.raises(ModelError, match="larger than protobuf's 2 GiB: save it and give its path"):
        reference_of(Model())  # type: ignore[arg-type]


def test_the_working_folder_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(small.conv_model(), tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    result = onnxq.quantize("in.onnx", "out.onnx", plan_out="plan.json")
    assert sorted(path.name for path in Path().iterdir()) == [
        "in.onnx",
        "out.onnx",
        "plan.json",
        "plan.npz",
    ]
    assert result.path == Path("out.onnx")
    assert onnx.load("out.onnx") == result.model


def test_public_names() -> None:
    for name in onnxq.__all__:
        assert getattr(onnxq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        onnxq.nothing  # noqa: B018

"""Bad models end in one line and exit code 2, and nothing is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from command import DEMO, contents, refused, works, write
from onnx import numpy_helper

import onnxq
from onnxq.errors import OnnxqError, ValidationError
from onnxq.model import write as write_module


def _text(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.write_text("hello, this is no model\n" * 9)
    return path


def _empty(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.write_bytes(b"")
    return path


def _truncated(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.write_bytes(DEMO.read_bytes()[:100_000])
    return path


def _folder(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.mkdir()
    return path


def _missing(folder: Path) -> Path:
    return folder / "in.onnx"


def _without_its_data(folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(
        small.conv_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    (folder / "w.bin").unlink()
    return path


def _dangling(folder: Path) -> Path:
    proto = small.conv_model()
    proto.graph.node[1].input[0] = "gone"
    return write(proto, folder / "in.onnx")


def _twice(folder: Path) -> Path:
    proto = small.conv_model()
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
    return write(proto, folder / "in.onnx")


def _not_finite(value: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        proto = small.conv_model()
        weight = small.weights(4, 3, 3, 3)
        weight[1, 2, 0, 0] = value
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
        return write(proto, folder / "in.onnx")

    return make


def _no_candidate(folder: Path) -> Path:
    return write(small.model("g (float[2] x) => (float[2] y) { y = Relu (x) }"), folder / "in.onnx")


def _all_left_alone(folder: Path) -> Path:
    text = "g (float[2,3] x, float[3,2] w) => (float[2,2] y) { [dot] y = MatMul (x, w) }"
    return write(small.model(text), folder / "in.onnx")


def _already_quantized(folder: Path) -> Path:
    return write(onnxq.quantize(small.conv_model()).model, folder / "in.onnx")


def _no_operator_of_onnxruntime(folder: Path) -> Path:
    proto = small.conv_model()
    proto.opset_import.add(domain="acme", version=1)
    proto.graph.node[1].domain = "acme"
    return write(proto, folder / "in.onnx")


BAD_MODELS = [
    pytest.param(_text, ["in.onnx", "not an ONNX model"], id="text"),
    pytest.param(_empty, ["in.onnx is empty"], id="empty"),
    pytest.param(_truncated, ["in.onnx", "truncated"], id="truncated"),
    pytest.param(_folder, ["in.onnx is a folder"], id="folder"),
    pytest.param(_missing, ["in.onnx does not exist: check the path"], id="missing"),
    pytest.param(_without_its_data, ["w.bin is missing: put it beside"], id="external-data"),
    pytest.param(_dangling, ["'relu' (Relu) reads 'gone', which nothing produces"], id="dangling"),
    pytest.param(_twice, ["two initializers are named 'w': give each"], id="duplicate"),
]
UNUSABLE = [
    pytest.param(_not_finite(np.nan), ["'w' of Conv 'conv' has 1 NaN", "--exclude"], id="nan"),
    pytest.param(_not_finite(np.inf), ["'w' of Conv 'conv' has 1 NaN or inf"], id="inf"),
    pytest.param(
        _no_candidate, ["nothing to quantize", "the model has no Conv, MatMul"], id="none"
    ),
    pytest.param(
        _all_left_alone,
        ["nothing to quantize", "all 1 candidate", "see `onnxq inspect`"],
        id="left-alone",
    ),
    pytest.param(_already_quantized, ["nothing to quantize", "already quantized"], id="again"),
    pytest.param(_no_operator_of_onnxruntime, ["onnxruntime cannot load", "in.onnx"], id="acme"),
]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("make", "parts"), [*BAD_MODELS, *UNUSABLE])
def test_quantize(
    tmp_path: Path, make: Callable[[Path], Path], parts: list[str], existing: bool
) -> None:
    source, target = make(tmp_path), tmp_path / "out.onnx"
    if existing:
        target.write_bytes(b"before")
    message = refused(tmp_path, "quantize", source, target, "--plan-out", tmp_path / "p.json")
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(("make", "parts"), BAD_MODELS)
def test_inspect(tmp_path: Path, make: Callable[[Path], Path], parts: list[str]) -> None:
    message = refused(tmp_path, "inspect", make(tmp_path))
    for part in parts:
        assert part in message, message


LOADABLE_BY_ONNXRUNTIME = (_twice,)


@pytest.mark.parametrize(
    "make",
    [m.values[0] for m in BAD_MODELS if m.values[0] not in LOADABLE_BY_ONNXRUNTIME],
    ids=lambda make: make.__name__,
)
def test_compare(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    bad = make(tmp_path)
    for pair in ((DEMO, bad), (bad, DEMO)):
        assert "in.onnx" in refused(tmp_path, "compare", *pair, "--no-latency")


def test_a_message_with_line_breaks_is_one_line(tmp_path: Path) -> None:
    proto = small.conv_model()
    proto.graph.node[1].input[0] = "two\nlines"
    proto.graph.node[1].name = "a\nb"
    refused(tmp_path, "quantize", write(proto, tmp_path / "in.onnx"), tmp_path / "out.onnx")


@pytest.mark.parametrize("spelling", ["same", "relative", "symlink", "hardlink"])
def test_output_is_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    target = {"same": source, "relative": Path("../in.onnx")}.get(spelling, tmp_path / "x.onnx")
    if spelling == "symlink":
        target.symlink_to(source)
    elif spelling == "hardlink":
        target.hardlink_to(source)
    for arguments in (
        ["quantize", source, target],
        ["quantize", source, tmp_path / "o.onnx", "--plan-out", target],
        ["fold", source, target],
    ):
        message = refused(tmp_path, *arguments)
        assert "would overwrite the input model: give another name" in message


def test_output_is_the_data_file_of_the_input(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(
        small.conv_model(), source, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    message = refused(tmp_path, "quantize", source, tmp_path / "w.bin")
    assert "would overwrite the input model's data" in message


def test_target_folder_is_missing(tmp_path: Path) -> None:
    message = refused(tmp_path, "quantize", DEMO, tmp_path / "no" / "out.onnx")
    assert f"the folder {tmp_path / 'no'} does not exist: create it" in message


def test_target_is_a_folder(tmp_path: Path) -> None:
    assert "is a folder: give a file name" in refused(tmp_path, "quantize", DEMO, tmp_path)


def test_target_folder_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root may write anywhere
    message = refused(tmp_path, "quantize", DEMO, tmp_path / "out.onnx")
    assert f"the folder {tmp_path} is not writable" in message


def test_target_folder_turns_out_not_to_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(write_module.tempfile, "mkdtemp", refuse)
    source = write(small.conv_model(), tmp_path / "in.onnx")
    message = refused(tmp_path, "quantize", source, tmp_path / "out.onnx")
    assert message.endswith("out.onnx: Permission denied")


@pytest.mark.parametrize("existing", [False, True])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    def full(file: object, data: bytes) -> None:
        file.write(bytes(data)[:10])  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_module, "_put", full)
    source = write(small.conv_model(), tmp_path / "in.onnx")
    if existing:
        (tmp_path / "out.onnx").write_bytes(b"before")
    plan = tmp_path / "plan.json"
    message = refused(tmp_path, "quantize", source, tmp_path / "out.onnx", "--plan-out", plan)
    assert message.endswith("out.onnx: No space left on device")


def test_a_result_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    real = onnxq.comparison.run

    def broken(session: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs = real(session, feed)
        calls.append(session)
        if len({id(s) for s in calls}) > 1:  # the second session is the quantized model's
            outputs[0][0, 0, 0, 0] = np.nan
        return outputs

    calls: list[object] = []
    monkeypatch.setattr(onnxq.comparison, "run", broken)
    with pytest.raises(ValidationError, match="'y' has NaN or Inf where the float model has none"):
        onnxq.quantize(source)
    calls.clear()
    message = refused(
        tmp_path, "quantize", source, tmp_path / "out.onnx", "--plan-out", tmp_path / "p.json"
    )
    assert "'y' has NaN or Inf where the float model has none" in message


@pytest.mark.parametrize("name", ["conv", "relu", "c"])
def test_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    data = small.conv_model().SerializeToString()
    old = name.encode()
    bad = data.replace(bytes([len(old)]) + old, bytes([len(old)]) + b"\xff" * len(old))
    (tmp_path / "in.onnx").write_bytes(bad)
    assert bad != data
    assert "UTF-8" in refused(tmp_path, "inspect", tmp_path / "in.onnx")


def test_onnxruntime_does_not_print(tmp_path: Path) -> None:
    """It would announce on stdout that it falls back from the CPU to the CPU."""
    data = small.conv_model().SerializeToString().replace(b"Relu", b"R\xfflu")
    (tmp_path / "in.onnx").write_bytes(data)
    message = refused(tmp_path, "compare", tmp_path / "in.onnx", tmp_path / "in.onnx")
    assert "onnxruntime cannot load" in message and "'utf-8' codec" in message


def _mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Truncated, bits flipped, a byte replaced, or some bytes gone."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        mutant = bytearray(data)
        at = int(rng.integers(len(data)))
        if i % 4 == 0:
            del mutant[at:]
        elif i % 4 == 1:
            for place in rng.integers(len(data), size=3):
                mutant[place] ^= 1 << int(rng.integers(8))
        elif i % 4 == 2:
            mutant[at] = int(rng.integers(128))
        else:
            del mutant[at : at + int(rng.integers(1, 20))]
        made.append(bytes(mutant))
    return made


def _fuzzed() -> list[onnx.ModelProto]:
    w = small.weights
    chain = small.model(
        """g (float[N,8] x, int64[2] s) => (float[N,6] y, float[2,1] z) {
            [a] h = MatMul (x, w)
            [b] r = Relu (h)
            [c] y = Gemm <transB = 1> (r, w2, b)
            k = Constant <value = float[2] {1, 2}> ()
            z0 = Reshape (k, s)
            z = Identity (z0)
        }""",
        {"w": w(8, 5), "w2": w(6, 5), "b": w(6)},
    )
    branch = small.model(
        """g (float[1,3,6,6] x, bool p) => (float[1,4,6,6] y) {
            [conv] c0 = Conv <pads = [1,1,1,1]> (x, w, b)
            [bn] c1 = BatchNormalization (c0, s, t, m, v)
            [if] y = If (p) <
                then_branch = f () => (float[1,4,6,6] a) {
                    [inner] a = Conv <pads = [1,1,1,1]> (c1, w3)
                },
                else_branch = e () => (float[1,4,6,6] n) { n = Neg (c1) }
            >
        }""",
        {"w": w(4, 3, 3, 3), "b": w(4), "s": w(4), "t": w(4), "m": w(4), "v": w(4) ** 2 + 1}
        | {"w3": w(4, 4, 3, 3)},
    )
    return [small.conv_model(), chain, branch]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a damaged number may overflow
@pytest.mark.parametrize("index", range(3))
def test_damaged_files_end_in_our_errors_or_work(tmp_path: Path, index: int) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    refusals = 0
    for mutant in _mutants(_fuzzed()[index].SerializeToString(), 150, seed=index):
        source.write_bytes(mutant)
        try:
            onnxq.quantize(source, target)
        except OnnxqError:
            refusals += 1
            assert contents(tmp_path).keys() == {"in.onnx"}
        else:
            onnx.checker.check_model(target)
            target.unlink()
    assert refusals > 30


def test_the_fuzzed_models_are_good_ones(tmp_path: Path) -> None:
    for proto in _fuzzed():
        works("quantize", write(proto, tmp_path / "in.onnx"), tmp_path / "out.onnx", "--quiet")

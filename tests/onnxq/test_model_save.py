"""A save is all or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import kitchen_sink
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto
from onnx import numpy_helper as nh

from onnxq.errors import ConfigError, ModelError
from onnxq.model import Model, load, save, to_proto
from onnxq.model import write as write_module


def _proto() -> ModelProto:
    proto = kitchen_sink.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        agraph (float[1000] x) => (float[1000] y) { y = Add (x, w) }"""
    )
    proto.graph.initializer.append(nh.from_array(np.arange(1000, dtype=np.float32), "w"))
    return proto


def _model() -> Model:
    return load(_proto())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("external", [None, False, True])
def test_save(tmp_path: Path, external: bool | None) -> None:
    save(_model(), str(tmp_path / "m.onnx"), external=external)
    assert _names(tmp_path) == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])
    feed = {"x": np.zeros(1000, np.float32)}
    got = ort.InferenceSession(tmp_path / "m.onnx").run(None, feed)[0]
    assert got[999] == 999
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    save(_model(), tmp_path / "m.onnx")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        save(_model(), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [False, True])
def test_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, code: int, existing: bool
) -> None:
    if existing:
        (tmp_path / "m.onnx").write_bytes(b"before")
        (tmp_path / "m.onnx.data").write_bytes(b"before too")

    def full(file: IO[bytes], data: Any) -> None:
        file.write(bytes(data)[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write_module, "_put", full)
    with pytest.raises(ModelError) as caught:
        save(_model(), tmp_path / "m.onnx", external=external)
    assert str(caught.value) == f"cannot write {tmp_path / 'm.onnx'}: {os.strerror(code)}"
    assert _names(tmp_path) == (["m.onnx", "m.onnx.data"] if existing else [])
    if existing:
        assert (tmp_path / "m.onnx").read_bytes() == b"before"
        assert (tmp_path / "m.onnx.data").read_bytes() == b"before too"


def test_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(_model(), tmp_path / "m.onnx", external=True)
    assert _names(tmp_path) == []


def test_checker_refuses(tmp_path: Path) -> None:
    model = _model()
    model.graph.nodes[0].attrs["no_such_attribute"] = 1
    (tmp_path / "m.onnx").write_bytes(b"before")
    with pytest.raises(ModelError, match=r"m\.onnx not written, onnx\.checker .*no_such_attribute"):
        save(model, tmp_path / "m.onnx")
    assert _names(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"before"


@pytest.mark.parametrize("external", [False, True])
def test_verify_sees_a_loadable_model(tmp_path: Path, external: bool) -> None:
    seen = []

    def verify(path: Path) -> None:
        feed = {"x": np.zeros(1000, np.float32)}
        seen.append(ort.InferenceSession(path).run(None, feed)[0][999])
        assert not (tmp_path / "m.onnx").exists()

    save(_model(), tmp_path / "m.onnx", external=external, verify=verify)
    assert seen == [999]


def test_verify_can_stop_the_save(tmp_path: Path) -> None:
    def verify(path: Path) -> None:
        raise RuntimeError(path.name)

    with pytest.raises(RuntimeError, match=r"m\.onnx"):
        save(_model(), tmp_path / "m.onnx", external=True, verify=verify)
    assert _names(tmp_path) == []


def test_data_are_moved_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = Path.replace

    def recorded(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recorded)
    save(_model(), tmp_path / "m.onnx", external=True)
    assert moved == ["m.onnx.data", "m.onnx"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder .*nowhere does not exist"):
        save(_model(), tmp_path / "nowhere" / "m.onnx")


def test_target_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, give a file name"):
        save(_model(), tmp_path)


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(write_module.tempfile, "mkdtemp", refuse)  # root may write anywhere
    with pytest.raises(ModelError, match=r"cannot write .*m\.onnx: Permission denied"):
        save(_model(), tmp_path / "m.onnx")


def _loaded(folder: Path) -> Model:
    save(_model(), folder / "in.onnx", external=True)
    return load(folder / "in.onnx")


@pytest.mark.parametrize("kind", ["same", "relative", "symlink", "hardlink"])
def test_output_equals_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = _loaded(tmp_path)
    target = tmp_path / "other.onnx"
    if kind == "same":
        target = tmp_path / "in.onnx"
    elif kind == "relative":
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        target = Path("../in.onnx")
    elif kind == "symlink":
        target.symlink_to(tmp_path / "in.onnx")
    else:
        target.hardlink_to(tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").read_bytes()
    with pytest.raises(ConfigError, match="output path equals the input path"):
        save(model, target)
    assert (tmp_path / "in.onnx").read_bytes() == before


def test_output_equals_the_input_data(tmp_path: Path) -> None:
    model = _loaded(tmp_path)
    with pytest.raises(ConfigError, match="is the external data file of the input"):
        save(model, tmp_path / "in.onnx.data")
    (tmp_path / "out.onnx.data").hardlink_to(tmp_path / "in.onnx.data")
    with pytest.raises(ConfigError, match="would overwrite a file of the input"):
        save(model, tmp_path / "out.onnx", external=True)


def test_two_gibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "_PROTOBUF_LIMIT", 3000)
    with pytest.raises(ModelError, match="save it to a path, with external data"):
        to_proto(_model())
    with pytest.raises(ModelError, match="save it with external data"):
        save(_model(), tmp_path / "m.onnx", external=False)
    monkeypatch.setattr(write_module, "_EMBED_LIMIT", 3000)
    save(_model(), tmp_path / "m.onnx")
    assert _names(tmp_path) == ["m.onnx", "m.onnx.data"]

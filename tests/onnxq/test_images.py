"""Folders of pictures as calibration samples."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from feeding import refused, spec

from onnxq.calibration import open_calibration
from onnxq.errors import CalibrationError
from onnxq.images import ImageOptions
from onnxq.session import input_specs, open_session, run

Image = pytest.importorskip("PIL.Image")

RGB = spec("image", "N", 3, 8, 8)
GREY = spec("image", "N", 1, 8, 8)
OPEN = spec("image", "N", 3, "H", "W")


def pixels(height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8; no two channels are alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels() if array is None else array).save(path)
    return path


def only(folder: Path, wanted: Any, options: ImageOptions | None = None) -> np.ndarray:
    (feed,) = open_calibration(folder, [wanted], options)
    return feed["image"]


# --- what pixels become


def test_a_picture_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    x = only(tmp_path, RGB)
    assert x.dtype == np.float32 and x.shape == (1, 3, 8, 8)
    expected = pixels().transpose(2, 0, 1)[None] * np.float32(1 / 255)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_scale_then_mean_then_std(tmp_path: Path, dtype: type[np.floating[Any]]) -> None:
    picture(tmp_path / "a.png")
    mean, std, scale = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), 1 / 100
    x = only(
        tmp_path,
        spec("image", 1, 3, 8, 8, dtype=dtype),
        ImageOptions(mean=mean, std=std, scale=scale),
    )
    expected = ((pixels() / 100 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)[None]
    # three float32 operations on values up to 2.55, divided by at least 0.25; then one rounding
    bound = 3 * 2.55 / 0.25 * np.finfo(np.float32).eps + 10.2 * np.finfo(dtype).eps
    assert x.dtype == dtype
    np.testing.assert_allclose(x, expected, rtol=0, atol=bound)
    one = only(
        tmp_path, spec("image", 1, 3, 8, 8, dtype=dtype), ImageOptions(mean=(0.5,), std=(0.5,))
    )
    bound = 3 / 0.5 * np.finfo(np.float32).eps + np.finfo(dtype).eps
    np.testing.assert_allclose(
        one, (pixels() / 127.5 - 1).transpose(2, 0, 1)[None], rtol=0, atol=bound
    )


def test_bgr_and_its_mean(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    x = only(tmp_path, RGB, ImageOptions(channels="bgr", scale=1, mean=(1, 2, 3)))
    expected = pixels()[..., ::-1] - np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(x, expected.transpose(2, 0, 1)[None])


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        (("N", 3, 8, 8), None, (1, 3, 8, 8)),
        (("N", 8, 8, 3), None, (1, 8, 8, 3)),
        (("N", 8, 8, 1), None, (1, 8, 8, 1)),
        ((None, None, 8, 8), "nchw", (1, 3, 8, 8)),
        (("N", 3, 3, 3), "nchw", (1, 3, 3, 3)),
        (("N", 3, 5, 3), "nhwc", (1, 3, 5, 3)),
    ],
)
def test_layouts(tmp_path: Path, shape: Any, layout: Any, expected: tuple[int, ...]) -> None:
    picture(tmp_path / "a.png")
    x = only(tmp_path, spec("image", *shape), ImageOptions(layout=layout))
    assert x.shape == expected and x.flags.c_contiguous
    if expected == (1, 8, 8, 3):
        np.testing.assert_array_equal(x[0], pixels() * np.float32(1 / 255))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("wanted", [RGB, GREY], ids=["rgb", "grey"])
def test_every_mode_becomes_colour_or_grey(tmp_path: Path, mode: str, wanted: Any) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels()).convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L" if wanted is GREY else "RGB")).reshape(8, 8, -1)
    x = only(tmp_path, wanted)
    np.testing.assert_array_equal(x[0], expected.transpose(2, 0, 1) * np.float32(1 / 255))


def test_a_palette_with_transparency_is_read_quietly(tmp_path: Path) -> None:
    image = Image.fromarray(pixels()).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            only(tmp_path, RGB)[0],
            np.asarray(image.convert("RGB")).transpose(2, 0, 1) * np.float32(1 / 255),
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integer_inputs_take_the_pixels(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    picture(tmp_path / "a.png")
    wanted = spec("image", "N", 8, 8, 3, dtype=dtype)
    for options in (None, ImageOptions(scale=1)):
        x = only(tmp_path, wanted, options)
        assert x.dtype == dtype
        np.testing.assert_array_equal(x[0], pixels())
    for wrong in (ImageOptions(mean=(1,)), ImageOptions(std=(1,)), ImageOptions(scale=0.5)):
        assert "takes the pixels as they are" in refused(tmp_path, [wanted], wrong)


# --- sizes


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    # columns (rows) 16 to 48 are kept; the filter reaches half a new pixel, so 2 old ones, beyond
    [(32, 64, slice(0, 32), slice(14, 50)), (64, 32, slice(14, 50), slice(0, 32))],
)
def test_the_shorter_side_fits_and_the_middle_is_kept(
    tmp_path: Path, height: int, width: int, rows: slice, columns: slice
) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    array[rows, columns] = 200
    picture(tmp_path / "a.png", array)
    x = only(tmp_path, OPEN, ImageOptions(size=(8, 8), scale=1))
    np.testing.assert_array_equal(x, np.full((1, 3, 8, 8), 200))


def test_a_wide_target_is_covered(tmp_path: Path) -> None:
    array = np.zeros((40, 40, 3), np.uint8)
    array[8:32] = 200  # 10 to 30 are kept, and the filter reaches 1.25 beyond
    picture(tmp_path / "a.png", array)
    x = only(tmp_path, OPEN, ImageOptions(size=(8, 16), scale=1))
    np.testing.assert_array_equal(x, np.full((1, 3, 8, 16), 200))


def test_shrinking_averages(tmp_path: Path) -> None:
    """A checkerboard of single pixels is grey from afar; without antialiasing it is not."""
    board = (np.indices((64, 64)).sum(0) % 2 * 254).astype(np.uint8)
    picture(tmp_path / "a.png", np.stack([board] * 3, axis=2))
    x = only(tmp_path, OPEN, ImageOptions(size=(8, 8), scale=1))
    assert np.abs(x - 127).max() <= 8  # a tent over 16 pixels: 127 but for the edges


def test_small_pictures_grow(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", np.full((2, 3, 3), 77, np.uint8))
    np.testing.assert_array_equal(only(tmp_path, RGB, ImageOptions(scale=1)), np.float32(77))


def test_the_size_of_the_model_may_be_said_again(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert only(tmp_path, RGB, ImageOptions(size=(8, 8))).shape == (1, 3, 8, 8)
    half = spec("image", 1, 3, 8, "W")
    assert only(tmp_path, half, ImageOptions(size=(8, 12))).shape == (1, 3, 8, 12)


# --- folders


def test_class_folders_in_order_of_their_names(tmp_path: Path) -> None:
    names = ["b/1.png", "a/2.jpg", "a/1.JPEG", "c.bmp", "a/deep/0.webp"]
    for name in names:
        picture(tmp_path / name)
    picture(tmp_path / ".thumbnails" / "0.png")
    picture(tmp_path / "a" / ".0.png")
    (tmp_path / "labels.txt").write_text("cat")
    calibration = open_calibration(str(tmp_path), [RGB])
    assert [calibration.describe(i) for i in range(5)] == [
        str(tmp_path / name) for name in sorted(names)
    ]
    assert len(list(calibration)) == 5
    assert calibration.warnings[0].startswith(f"calibration {tmp_path} has 5 samples: ")


def test_one_picture_file(tmp_path: Path) -> None:
    assert only(picture(tmp_path / "a.png"), RGB).shape == (1, 3, 8, 8)


def test_a_fixed_batch_is_filled(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png", pixels(seed=i))
    calibration = open_calibration(tmp_path, [spec("image", 4, 3, 8, 8)])
    assert len(calibration) == 2
    x = np.concatenate([feed["image"] for feed in calibration])
    expected = np.stack([pixels(seed=i) for i in range(8)]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(x, expected * np.float32(1 / 255))
    assert calibration.warnings == (
        f"calibration {tmp_path}: 10 images do not fill whole batches of the model: the last 2 are "
        "left out",
    )
    assert calibration.describe(1) == f"{tmp_path / '4.png'} to {tmp_path / '7.png'}"
    message = refused(tmp_path, [spec("image", 16, 3, 8, 8)])
    assert "10 images, but the model takes batches of 16: give more" in message


def test_pictures_are_read_when_they_are_needed(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", pixels(seed=i))
    (tmp_path / "2.png").write_bytes(b"no picture")
    calibration = open_calibration(tmp_path, [RGB])
    assert len(list(calibration.first(2))) == 2
    assert len(list(calibration.split(2)[1].first(1))) == 1
    with pytest.raises(CalibrationError, match=r"2\.png: cannot be used as an image"):
        list(calibration)


def test_the_feeds_run(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", pixels(30, 20))
    session = open_session(small.conv_model().SerializeToString())
    for feed in open_calibration(tmp_path, input_specs(session)):
        assert run(session, feed)[0].shape == (1, 4, 8, 8)


# --- what is refused


@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.bmp", "b.webp"])
def test_damaged_pictures(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    path = picture(tmp_path / name, pixels(64, 64))
    good = path.read_bytes()
    for at in (0, 1, 20, len(good) // 2):
        path.write_bytes(good[:at])
        message = refused(tmp_path, [RGB])
        assert message.startswith(f"calibration {path}: cannot be used as an image (")
        assert message.endswith(": mend or remove it)")
        assert message.count(str(path)) == 1
    path.write_bytes(b"<html>404 not found</html>")
    assert f"{path}: cannot be used as an image (it is no image" in refused(tmp_path, [RGB])


def test_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert f"{tmp_path / 'a.png'}: cannot be used as an image (No such file" in refused(
        tmp_path, [RGB]
    )


def test_pictures_of_16_bits_are_not_cut_off(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", np.full((8, 8), 40000, np.uint16))
    assert "more than 8 bits per channel: convert it" in refused(tmp_path, [GREY])


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(tmp_path, [RGB]) == (
        f"calibration {tmp_path / 'a.png'}: reading images needs Pillow: pip install onnxq[images]"
    )


@pytest.mark.parametrize(
    ("specs", "part"),
    [
        ([RGB, spec("scale")], "the model has 2 inputs ['image', 'scale']: give .npz files"),
        ([spec("ids", "N", 128, dtype=np.int64)], "input 'ids' takes int64 ['N', 128], but images"),
        ([spec("x", "N", 3, 8, 8, dtype=None)], "input 'x' takes no numbers"),
        ([spec("x", "N", 3, 8, 8, dtype=np.int8)], "input 'x' takes int8"),
        ([spec("x", "N", 3, 8, 8, dtype=np.bool_)], "input 'x' takes bool"),
        ([spec("x", "N", "C", 8, 8)], "does not say where the channels are"),
        ([spec("x", "N", 3, 8, 3)], "does not say where the channels are"),
        ([spec("x", "N", 4, 8, 8)], "does not say where the channels are"),
        ([OPEN], "input 'image' leaves height and width open (H × W): give the size of images"),
        ([spec("x", "N", 3, 8, None)], "leaves height and width open (8 × ?)"),
    ],
)
def test_models_that_images_do_not_fit(tmp_path: Path, specs: Any, part: str) -> None:
    picture(tmp_path / "a.png")
    message = refused(tmp_path, specs)
    assert message.startswith(f"calibration {tmp_path}: ") and part in message


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"size": (16, 16)}, "image size 16 × 16, but input 'image' takes 8 × 8: give that, or"),
        ({"size": (8,)}, "image size (8,): give height and width in pixels"),
        ({"size": (0, 8)}, "image size (0, 8)"),
        ({"size": (8.0, 8)}, "image size (8.0, 8)"),
        ({"mean": (1, 2)}, "image mean has 2 values: give 1, or 3, one per channel"),
        ({"std": (1, 2, 3, 4)}, "image std has 4 values"),
        ({"std": (1, 0, 1)}, "nor std 0 or less"),
        ({"scale": 0}, "scale cannot be 0"),
        ({"scale": float("nan")}, "have to be finite"),
        ({"mean": (float("inf"),)}, "have to be finite"),
        ({"layout": "hwc"}, "image layout 'hwc': give nchw or nhwc"),
        ({"layout": "nhwc"}, "as nhwc 8 channels, but pictures have 3 or 1"),
        ({"channels": "grb"}, "image channels 'grb': give rgb or bgr"),
        ({"scale": 1e38, "std": (1e-38,)}, "its pixels become Inf in float32"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    picture(tmp_path / "a.png")
    assert part in refused(tmp_path, [RGB], ImageOptions(**options))

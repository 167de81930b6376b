"""Pictures as drawing programs, cameras and scanners write them, turned into pixels."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from maml.data.pictures import opaque, to_pixels, warn_of_blank_or_inverted

SIZE = (20, 30)  # height, width
SHAPE = (*SIZE, 1)


def ink() -> np.ndarray:
    """Returns a drawing: true where there is ink."""
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    return (abs(row - 10) < 2) | (abs(column - 8) < 3)


def grey(paper: int, black: int, dtype: type = np.uint8) -> np.ndarray:
    return np.where(ink(), black, paper).astype(dtype)


def with_alpha(mode: str) -> Image.Image:
    """Returns black ink on transparent paper, whose hidden colour is black, as drawing programs write it."""
    alpha = Image.fromarray(ink().astype(np.uint8) * np.uint8(255))
    picture = Image.new(mode.rstrip("Aa"), alpha.size)
    picture.putalpha(alpha)
    return picture.convert(mode) if picture.mode != mode else picture


def palette() -> Image.Image:
    picture = Image.fromarray(grey(0, 1)).convert("P")
    picture.putpalette([0, 0, 0, 10, 10, 10])
    picture.info["transparency"] = 0
    return picture


def reopened(picture: Image.Image, kind: str = "png") -> Image.Image:
    buffer = BytesIO()
    picture.save(buffer, kind)
    return Image.open(buffer)


DRAWINGS = {
    "1": lambda: Image.fromarray(~ink()),
    "L": lambda: Image.fromarray(grey(255, 0)),
    "RGB": lambda: Image.fromarray(grey(255, 0)).convert("RGB"),
    "CMYK": lambda: Image.fromarray(grey(255, 0)).convert("CMYK"),
    "RGBA": lambda: with_alpha("RGBA"),
    "LA": lambda: with_alpha("LA"),
    "RGBA file": lambda: reopened(with_alpha("RGBA")),
    "LA file": lambda: reopened(with_alpha("LA")),
    "palette": palette,
    "palette file": lambda: reopened(palette()),
    "gif": lambda: reopened(palette(), "gif"),
    "webp": lambda: reopened(with_alpha("RGBA"), "webp"),
    "16 bits": lambda: reopened(Image.fromarray(grey(65535, 0, np.uint16))),
    "16 bits, upper half": lambda: reopened(Image.fromarray(grey(60000, 40000, np.uint16))),
    "16 bits, lower half": lambda: reopened(Image.fromarray(grey(4000, 30, np.uint16))),
    "16 bits, tiff": lambda: reopened(Image.fromarray(grey(60000, 40000, np.uint16)), "tiff"),
    "32 bits": lambda: Image.fromarray(grey(100_000, -7, np.int32)),
    "float": lambda: Image.fromarray(np.where(ink(), 0.25, 0.75).astype(np.float32)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_of_every_kind_is_ink_on_paper(name: str) -> None:
    pixels = to_pixels(DRAWINGS[name](), SHAPE, is_drawing=True)
    assert (pixels.dtype, pixels.shape) == (np.uint8, SHAPE)
    np.testing.assert_array_equal(pixels[..., 0], ink())


def test_drawing_with_levels_is_smooth_and_its_darkest_pixel_255() -> None:
    pixels = to_pixels(DRAWINGS["L"](), (7, 11, 1), is_drawing=True, has_levels=True)
    paper = np.asarray(Image.fromarray(grey(255, 0)).resize((11, 7), Image.Resampling.BILINEAR)).astype(float)
    assert 255 > (255 - paper).max() > 0, "no pixel is all ink"
    np.testing.assert_array_equal(pixels[..., 0], ((255 - paper) * 255 / (255 - paper).max()).round())


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_photo_of_every_kind_is_dark_where_there_is_ink(name: str, channels: int) -> None:
    pixels = to_pixels(DRAWINGS[name](), (*SIZE, channels), is_drawing=False)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (*SIZE, channels))
    assert pixels[ink()].max() < 64
    assert pixels[~ink()].min() > 180


def test_half_transparent_ink_is_mixed_with_white() -> None:
    (value,) = np.unique(to_pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (4, 4, 3), is_drawing=False))
    assert value == 127


def test_transparent_value_of_16_bits_is_paper() -> None:
    picture = Image.fromarray(grey(7, 0, np.uint16))
    picture.info["transparency"] = 7
    np.testing.assert_array_equal(to_pixels(picture, SHAPE, is_drawing=True)[..., 0], ink())
    picture = Image.fromarray(np.where(ink(), np.arange(30) * 100, 7).astype(np.uint16))
    picture.info["transparency"] = 7
    assert np.asarray(opaque(picture))[~ink()].min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_picture_of_eight_bits_is_left_alone(mode: str) -> None:
    picture = Image.new(mode, (3, 3))
    assert opaque(picture) is picture


@pytest.mark.parametrize(("dtype", "value", "expected"), [(np.uint16, 65000, 0), (np.uint16, 9, 1), (np.float32, 1, 0)])
def test_picture_of_one_deep_value_is_all_ink_or_all_paper(dtype: type, value: int, expected: int) -> None:
    pixels = to_pixels(Image.fromarray(np.full(SIZE, value, dtype)), SHAPE, is_drawing=True)
    assert (pixels == expected).all()


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_pixels(Image.fromarray(np.full(SIZE, np.nan, np.float32)), SHAPE, is_drawing=False)


def test_picture_is_turned_as_its_camera_was_held() -> None:
    picture = Image.fromarray(grey(255, 0).T)
    exif = Image.Exif()
    exif[0x0112] = 5  # transposed
    buffer = BytesIO()
    picture.save(buffer, "png", exif=exif)
    pixels = to_pixels(Image.open(buffer), SHAPE, is_drawing=True)
    np.testing.assert_array_equal(pixels[..., 0], ink())


@pytest.mark.parametrize(("value", "said"), [(0, "all paper"), (1, "all ink")])
def test_blank_drawing_causes_a_warning_that_names_it(value: int, said: str) -> None:
    with pytest.warns(UserWarning, match=rf"a/b\.png is {said} at 30x20 pixels"):
        warn_of_blank_or_inverted([("a/b.png", np.full(SHAPE, value, np.uint8)), ("c.png", ink())])
    warn_of_blank_or_inverted([("c.png", ink())])  # warnings are errors here


@pytest.mark.parametrize("levels", [1, 255])
def test_inverted_drawing_causes_a_warning_that_says_how_much_is_ink(levels: int) -> None:
    drawing = np.zeros(SHAPE, np.uint8)
    drawing[:5] = levels  # a quarter of 20 rows
    warn_of_blank_or_inverted([("a.png", drawing)])  # warnings are errors here
    with pytest.warns(UserWarning, match=r"a\.png is 75% ink at 30x20 pixels: a drawing is dark on light"):
        warn_of_blank_or_inverted([("a.png", levels - drawing)])

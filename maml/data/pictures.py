"""Pictures of any kind: made opaque and upright, resized, and turned into the pixels that a network takes."""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from maml.data.files import File
from maml.errors import first_ten

# Modes that Pillow turns into black and white itself; others go through RGB.
_DIRECT = {"1", "L", "P", "RGB"}
_SECONDS_PER_PICTURE, _SECONDS_PER_BYTE = 3e-4, 5e-8  # measured on photos


def seconds_to_read(files: Collection[File]) -> float:
    """Returns about how long it takes to read, decode and resize pictures."""
    return _SECONDS_PER_PICTURE * len(files) + _SECONDS_PER_BYTE * sum(file.size for file in files)


def to_pixels(
    picture: Image.Image, in_shape: tuple[int, ...], is_drawing: bool, has_levels: bool = False
) -> np.ndarray:
    """Turns a picture into pixels as a network was trained on them.

    Args:
        picture: a picture of any mode and size. It is turned upright and resized without regard to its proportions.
        in_shape: height, width and channels; three channels are RGB.
        is_drawing: whether it is drawn dark on light, so that one channel holds ink (1) and paper (0). Otherwise one
            channel holds levels of grey, from 0 to 255.
        has_levels: whether a drawing has levels of ink, from 0 to 255, as `grey_ink` makes them.

    Returns:
        Pixels, uint8 ``in_shape``.

    Raises:
        ValueError: if the picture has values that are not finite, or colours that Pillow cannot convert.
        OSError: if its file is damaged.
    """
    height, width, channels = in_shape
    picture = opaque(ImageOps.exif_transpose(picture))
    if is_drawing:
        # The same steps as for the drawings of Omniglot: a smooth resize would change what is ink.
        picture = picture if picture.mode in _DIRECT else picture.convert("RGB")
        black = picture.convert("1", dither=Image.Dither.NONE)
        if has_levels:
            return grey_ink(black, height, width).reshape(in_shape)
        black = black.resize((width, height), Image.Resampling.NEAREST)
        return (~np.asarray(black)).astype(np.uint8).reshape(in_shape)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(picture.convert(mode).resize((width, height), Image.Resampling.LANCZOS)).reshape(in_shape)


def grey_ink(black: Image.Image, height: int, width: int) -> np.ndarray:
    """Makes a black and white drawing smaller with a smooth filter.

    Returns:
        Levels of ink, uint8 ``(height, width)``: paper is 0, and the darkest pixel 255.
    """
    ink = 255.0 - np.asarray(black.convert("L").resize((width, height), Image.Resampling.BILINEAR))
    return (255 * ink / max(ink.max(), 1.0)).round().astype(np.uint8)


def opaque(picture: Image.Image) -> Image.Image:
    """Lays a transparent picture on white, and scales one of more than 8 bits by its own range.

    Any other picture is returned as it is.

    Raises:
        ValueError: if the picture has values that are not finite.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        return _eight_bits(picture)
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Maps the smallest value to black and the largest to white. A picture of one value is all black or all white."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    visible = values != picture.info.get("transparency", np.nan)
    low, high = (values[visible].min(), values[visible].max()) if visible.any() else (0.0, 0.0)
    if low == high:
        low, high = 0.0, 1.0 if picture.mode == "F" else 65535.0
    levels = ((values - low) / (high - low) * 255).clip(0, 255).round()
    return Image.fromarray(np.where(visible, levels, 255).astype(np.uint8))


_SAID = {0.0: "all paper", 1.0: "all ink"}


def warn_of_blank_or_inverted(drawings: Iterable[tuple[str | Path, np.ndarray]]) -> None:
    """Warns of drawings that are all paper, from which nothing can be learnt, or mostly ink, as if they were inverted.

    Args:
        drawings: names and pixels; paper is 0, and the darkest pixel the largest number.
    """
    # No drawing of Omniglot has more than 22 % of its pixels in ink.
    shares = [(name, pixels.mean() / max(pixels.max(), 1), pixels.shape) for name, pixels in drawings]
    odd = [(name, share, shape) for name, share, shape in shares if share == 0 or share > 0.5]
    if odd:
        height, width = odd[0][2][:2]
        named = first_ten([f"{name} is {_SAID.get(share, f'{share:.0%} ink')}" for name, share, _ in odd])
        warnings.warn(
            f"{named} at {width}x{height} pixels: a drawing is dark on light, with strokes of about 1/35 of its width",
            stacklevel=3,
        )

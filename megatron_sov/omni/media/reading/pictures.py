"""A picture as [3, side, side] numbers of red, green and blue, whatever its format, colours and turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.limits import MediaLimits

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Those that are decoded: pixels alone, and nothing that is a program."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class PictureRequest:
    """How a picture is to be read."""

    sides: tuple[int, ...]
    """Heights and widths in pixels, in each of which it is given."""
    animated: str = "refuse"
    """What becomes of one with several frames: "refuse", or "first" takes the first."""


def read_picture(file: Path, asked: PictureRequest, limits: MediaLimits) -> tuple[list[np.ndarray],
                                                                                  dict[str, Any]]:
    """Return a picture as one uint8 array [3, side, side] for each side asked for, and what it was.

    It is made square by bicubic resampling, as the published tokenizer's processor does; what it was says its
    width and height before, and the type of its content.

    Raises:
        BadRecord: it is none, is too large, is animated, or is cut off.
    """
    with opened(file, limits) as picture:
        # an MPO is a photograph with others of it behind: of two lenses, or smaller
        if (getattr(picture, "is_animated", False) and picture.format != "MPO"
                and asked.animated == "refuse"):
            raise BadRecord("animated", f"is an animated picture of {getattr(picture, 'n_frames', 0)} "
                                        "frames; make "
                                        'it a part of type "video", or take the first frame '
                                        "(--animated first)")
        mime_type = picture.get_format_mimetype() or "image/png"
        rgb = upright(picture)
    arrays = [squared(rgb, side) for side in asked.sides]
    return arrays, {"width": rgb.width, "height": rgb.height, "mime_type": mime_type}


def opened(file: Path, limits: MediaLimits) -> ImageFile:
    """Open a picture, its size checked, nothing decoded.

    Raises:
        BadRecord: it is none, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # `limits` says it
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise BadRecord("no_picture", f"is no picture in one of {', '.join(PICTURE_FORMATS)}; "
                                      "convert it, or leave it out") from None
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise BadRecord("pixels", f"has {width} x {height} = {width * height:,} pixels, at most "
                                  f"{limits.pixels:,} are read; shrink it, or raise --max-pixels")
    return picture


def upright(picture: Image) -> Image:
    """Return a picture's pixels in red, green and blue, turned as it says, on white where one sees through.

    Raises:
        BadRecord: it is cut off, damaged, or its pixels are no colours.
    """
    from PIL import ImageOps

    try:
        picture.load()
        return _in_colour(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as e:
        raise BadRecord("truncated", f"is cut off or damaged ({str(e)[:200]}); fetch it again, or leave it "
                                     "out") from None


def _in_colour(picture: Image) -> Image:
    from PIL import Image

    if picture.mode in _DEEP:
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadRecord("depth", f"has pixels from {deep.min()} to {deep.max()}, which are neither 8 "
                                     "nor 16 "
                                     "bits; convert it")
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BadRecord("depth", "has pixels of floating point, whose white nobody knows; convert it")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return picture.convert("RGB")


def squared(rgb: Image, side: int) -> np.ndarray:
    """Return a picture of red, green and blue as uint8 [3, side, side]."""
    from PIL import Image

    small = rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small, np.uint8).transpose(2, 0, 1))

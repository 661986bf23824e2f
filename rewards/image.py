"""The form of an image for rewards, defined once. Imports Pillow and NumPy, never torch.

An image is a uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (grey), or a Pillow image of mode "RGB" or "L".
It takes the place of the text in `completions`; all else of the contract stays as it is. Both forms cross to a
reward process unchanged.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def to_pil(image: Any) -> Image.Image:
    """A Pillow image of mode "RGB" or "L".

    Raises:
        TypeError: not an image in the sense of this module, saying what would make it one.
    """
    if isinstance(image, Image.Image):
        if image.mode not in ("RGB", "L"):
            raise TypeError(f"an image must have Pillow mode RGB or L, got {image.mode}: use image.convert('RGB')")
        return image
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image (uint8 array or Pillow image), got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8 in 0..255, got {image.dtype}: scale and round it first")
    grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
    if (not grey and (image.ndim != 3 or image.shape[2] != 3)) or image.size == 0:
        raise TypeError(f"an image array must have shape [H, W, 3], [H, W, 1] or [H, W], got {list(image.shape)}")
    return Image.fromarray(image.reshape(image.shape[:2]) if grey else image)


def to_array(image: Any) -> np.ndarray:
    """uint8 [H, W, C], C = 1 for a grey image and 3 for RGB.

    Raises:
        TypeError: see `to_pil`.
    """
    array = np.asarray(to_pil(image))
    return array.reshape(*array.shape[:2], -1)


def upscaled(image: Any, factor: int) -> Image.Image:
    """Every pixel as a `factor` x `factor` square: tiny pictures made large enough for codecs and eyes."""
    picture = to_pil(image)
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def thumbnail(image: Any, smallest: int = 64, largest: int = 128) -> Image.Image:
    """For people to look at: a tiny picture enlarged by a whole factor, a large one shrunk to at most `largest`."""
    picture = to_pil(image)
    picture = upscaled(picture, max(1, smallest // picture.height)).copy()
    picture.thumbnail((largest, largest))
    return picture


def jpeg_bytes(image: Any, quality: int = 95) -> bytes:
    """The image as a JPEG file, with Pillow's defaults but for the quality."""
    file = io.BytesIO()
    to_pil(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def png_bytes(image: Any) -> bytes:
    """The image as a PNG file: lossless."""
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_url(image: Any) -> str:
    """`data:image/png;base64,...`, what web pages and vision servers take."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()

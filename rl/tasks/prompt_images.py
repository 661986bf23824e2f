"""Images in prompts: an image is a run of token ids in the prompt, one id for each place that the vision tower gives.

Such an id lies above every vocabulary and says all that conditions its place: the digest of the image's pixels, and the
number of the place. So prompts, caches, trajectories, shared rows and masks treat images as they treat words, and what
was recorded is what the learner computes from. No id is ever masked or decided, since prompts are not.

`rl/models/vision.py` turns the ids into embeddings. Pixels are kept here by their digest, for all models of a process.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rl.tasks.chat import prompt_text, token_ids

# Ids from here on are places of images: 49 bits of the digest, then 12 bits for the place.
FIRST_IMAGE_ID = 1 << 62
_PLACE_BITS = 12
MAX_PLACES = 1 << _PLACE_BITS

# Images that are remembered. What is read from a file is a path here, and its pixels only while they are used.
_REMEMBERED = 200_000
_seen: OrderedDict[int, tuple[bytes, Any]] = OrderedDict()


class PromptImages(NamedTuple):
    """What a prompt has to know of a vision tower.

    Attributes:
        placeholder: text of a prompt that stands for one image, "<image>".
        num_tokens: places of an image.
    """

    placeholder: str
    num_tokens: int

    def prompt_ids(self, tokenizer: Any, text: str, images: Sequence[Any]) -> list[int]:
        """Token ids of a prompt. Example with 2 places per image: "a<image>b" -> [a, first place, second place, b].

        Raises:
            ValueError: images and placeholders differ in number, or an image cannot be read.
        """
        parts = text.split(self.placeholder)
        if len(parts) - 1 != len(images):
            raise ValueError(
                f"the prompt has {len(parts) - 1} {self.placeholder} and the row {len(images)} images (column images): "
                "give one for the other"
            )
        places = [image_ids(image, self.num_tokens, f"images[{i}]") for i, image in enumerate(images)]
        words = token_ids(tokenizer, [part for part in parts if part])
        encoded = [words.pop(0) if part else [] for part in parts]
        return [*encoded[0], *(i for own, part in zip(places, encoded[1:], strict=True) for i in (*own, *part))]


def encode_prompts(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], chat: bool, vision: PromptImages | None
) -> list[list[int]]:
    """Token ids of the prompts of some rows; with a vision tower, of their images too.

    Raises:
        ValueError: a prompt that cannot be encoded, by its number among the rows.
    """
    texts = [prompt_text(tokenizer, row, chat) for row in rows]
    if vision is None:
        return token_ids(tokenizer, texts)
    found = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        try:
            found.append(vision.prompt_ids(tokenizer, text, images_of(row)))
        except ValueError as error:
            raise ValueError(f"row {number} of {len(rows)}: {error}") from None
    return found


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row: its column `images`, a list, or `image`, one of them.

    Raises:
        ValueError: the row has both.
    """
    images, image = row.get("images"), row.get("image")
    if images is None:
        return [] if image is None else [image]
    if image is not None:
        raise ValueError("the row has images in two columns, image and images: leave one out")
    # An array of two or three axes, and anything that is no list, is one image.
    return list(images) if isinstance(images, list | tuple) else [images]


def image_ids(image: Any, num_tokens: int, where: str = "image") -> list[int]:
    """The ids of an image's places; its pixels can be found by them from now on.

    Raises:
        ValueError: it cannot be read.
    """
    pixels = read_pixels(image, where)
    digest = _digest(pixels)
    key = int.from_bytes(digest[:8], "big") >> 15
    if key in _seen and _seen[key][0] != digest:
        raise ValueError(f"{where}: two images have one key ({key}), which cannot be told apart: leave one out")
    _seen[key] = digest, image if isinstance(image, str) else pixels
    _seen.move_to_end(key)
    while len(_seen) > _REMEMBERED:
        _seen.popitem(last=False)
    first = FIRST_IMAGE_ID + (key << _PLACE_BITS)
    return list(range(first, first + num_tokens))


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()


def key_and_place(ids: Any) -> tuple[Any, Any]:
    """Which image, and which of its places, some image ids are; arrays or tensors."""
    return (ids - FIRST_IMAGE_ID) >> _PLACE_BITS, ids & (MAX_PLACES - 1)


def pixels_of(key: int) -> np.ndarray:
    """uint8 [H, W, 3] of an image that a prompt of this process holds.

    Raises:
        ValueError: no prompt of this process does, or its file has changed since.
    """
    if key not in _seen:
        raise ValueError("a trajectory has an image in its prompt that this run has not read: sample it here")
    digest, image = _seen[key]
    pixels = read_pixels(image, "image")
    if isinstance(image, str) and _digest(pixels) != digest:
        raise ValueError(f"image {image!r} has changed since its prompt was made: leave files alone during a run")
    return pixels


def read_pixels(image: Any, where: str) -> np.ndarray:
    """uint8 [H, W, 3].

    Args:
        image: path of a file, its bytes (also as `{"bytes": ...}`, as parquet files have them), a Pillow image, or
            pixels 0 to 255 as an array or nested lists, [H, W], [H, W, 1] or [H, W, 3].
        where: the field, for messages.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | bytes):
        shown = repr(image) if isinstance(image, str) else f"of {len(image)} bytes"
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is no image"
            raise ValueError(f"{where}: the image {shown} cannot be read: {reason}") from None
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    try:
        pixels = np.asarray(image)
    except ValueError:
        pixels = np.zeros(0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size or pixels.dtype.kind not in "iu":
        raise ValueError(f"{where}: an image is a path, bytes, or whole numbers [H, W], [H, W, 1] or [H, W, 3]")
    if pixels.min() < 0 or pixels.max() > 255:
        worst = min(pixels.min(), 0) or pixels.max()
        raise ValueError(f"{where}: the pixels of an image lie in 0 to 255, and one is {worst}")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), dtype=np.uint8)

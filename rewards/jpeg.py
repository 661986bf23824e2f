"""How well an image compresses as a JPEG (DDPO, Black et al. 2023, section 5.1): exact byte counts, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.image import jpeg_bytes, upscaled


def jpeg_incompressibility(
    prompts: Sequence[Any], completions: Sequence[Any], quality: int = 95, upscale: int = 1, **columns: Any
) -> list[float]:
    """Size of the image as a JPEG, in kB of 1000 bytes.

    Args:
        quality: Pillow's JPEG quality.
        upscale: enlarge every pixel to a square of this side first. A JPEG works in cells of 8x8 pixels, so an
            8x8 picture as it is measures little but the file's header: 4 is a good choice for it.
    """
    return [len(jpeg_bytes(upscaled(image, upscale), quality)) / 1000 for image in completions]


def jpeg_compressibility(
    prompts: Sequence[Any], completions: Sequence[Any], quality: int = 95, upscale: int = 1, **columns: Any
) -> list[float]:
    """Minus the size of the image as a JPEG in kB; parameters as in `jpeg_incompressibility`."""
    return [-size for size in jpeg_incompressibility(prompts, completions, quality, upscale)]

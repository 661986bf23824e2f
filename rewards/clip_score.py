"""How well an image fits its prompt, by a CLIP model: CLIP score, PickScore, and HPSv2 in CLIP layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.clip_encoder import ClipEncoder
from rewards.score import Score
from rewards.text import text_of

if TYPE_CHECKING:
    import torch


class ClipScore:
    """Cosine between the embeddings of image and prompt, times `scale`.

    CLIPScore of Hessel et al. 2021 is 2.5 times the cosine, floored at 0; a reward needs no floor, so none is set.

    Args:
        model: folder or hub name of a CLIP model in Hugging Face layout; by default the published one.
        processor: folder or hub name of its tokenizer and image processor; by default the model's.
        scale: factor on the cosine.
        batch_size: images per forward.
        device: torch device; by default the GPU when there is one.
        dtype: torch dtype name of the weights.

    Raises:
        ValueError: when the model cannot be loaded.
    """

    name = "clip_score"
    differentiable = True
    trained_scale = False
    hub_params = ("model", "processor")
    checkpoint: tuple[str, str | None] = ("openai/clip-vit-large-patch14", None)  # model and processor

    def __init__(
        self,
        model: str | None = None,
        processor: str | None = None,
        scale: float = 1.0,
        batch_size: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if model is None:
            model, processor = self.checkpoint[0], processor or self.checkpoint[1]
        self.clip = ClipEncoder(self.name, model, processor, batch_size, device, dtype)
        self.scale = scale * (self.clip.logit_scale if self.trained_scale else 1.0)
        self.__name__ = self.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        texts, cut = self.clip.texts([text_of(prompt) for prompt in prompts])
        values = self.scale * (self.clip.images(completions) * texts).sum(dim=-1)
        return [Score(v, metrics={"prompt_cut": float(c)}) for v, c in zip(values.tolist(), cut, strict=True)]

    def on_tensors(self, prompts: Sequence[Any], images: torch.Tensor, **columns: Any) -> torch.Tensor:
        """Rewards [B] of float images [B, C, H, W] in [0, 1], with gradients to them."""
        texts, _ = self.clip.texts([text_of(prompt) for prompt in prompts])
        features = self.clip.pixels(images)
        return self.scale * (features * texts.to(features.device)).sum(dim=-1)


class PickScore(ClipScore):
    """PickScore (Kirstain et al. 2023): a CLIP-H fine-tuned on choices of people, cosine times its trained scale.

    The checkpoint has no processor of its own; it is that of the CLIP-H it was made from.
    """

    name = "pickscore"
    trained_scale = True
    checkpoint = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


class ClipMatch:
    """1 when a CLIP model finds the image nearer to its prompt than to every text of its row's `others`, else 0.

    The share of right ones is the R-precision of Xu et al. 2018 (AttnGAN, arXiv 1711.10485), against the prompts of the
    same list instead of random captions. Metric `margin`: how much nearer, as a cosine.

    Args:
        model, processor, batch_size, device: see `ClipScore`. Judge with another CLIP than the one that rewards.
    """

    hub_params = ("model", "processor")

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.clip = ClipEncoder("clip_match", model, processor, batch_size, device)
        self.known: dict[str, torch.Tensor] = {}
        self.__name__ = "clip_match"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        if "others" not in columns:
            raise ValueError("reward 'clip_match' needs a column `others`: the texts a prompt is to be told from")
        wanted = [text_of(prompt) for prompt in prompts]
        new = sorted({text for row in ([*wanted], *columns["others"]) for text in row} - self.known.keys())
        if new:
            self.known |= dict(zip(new, self.clip.texts(new)[0], strict=True))
        scores = []
        for image, prompt, others in zip(self.clip.images(completions), wanted, columns["others"], strict=True):
            rivals = max((float(image @ self.known[text]) for text in others if text != prompt), default=-1.0)
            margin = float(image @ self.known[prompt]) - rivals
            scores.append(Score(float(margin > 0), metrics={"margin": margin}))
        return scores

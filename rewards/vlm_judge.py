"""A vision-language model as judge of images, behind any OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

from rewards.image import data_url, upscaled
from rewards.llm_judge import LlmJudge
from rewards.text import text_of

IMAGE_TEMPLATE = """Rate how well the image shows what was asked for, from {low:g} (not at all) to {high:g} (perfectly).

Asked for: {prompt}

Think briefly, then end with the rating in a box, like \\boxed{{{high:g}}}."""


class VlmJudge(LlmJudge):
    r"""Ask a vision-language model to rate each image; its rating, scaled to [0, 1], is the reward.

    The image travels as a PNG data URL before the text of the question. Failures are those of `llm_judge`: no readable
    rating masks the sample, a server that is down or busy is asked again.

    Args:
        base_url: for example `http://localhost:8000/v1`.
        model: model name the server knows.
        template: the question, with `{prompt}`, `{low}`, `{high}` and any dataset column in braces; it must ask for the
            rating in `\boxed{}`.
        upscale: enlarge every pixel to a square of this side first, for tiny pictures.
        low, high, num_votes: the scale and the ratings per image, as in `llm_judge`.
        temperature, max_tokens, concurrency, api_key_variable, timeout_seconds: as in `llm_judge`.
    """

    name = "vlm_judge"

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str = IMAGE_TEMPLATE,
        upscale: int = 1,
        low: float = 0.0,
        high: float = 10.0,
        num_votes: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 16,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 60.0,
    ) -> None:
        super().__init__(
            base_url=base_url,
            model=model,
            template=template,
            low=low,
            high=high,
            num_votes=num_votes,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            api_key_variable=api_key_variable,
            timeout_seconds=timeout_seconds,
        )
        self.upscale = upscale

    def _row(self, prompt: Any, completion: Any) -> dict[str, Any]:
        return {"prompt": text_of(prompt), "image": data_url(upscaled(completion, self.upscale))}

    def _content(self, row: dict[str, Any]) -> Any:
        question = self.template.format(**{name: value for name, value in row.items() if name != "image"})
        picture = {"type": "image_url", "image_url": {"url": row["image"]}}
        return [picture, {"type": "text", "text": question}]

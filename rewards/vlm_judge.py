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

    Parameters are those of `llm_judge`; the template has no `{completion}`.
    """

    name = "vlm_judge"
    template = IMAGE_TEMPLATE

    def _row(self, prompt: Any, completion: Any) -> dict[str, Any]:
        return {"prompt": text_of(prompt), "image": data_url(upscaled(completion, self.upscale))}

    def _content(self, row: dict[str, Any]) -> Any:
        question = self.template.format(**{name: value for name, value in row.items() if name != "image"})
        picture = {"type": "image_url", "image_url": {"url": row["image"]}}
        return [picture, {"type": "text", "text": question}]

"""Discriminative class tokens: a classifier's gradient through the sampler into one embedding, all else frozen.

Schwartz et al. 2023, "Discriminative Class Tokens for Text-to-Image Diffusion Models" (arXiv 2303.17155), by its code
(idansc/discriminative_class_tokens, run.py): the classifier's cross-entropy on a finished image is back-propagated
through the last sampling step only into the embedding of a new token. The reward is `image_classifier` with
`value: logprob`, or any other with a gradient.

With `model.conditions` and `alpha` = 1 / gamma it is CTRL on images (arXiv 2406.12120; `rl/recipes/ctrl.py`): new
conditions on a trained model, from a classifier of them, with the path KL to that model (docs/images.md).

Here the embedding is that of a class of the built-in model: the prompts of the run say which rows learn. Departs from
the published code: no token is added to a text encoder, whose states this package keeps as they were encoded, so
pipelines are refused; no early stopping.
"""

from __future__ import annotations

from typing import Any

from rl.recipes.alignprop import AlignProp


class ClassTokens(AlignProp, defaults={"gradient_steps": 1}):
    def prepare(self, run: Any) -> None:
        model = run.model
        if not hasattr(model, "class_table"):
            raise ValueError(
                f"algorithm.name class_tokens trains the class embedding of the built-in model: model.path is a "
                f"{type(model).__name__}"
            )
        model.requires_grad_(False)
        model.class_table().requires_grad_(True)

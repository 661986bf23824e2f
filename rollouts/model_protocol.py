"""What a sampler or an estimator may ask of a model, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class DenoisingModel(Protocol):
    """A masked-diffusion language model.

    Hidden states and the output head are separate so that logits are only ever computed at the
    positions somebody looks at.

    Attributes:
        mask_token_id: id of an undecided position.
        attention: "full" (every position sees every other) or "block_causal" (position p sees the
            blocks up to its own, on a grid anchored at position 0).
        block_length: grid size of a block-causal model, else None.
        logit_shift: 0 when the state at position j predicts token j, 1 when the state at j-1 does. The first token of a
            block that a block-causal model decides is then predicted at the last clean position before the block.
        context_causal: optional, False when absent. True: in a block-causal model, decided tokens see only the decided
            tokens to their left, also inside their block; the block that is being decided sees itself whole (NBDiff,
            arXiv 2512.06776). At block length 1 and logit_shift 1 this is an autoregressive model.
        noise: optional, "absorbing" when absent: noise turns tokens into masks. "uniform": into random tokens
            (`rollouts/samplers/uniform.py`); the model then also has `vocab_size` and never sees its mask token.
        canvas_length: optional. A model of uniform noise that has it denoises a response canvas by canvas behind a
            clean text: `encode`, `denoise` and `signal` of `rl/models/canvas_lm.py`.
        max_length: longest canvas the model can see.
    """

    mask_token_id: int
    attention: str
    block_length: int | None
    logit_shift: int
    max_length: int

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
    ) -> torch.Tensor:
        """Final hidden states.

        Args:
            input_ids: int64 [B, Q].
            visible: bool [B, Q, K], True where a query may look at a key; None means all of them.
            position_ids: int64 [B, Q]; None means 0..Q-1.
            cache: key-value store handed to the attention layers; K counts its entries too.

        Returns:
            [B, Q, D].
        """
        ...

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in at least float32; the mask token can never be chosen."""
        ...


class SoftInputModel(DenoisingModel, Protocol):
    """A denoiser that also takes mixtures of tokens, which relaxed sampling feeds it."""

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """int64 [...] token ids -> [..., D]; a mixture of tokens is the mean of their rows."""
        ...

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of `DenoisingModel`; `inputs_embeds` [B, Q, D] stands in for the embeddings of `input_ids`."""
        ...


def noise_of(model: Any) -> str:
    """The kind of noise that a `DenoisingModel` takes away, "absorbing" or "uniform"."""
    return getattr(model, "noise", "absorbing")


def mask_token_of(model: DenoisingModel) -> int:
    """The model's mask token id, or a ValueError that says how to set it."""
    if model.mask_token_id is None:
        raise ValueError("model.mask_token_id is not set: name the mask token id in the model config")
    return model.mask_token_id


# What a sample is conditioned on: name -> [B, ...], row i belongs to sample i. A trajectory keeps its own row,
# so that a replay sees exactly what the sampler saw and runs no text encoder.
Conditioning = Mapping[str, torch.Tensor]


@runtime_checkable
class ImagePolicy(Protocol):
    """A continuous diffusion model: a diffusers UNet or DiT pipeline, or a small class-conditional network.

    Latents are float32 [B, C, H, W] for every family, also where the network wants them packed into tokens.

    Attributes:
        prediction_type: what `predict` returns, in the scheduler's words: "epsilon" (the noise), "v_prediction"
            or "sample" (the data); "flow" is the velocity of flow matching, noise - data.
        latent_shape: (C, H, W) of one sample.
        scheduler: the diffusers scheduler the model came with: its `config` holds the noise schedule. A sampler
            makes its own from that config and never steps this one.
    """

    prediction_type: str
    latent_shape: tuple[int, int, int]
    scheduler: Any

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Keyword arguments for `scheduler.set_timesteps`: the step count, or sigmas and shift of a flow model."""
        ...

    def encode(self, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The conditioning of B prompts, that of the unconditional half of guidance included; no gradient.

        Args:
            prompts: text, or whatever the task gives the model (a class label).
        """
        ...

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """The guided prediction, float32 [B, C, H, W]; the same computation in rollout and replay.

        Args:
            latents: float32 [B, C, H, W].
            timesteps: [B] values of `scheduler.timesteps`; rows may be at different steps.
            conditioning: rows of what `encode` returned.
            guidance_scale: w of classifier-free guidance, u + w (c - u); 1 runs the conditional half alone.
        """
        ...

    def num_evaluations(self, guidance_scale: float) -> int:
        """How often `predict` runs the network on a sample: 2 for both halves of classifier-free guidance."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images float32 [B, 1 or 3, height, width] in [0, 1]; differentiable, for rewards that give gradients."""
        ...


@runtime_checkable
class GuidedPolicy(Protocol):
    """An `ImagePolicy` that shows both halves of classifier-free guidance."""

    def halves(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions without and with the prompt, [B, C, H, W] each, in one forward."""
        ...

    def join(self, without: torch.Tensor, given: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The guided prediction from both: u + w (c - u), or what the model's pipeline makes of them."""
        ...


@runtime_checkable
class LearnedNoise(Protocol):
    """An `ImagePolicy` that also decides what it starts from."""

    def initial_noise(self, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, [B, ...] each, of the Gaussian that the initial latents are drawn from."""
        ...

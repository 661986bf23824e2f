"""A dilated convolution as a backbone for short sequences whose features are local, such as motifs in DNA.

It is a transformers model (`model.backbone: {model_type: dilated_conv, ...}`), so it saves, loads and takes soft inputs
like any other. DRAKES' DNA denoiser (Wang et al. 2024, arXiv 2410.13643) has this shape at 20 layers of 128 channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel


class DilatedConvConfig(PreTrainedConfig):
    """`dilations` has one entry per layer."""

    model_type = "dilated_conv"

    def __init__(
        self,
        vocab_size: int = 6,
        hidden_size: int = 48,
        kernel_size: int = 9,
        dilations: tuple[int, ...] = (1, 1, 2, 4),
        max_position_embeddings: int = 512,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.kernel_size = kernel_size
        self.dilations = list(dilations)
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class DilatedConv(PreTrainedModel):
    """Token ids or embeddings [B, L] -> states [B, L, D]; every state sees both sides."""

    config_class = DilatedConvConfig
    base_model_prefix = "dilated_conv"
    _supports_sdpa = True

    def __init__(self, config: DilatedConvConfig):
        super().__init__(config)
        if config.kernel_size % 2 == 0:
            raise ValueError(f"model.backbone kernel_size must be odd, got {config.kernel_size}")
        width, kernel = config.hidden_size, config.kernel_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in config.dilations)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2 * dilation, dilation=dilation)
            for dilation in config.dilations
        )
        self.last_norm = nn.LayerNorm(width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """
        Raises:
            ValueError: padding, or several canvases in a row: nothing can be hidden from a convolution.
        """
        if attention_mask is not None:
            raise ValueError("backbone dilated_conv cannot hide padding: give it canvases of one length")
        if position_ids is not None and bool(
            (position_ids != torch.arange(position_ids.shape[1], device=position_ids.device)).any()
        ):
            raise ValueError("backbone dilated_conv takes one canvas per row: set algorithm.pack_to to null")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + nn.functional.gelu(layer(norm(x).transpose(1, 2))).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=self.last_norm(x))


# transformers finds the backbone by its model_type.
AutoConfig.register("dilated_conv", DilatedConvConfig)
AutoModel.register(DilatedConvConfig, DilatedConv)

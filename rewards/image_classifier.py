"""Reward from an image classifier: any of transformers', or any torch module named by its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.address import load_address
from rewards.image import to_array, to_pil
from rewards.score import Score
from rewards.weights import load_error, load_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

VALUES = ("probability", "logprob", "correct")


class ImageClassifier:
    """How sure a classifier is that an image shows what it should.

    Args:
        model: folder or hub name of a transformers image classifier; or `pkg.module:Class` or `file.py:Class`, a
            torch module that maps float images [B, C, H, W] in [0, 1] (C as the images have it) to logits [B, K].
        label: the wanted class of every image, by name or index; by default the row's `label` column.
        value: "probability" or "logprob" of the wanted class, or "correct": 1 when it is the most likely one, else 0.
        weights: file with the state dict of a torch module (`.safetensors` or `.pth`).
        model_params: keyword arguments that build a torch module.
        labels: names of a torch module's classes, in order; without them classes are numbers.
        batch_size: images per forward.
        device: torch device; by default the GPU when there is one.

    Raises:
        ValueError: when the model cannot be loaded, or an option is wrong.
    """

    differentiable = True
    hub_params = ("model",)

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        value: str = "probability",
        weights: str | None = None,
        model_params: dict[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        import torch

        if value not in VALUES:
            raise ValueError(f"reward 'image_classifier': value must be one of {', '.join(VALUES)}, got {value!r}")
        self.torch = torch
        self.value = value
        self.processor: Any = None
        self.labels = {str(name): index for index, name in enumerate(labels or [])}
        is_module = model.rpartition(":")[0] != ""
        if not is_module and (weights or model_params or labels):
            raise ValueError(
                f"reward 'image_classifier': weights, model_params and labels are for a torch module, and {model!r} is "
                f"a transformers model; name a module as file.py:Class"
            )
        loaded = self._module(model, weights, model_params or {}) if is_module else self._transformers(model)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self.batch_size = batch_size
        self.label = label
        if label is not None and isinstance(label, str):
            self._index(label)  # a wrong name is an error now
        self.__name__ = "image_classifier"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        wanted = self._wanted(len(completions), columns)
        logits = self._in_batches(completions, self.logits)
        values = self._value(logits, wanted)
        right = (logits.argmax(dim=-1) == wanted).float()
        return [Score(v, metrics={"correct": r}) for v, r in zip(values.tolist(), right.tolist(), strict=True)]

    def on_tensors(self, prompts: Sequence[Any], images: torch.Tensor, **columns: Any) -> torch.Tensor:
        """Rewards [B] of float images [B, C, H, W] in [0, 1], with gradients to them; torch modules only."""
        if self.processor is not None or self.value == "correct":
            raise ValueError(
                "reward 'image_classifier' has a gradient for a torch module (file.py:Class) and value "
                "probability or logprob only"
            )
        wanted = self._wanted(len(images), columns).to(images.device)
        return self._value(self.model(images).float(), wanted)

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """The input of the last layer, float64 [B, D]: the representation that distances between images are taken in.

        Raises:
            ValueError: the model has no linear layer that gives its logits.
        """
        seen: list[Any] = []
        count = self._in_batches(images[:1], self.logits).shape[-1]
        layers = [m for m in self.model.modules() if isinstance(m, self.torch.nn.Linear) and m.out_features == count]
        if not layers:
            raise ValueError("reward 'image_classifier': no linear layer gives the logits, so there are no features")
        hook = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().cpu()))
        try:
            self._in_batches(images, self.logits)
        finally:
            hook.remove()
        return self.torch.cat(seen).flatten(1).numpy()

    def logits(self, images: Sequence[Any]) -> torch.Tensor:
        """Logits [B, K] of images, in one forward."""
        if self.processor is not None:
            pictures = [to_pil(image).convert("RGB") for image in images]
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
            return self.model(**inputs).logits
        arrays = [self.torch.from_numpy(to_array(image).copy()).permute(2, 0, 1) for image in images]
        return self.model((self.torch.stack(arrays).float() / 255).to(self.device))

    def _in_batches(self, images: Sequence[Any], function: Any) -> torch.Tensor:
        starts = range(0, len(images), self.batch_size)
        with self.torch.inference_mode():
            return self.torch.cat([function(images[s : s + self.batch_size]).float().cpu() for s in starts])

    def _value(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self.value == "correct":
            return (logits.argmax(dim=-1) == wanted).float()
        logprob = logits.log_softmax(dim=-1).gather(-1, wanted[:, None])[:, 0]
        return logprob.exp() if self.value == "probability" else logprob

    def _wanted(self, count: int, columns: dict[str, Any]) -> torch.Tensor:
        if self.label is None and "label" not in columns:
            raise ValueError("image_classifier needs the wanted class: a `label` column, or the parameter `label`")
        labels = [self.label] * count if self.label is not None else columns["label"]
        return self.torch.tensor([self._index(label) for label in labels])

    def _index(self, label: Any) -> int:
        if str(label) in self.labels:
            return self.labels[str(label)]
        if isinstance(label, bool) or not str(label).isdigit():
            known = sorted(self.labels) if self.labels else "numbers"
            raise ValueError(f"reward 'image_classifier': unknown class {label!r}; the model's classes are {known}")
        return int(label)

    def _transformers(self, model: str) -> Any:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            loaded = AutoModelForImageClassification.from_pretrained(model)
            self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        except OSError as error:
            raise load_error("image_classifier", f"model '{model}'", error) from error
        self.labels = {str(name): int(index) for name, index in loaded.config.label2id.items()}
        return loaded

    def _module(self, model: str, weights: str | None, params: dict[str, Any]) -> Any:
        module = load_address(model, f"model '{model}'")(**params)
        if not isinstance(module, self.torch.nn.Module):
            raise ValueError(
                f"reward 'image_classifier': {model!r} gives a {type(module).__name__}, not a torch module"
            )
        if weights is not None:
            try:
                module.load_state_dict(load_weights("image_classifier", weights))
            except RuntimeError as error:
                first = " ".join(str(error).split())[:200]
                raise ValueError(f"reward 'image_classifier': {weights} does not fit {model!r}: {first}") from error
        return module

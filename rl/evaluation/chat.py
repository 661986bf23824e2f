"""`denoise-rl chat MODEL`: answers prompts of a person or of a pipe, and shows how an answer is denoised."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rl.config import Config, load_config
from rl.distributed import pick_device
from rl.errors import about
from rl.models.causal import load_autoregressive
from rl.models.load import load_policy
from rl.models.reader import beside_policy
from rl.models.tokenizers import load_tokenizer
from rl.run_folder import model_folder
from rl.tasks.chat import prompt_text, token_ids
from rl.tasks.load import modality_of
from rl.track.pieces import Pieces
from rollouts.engines.canvas import CanvasEngine
from rollouts.engines.causal import CausalEngine
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.self_speculative import SelfSpeculativeEngine
from rollouts.engines.uniform import UniformEngine
from rollouts.model_protocol import noise_of
from rollouts.samplers.options import with_changes

# Without a config a step decides one token.
_DEFAULTS = ("sampler.gen_length=64", "sampler.num_inference_steps=64")
_MASK = "░"
_SHORTEST = 0.1  # seconds that a person sees every step

Show = Callable[[list[int]], None]


class WatchedEngine(InProcessEngine):
    """Tells `show` the canvas of its one request after every step."""

    show: Show | None = None

    def _denoise(self, canvas: torch.Tensor, *rest: Any) -> None:
        super()._denoise(canvas, *rest)
        if self.show is not None:
            self.show(canvas[0].tolist())


class WatchedUniformEngine(UniformEngine):
    """The same for a model of uniform noise."""

    show: Show | None = None

    def _stepped(self, canvas: torch.Tensor) -> None:
        if self.show is not None:
            self.show(canvas[0].tolist())


class WatchedCanvasEngine(WatchedUniformEngine, CanvasEngine):
    """The same for a model that denoises canvases; those to come are noise."""


class WatchedCausalEngine(CausalEngine):
    """Tells `show` the prompt and the tokens of its one request after every token."""

    show: Show | None = None

    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> Any:
        self._sofar = list(requests[0].prompt_ids)
        return super().generate(requests, policy_version)

    def _draw(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        drawn = super()._draw(*arguments)
        self._sofar.append(int(drawn[0]))
        if self.show is not None:
            self.show(self._sofar)
        return drawn


class Chat:
    """Answers one prompt after the other; an answer knows nothing of those before.

    Attributes:
        templated: prompts are put into the tokenizer's chat template, as one user turn.
    """

    def __init__(self, config: Config, templated: bool | None):
        """
        Args:
            config: its `model` and `sampler`; of the task nothing is used.
            templated: None takes the template where the tokenizer has one.

        Raises:
            ValueError: there is no such model.
        """
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)
        self.seed, device = config.run.seed, pick_device(config.run.device)
        with about(f"model.path {config.model.path!r}"):
            self.tokenizer = load_tokenizer(config.model, None)
            model: Any
            if config.model.autoregressive:
                model = load_autoregressive(config.model, config.rollout.server)
            else:
                model = load_policy(config.model, self.tokenizer, self.seed)
            if getattr(model, "server", None) is not None:
                raise ValueError("chat runs a model in this process: give its folder and no server")
        self.templated = bool(self.tokenizer.chat_template) if templated is None else templated
        engine: Any = WatchedCausalEngine
        settings: dict[str, Any] = {"eos_token_id": self.tokenizer.eos_token_id, "device": device}
        if not config.model.autoregressive:
            # What self-speculative decoding gives is seen when it is finished.
            engine = SelfSpeculativeEngine if config.sampler.verify else WatchedEngine
            if noise_of(model) == "uniform":
                engine = WatchedCanvasEngine if getattr(model, "canvas_length", None) else WatchedUniformEngine
            settings["approximate_cache"] = config.rollout.cache
            settings |= beside_policy(config.sampler, self.tokenizer, model, device)
        self.engine = engine(model.to(device).eval(), config.sampler, **settings)
        self.mask, self.pieces = model.mask_token_id, Pieces(self.tokenizer)

    def answer(self, prompt: str, show: Callable[[Text], None] | None = None) -> tuple[str, str]:
        """The answer to a prompt, and a line about it.

        Args:
            show: gets the canvas after every step, in colour.

        Raises:
            ValueError: the prompt has a character that the tokenizer does not know, or is too long.
        """
        (ids,) = token_ids(self.tokenizer, [prompt_text(self.tokenizer, {"prompt": prompt}, self.templated)])
        before: list[int] = []

        def draw(canvas: list[int]) -> None:
            nonlocal before
            assert show is not None
            show(self.canvas(canvas[len(ids) :], before))
            before = canvas[len(ids) :]

        self.engine.show = None if show is None else draw
        (trajectory,) = self.engine.generate([Request(ids, self.seed)])
        self.seed += 1
        text = self.tokenizer.decode(trajectory.response_ids(), skip_special_tokens=True)
        return text, f"{int(trajectory.stop_length)} tokens in {trajectory.num_steps} steps"

    def canvas(self, tokens: Sequence[int], before: Sequence[int]) -> Text:
        """The tokens that are there, those that the last step decided in colour, and a mark for every mask."""
        eos, text = self.tokenizer.eos_token_id, Text()
        known = [None if token == self.mask else token for token in tokens]
        for index, piece in enumerate(self.pieces.texts(known)):
            new = index >= len(before) or before[index] != tokens[index]
            # What follows the end of the answer is filled up with end tokens.
            style = "dim" if tokens[index] in (self.mask, eos) else "bold cyan" if new else ""
            text.append(piece or _MASK, style=style)
        return text


def chat_config(
    model: str, config: str | None, overrides: Sequence[str], steps: int | None, temperature: float
) -> tuple[Config, bool | None]:
    """The config that a model is talked to with, and whether it wants the chat template (None: it does not say).

    It is the given config, else that of the run that the model is part of, else the defaults.

    Args:
        steps: denoising steps; None takes the sampler's.
        temperature: of the tokens; 0 is greedy.

    Raises:
        ValueError: a run or checkpoint folder without a whole model, no text, or a mistake in the config.
    """
    source = config or _config_of_run(model)
    found = load_config(source, overrides if source else [*_DEFAULTS, *overrides])
    if modality_of(found.task.name).name != "text":
        raise ValueError(f"chat is about text, and task.name is {found.task.name!r}: use denoise-rl rollout")
    # Options of evaluations, which are greedy too.
    changes: dict[str, Any] = {**found.eval.sampler, "temperature": temperature, "record_x0": False}
    if steps is not None:
        changes["num_inference_steps"] = steps
    path = found.model.model_copy(update={"path": model_folder(model)})
    used = found.model_copy(update={"model": path, "sampler": with_changes(found.sampler, changes)})
    return used, found.task.chat if source else None


def _config_of_run(model: str) -> Path | None:
    """The config.yaml of the run that a folder is, or is in: RUN/model, RUN/warm_start, RUN/checkpoints/step_3/hf."""
    path = Path(model).resolve()
    runs = (f for f in (path, *path.parents[:3]) if (f / "config.yaml").is_file() and (f / "metrics.jsonl").is_file())
    return next((folder / "config.yaml" for folder in runs), None)


def talk(chat: Chat, console: Console, prompt: str | None = None) -> None:
    """Answer `prompt`, or every line of standard input. Only a terminal sees more than the answers.

    Raises:
        ValueError: a prompt that no person types now cannot be answered.
    """
    # FORCE_COLOR makes rich call a pipe a terminal.
    watched = console.is_terminal and console.file.isatty()
    asking = prompt is None and watched and sys.stdin.isatty()
    prompts: Iterable[str] = (line.rstrip("\n") for line in sys.stdin) if prompt is None else [prompt]
    if asking:
        how = "as a turn of the chat template" if chat.templated else "as it is"
        console.print(f"Every line is a prompt, which the model gets {how}. Ctrl-D or Ctrl-C ends.", style="dim")
        prompts = _typed(console)
    for number, text in enumerate(prompts, start=1):
        try:
            if text.strip():
                _say(chat, console, text, watched)
        except ValueError as error:
            if not asking:
                raise ValueError(f"prompt {number}: {error}") from None
            console.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:
            if not asking:
                raise
            return


def _say(chat: Chat, console: Console, prompt: str, watched: bool) -> None:
    if not watched:
        print(chat.answer(prompt)[0], flush=True)
        return
    with Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop") as live:

        def show(canvas: Text) -> None:
            live.update(canvas, refresh=True)
            time.sleep(_SHORTEST)

        answer, said = chat.answer(prompt, show)
    console.print(answer, markup=False)
    console.print(said, style="dim")


def _typed(console: Console) -> Iterator[str]:
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return

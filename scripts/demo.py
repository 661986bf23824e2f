"""One model three times, side by side: autoregressive, converted to diffusion, and improved by RL (`make demo`).

    python scripts/demo.py --prompts 6

All answer the same held-out prompts of the task `words`, greedily. Then the answers are played back as they came
about, one forward of each model at a time: the autoregressive one writes a token a forward, the others two. The
diffusion models are the adapters in demo/smollm on SmolLM2-135M-Instruct; demo/README.md says how they were made.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rl.config import Config, load_config
from rl.errors import is_message
from rl.train.run import Run
from rollouts.trajectory import TokenTrajectory

MODELS = ("autoregressive", "converted", "after RL")


class Answers:
    """The answers of one model: [N] trajectories, texts, and what the judge says of them."""

    def __init__(self, config: Config, steps: int, count: int):
        with Run.open(config, write=False) as run:
            run.progress.message(f"{config.model.path} answers")
            self.rows = run.task.heldout_examples(count)
            engine = run.engine(run.model, run.modality.evaluation_options(steps))
            self.trajectories = engine.generate(run.modality.requests(self.rows, [[0]] * count))
            _, table = run.judge.score(self.rows, self.trajectories, verifier=True)
            (self.scores,) = table.parts.values()
            self.tokenizer = run.tokenizer

    def shown(self, index: int, forwards: int) -> Text:
        """An answer after some forwards, a dot for every token that is not decided; green and red once it is judged."""
        trajectory, score = self.trajectories[index], self.scores[index]
        done = forwards >= trajectory.num_steps
        text = _text(trajectory, forwards, self.tokenizer)
        if not done:
            return Text(text)
        verdict = f"  ({score.metrics['nats']:.1f} nats, {trajectory.num_steps} forwards)"
        return Text(text, style="green" if score.value == 1 else "red") + Text(verdict, style="dim")


def _text(trajectory: TokenTrajectory, forwards: int, tokenizer: Any) -> str:
    start, shown = trajectory.prompt_length, []
    canvas = trajectory.canvas_at(forwards)[start : start + trajectory.stop_length].tolist()
    for token in canvas:
        hidden = token == trajectory.mask_token_id
        shown.append(" ·" if hidden else tokenizer.decode([token], skip_special_tokens=True))
    return "".join(shown).strip()


def table(answers: list[Answers], forwards: int) -> Table:
    """All answers after some forwards of each model."""
    grid = Table(title=f"{forwards} forwards", expand=True, show_lines=True)
    grid.add_column("words", ratio=1)
    for name in MODELS:
        grid.add_column(name, ratio=3)
    for index, row in enumerate(answers[0].rows):
        grid.add_row(", ".join(row["keywords"]), *(each.shown(index, forwards) for each in answers))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="demo/smollm", help="folder with the adapters converted and after_rl")
    parser.add_argument("--config", default="smollm_words")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of an answer of 24 tokens")
    parser.add_argument("--seconds", type=float, default=0.4, help="pause after each forward of the playback")
    args, overrides = parser.parse_known_args()
    folders = [Path(args.adapters) / name for name in ("converted", "after_rl")]
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"there are no adapters in {folder}: demo/README.md says how to train some")
    try:
        base = load_config(args.config, overrides)
        answers = [Answers(base.of_baseline(), base.sampler.gen_length, args.prompts)]
        for folder in folders:
            config = load_config(
                args.config, [*overrides, f"model.path={folder}", f"model.tokenizer={base.model.path}"]
            )
            answers.append(Answers(config, args.steps, args.prompts))
    except ValueError as error:
        if not is_message(error):
            raise
        parser.error(str(error))
    console = Console()
    last = max(trajectory.num_steps for each in answers for trajectory in each.trajectories)
    if console.is_terminal:
        with Live(table(answers, 0), console=console, refresh_per_second=10) as live:
            for forwards in range(1, last):
                time.sleep(args.seconds)
                live.update(table(answers, forwards))
    console.print(table(answers, last))
    for name, each in zip(MODELS, answers, strict=True):
        right = sum(score.value == 1 for score in each.scores)
        nats = sum(score.metrics["nats"] for score in each.scores) / args.prompts
        forwards = sum(trajectory.num_steps for trajectory in each.trajectories) / args.prompts
        console.print(
            f"{name}: {right} of {args.prompts} right, {nats:.2f} nats a token, {forwards:.1f} forwards an answer"
        )


if __name__ == "__main__":
    main()

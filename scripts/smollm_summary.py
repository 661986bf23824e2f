"""The numbers of `make smollm` by tokens a forward: RUN/summary.json out of the run in RUN/train.

    python scripts/smollm_summary.py runs/smollm-0

`ar` is the autoregressive model, `converted` the diffusion model before RL, `after` the same after it; each maps tokens
a forward ("1", "2", "4") to the share of right answers `score`, of answers with both words `words`, mean `nats` a token
and the number `n` of prompts. `beside` has measures that no reward sees, `sentences` the first answers as they came.
RUN/summary.png draws score, words, nats and the different frames of sentences.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from rl.files import write_json, write_whole

NAMES = {"ar": "baseline", "converted": "before", "after": "after"}


def by_speed(run: Path) -> dict:
    """The content of summary.json, from the summary of the run."""
    found = json.loads((run / "summary.json").read_text())
    length = max(int(steps) for steps in found["baseline"])
    stages = {"ar": "baseline_seconds", "convert": "convert_seconds", "converted": "before_seconds"}
    stages |= {"rl": "train_seconds", "after": "after_seconds"}
    summary: dict = {"seconds": {name: round(found[key], 1) for name, key in stages.items() if key in found}}
    summary |= {"seed": found["seed"], "beside": {}, "intervals": {}, "sentences": {}}
    for name, key in NAMES.items():
        if key not in found:
            continue
        speeds = {steps: str(length // int(steps)) for steps in found[key]}
        quality = found[f"{key}_quality"]
        summary[name] = {
            speed: {
                "score": found[key][steps],
                "words": quality[steps]["words"],
                "nats": quality[steps]["nats"],
                "n": found["n_eval"] - found[f"{key}_unscored"][steps],
            }
            for steps, speed in speeds.items()
        }
        beside = ("distinct_frames", "repetition", "num_words")
        summary["beside"][name] = {s: {what: quality[steps][what] for what in beside} for steps, s in speeds.items()}
        summary["intervals"][name] = {speed: found[f"{key}_interval"][steps] for steps, speed in speeds.items()}
        lines = [json.loads(line) for line in (run / "answers" / f"{key}.jsonl").read_text().splitlines()]
        summary["sentences"][name] = {
            speed: [line["completion"] for line in lines if line["steps"] == int(steps)]
            for steps, speed in speeds.items()
        }
    return summary


COLOURS = {"ar": "#1b1f24", "converted": "#0072B2", "after": "#D55E00"}
LABELS = {"ar": "autoregressive", "converted": "converted to diffusion", "after": "after RL"}


def draw(summary: dict, path: Path) -> None:
    """Four panels over tokens a forward; the autoregressive model, which has one speed, is a line across."""
    figure = Figure(figsize=(13, 3.1), layout="constrained")
    titles = ("right answers", "both words", "nats a token (lower is more fluent)", "different sentence frames")
    for axis, title, what in zip(
        figure.subplots(1, 4), titles, ("score", "words", "nats", "distinct_frames"), strict=True
    ):
        for name, label in LABELS.items():
            rows, speeds = summary.get(name, {}), sorted(summary.get(name, {}))
            source = summary["beside"].get(name, {}) if what == "distinct_frames" else rows
            values = [source[speed][what] for speed in speeds]
            if name == "ar" and values:
                axis.axhline(values[0], color=COLOURS[name], linestyle="--", label=label)
            elif values:
                axis.plot([int(speed) for speed in speeds], values, color=COLOURS[name], marker="o", label=label)
            if what == "score" and name != "ar" and values:
                low, high = zip(*(summary["intervals"][name][speed] for speed in speeds), strict=True)
                axis.fill_between([int(speed) for speed in speeds], low, high, color=COLOURS[name], alpha=0.2)
        axis.set(title=title, xlabel="tokens a forward", xticks=[1, 2, 4])
        axis.set_ylim(bottom=0, top=None if what == "nats" else 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    summary = by_speed(folder / "train")
    write_json(folder / "summary.json", summary)
    draw(summary, folder / "summary.png")
    print(f"{'model':<10} tokens/forward  score  words  nats/token")
    for name in NAMES:
        for speed, row in sorted(summary.get(name, {}).items()):
            print(f"{name:<10} {speed:>14}  {row['score']:.3f}  {row['words']:.3f}  {row['nats']:10.2f}")
    print(f"{folder / 'summary.json'}; report: {folder / 'train' / 'report.html'}")

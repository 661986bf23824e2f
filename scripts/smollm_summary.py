"""The numbers of `make smollm` by tokens a forward: RUN/summary.json out of the run in RUN/train.

    python scripts/smollm_summary.py runs/smollm-0
    python scripts/smollm_summary.py runs/smollm-0 runs/smollm-1 runs/smollm-2

`ar` is the autoregressive model, `converted` the diffusion model before RL, `after` the same after it; each maps tokens
a forward ("1", "2", "4") to the share of right answers `score`, of answers with both words `words`, mean `nats` a token
and the number `n` of prompts. `beside` has measures that no reward sees, `sentences` the first answers as they came.
RUN/summary.png draws score, words, nats and the different frames of sentences. Of several runs the means over seeds
and their 95 % intervals (Student's t) are printed, and the picture, in the first folder, has a thin line for each.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from rl.evaluation.compare import interval
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


MEASURES = {
    "score": "right answers",
    "words": "both words",
    "nats": "nats a token (lower is more fluent)",
    "distinct_frames": "different sentence frames",
}


def values(summary: dict, name: str, what: str) -> dict[str, float]:
    """A measure of a model by tokens a forward; {} where the run has not got so far."""
    source = summary["beside"] if what == "distinct_frames" else summary
    return {speed: row[what] for speed, row in sorted(source.get(name, {}).items())}


def draw(summaries: list[dict], path: Path) -> None:
    """Four panels over tokens a forward; the autoregressive model, which has one speed, is a line across."""
    figure = Figure(figsize=(13, 3.1), layout="constrained")
    for axis, (what, title) in zip(figure.subplots(1, 4), MEASURES.items(), strict=True):
        for name, label in LABELS.items():
            runs = [each for summary in summaries if (each := values(summary, name, what))]
            if not runs:
                continue
            speeds = [int(speed) for speed in runs[0]]
            means = [statistics.mean(run[speed] for run in runs) for speed in runs[0]]
            if name == "ar":
                axis.axhline(means[0], color=COLOURS[name], linestyle="--", label=label)
                continue
            axis.plot(speeds, means, color=COLOURS[name], marker="o", label=label)
            for run in runs if len(runs) > 1 else []:
                axis.plot(speeds, list(run.values()), color=COLOURS[name], linewidth=0.8, alpha=0.5)
            if what == "score" and len(runs) == 1:
                low, high = zip(*(summaries[0]["intervals"][name][speed] for speed in runs[0]), strict=True)
                axis.fill_between(speeds, low, high, color=COLOURS[name], alpha=0.2)
        axis.set(title=title, xlabel="tokens a forward", xticks=[1, 2, 4])
        axis.set_ylim(bottom=0, top=None if what == "nats" else 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def table(summaries: list[dict]) -> str:
    """Every measure by model and tokens a forward, over seeds."""
    rows = ["| model | tokens a forward | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for name, label in LABELS.items():
        found = [summary for summary in summaries if name in summary]
        for speed in sorted(found[0][name]) if found else []:
            cells = [interval([values(summary, name, what)[speed] for summary in found]) for what in MEASURES]
            rows.append(f"| {label} | {speed} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:]]
    summaries = [by_speed(folder / "train") for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        write_json(folder / "summary.json", summary)
    draw(summaries, folders[0] / "summary.png")
    print(table(summaries))
    print(f"{folders[0] / 'summary.json'}; report: {folders[0] / 'train' / 'report.html'}")

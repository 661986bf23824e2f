"""The numbers of `make smollm` by tokens a forward: RUN/summary.json out of the run in RUN/train.

    python scripts/smollm_summary.py runs/smollm-0

`ar` is the autoregressive model, `converted` the diffusion model before RL, `after` the same after it; each maps tokens
a forward ("1", "2", "4") to the share of right answers `score`, of answers with both words `words`, mean `nats` a token
and the number `n` of prompts. `beside` has measures that no reward sees, `sentences` the first answers as they came.
"""

import json
import sys
from pathlib import Path

from rl.files import write_json

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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    summary = by_speed(folder / "train")
    write_json(folder / "summary.json", summary)
    print(f"{'model':<10} tokens/forward  score  words  nats/token")
    for name in NAMES:
        for speed, row in sorted(summary.get(name, {}).items()):
            print(f"{name:<10} {speed:>14}  {row['score']:.3f}  {row['words']:.3f}  {row['nats']:10.2f}")
    print(f"{folder / 'summary.json'}; report: {folder / 'train' / 'report.html'}")

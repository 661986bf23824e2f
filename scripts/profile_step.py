"""Where the time of an RL step goes: `python scripts/profile_step.py runs/quickstart-0`.

Reads a run's metrics.jsonl and prints, for thirds of the run, seconds per step and the share of sampling, scoring
and learning. (Shares move during a run: the more groups are solved, the less there is to learn from.)
"""

from __future__ import annotations

import sys

from rl.track.jsonl import read_metrics


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python scripts/profile_step.py RUN", file=sys.stderr)
        return 2
    records = read_metrics(sys.argv[1], "train")
    print("| steps | s/step | rollout | reward | learn | zero-variance groups |\n|---|---|---|---|---|---|")
    size = -(-len(records) // 3)
    for start in range(0, len(records), size):
        part = records[start : start + size]
        seconds = {name: sum(r[f"time/{name}"] for r in part) for name in ("rollout", "reward", "learn")}
        total = sum(seconds.values())
        flat = sum(r["reward/zero_variance_share"] for r in part) / len(part)
        shares = " | ".join(f"{value / total:.0%}" for value in seconds.values())
        print(f"| {part[0]['step']} to {part[-1]['step']} | {total / len(part):.2f} | {shares} | {flat:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does an installed denoise-rl run? Train, resume, evaluate, save, load: a minute; `scripts/smoke.sh` installs first.

python scripts/smoke.py            # in an empty folder, which gets the runs
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from peft import LoraConfig
from trl import GRPOConfig

import rl
from rl.trl_args import grpo_options

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "trl_style.py"
SMALL = "sft.steps=3 sft.batch_size=8 train.prompts_per_step=4 train.group_size=2 eval.every=0 eval.num_prompts=8"
SMALL += " eval.viewer_items=1 goal=null run.num_threads=1 run.output_dir=runs/quickstart"


def run(*words: str) -> None:
    """One command, which must end well."""
    print("denoise-rl", *words, flush=True)
    subprocess.run([sys.executable, "-m", "rl.cli", *words], check=True)


sys.argv[1:] = ["sft.steps=3", "train.steps=2", "eval.num_prompts=8", "eval.viewer_items=1"]
example = runpy.run_path(str(EXAMPLE))
rows = example["dataset"]["train"].select(range(16)), example["dataset"]["test"]
small = {**example["trainer"].config.model_dump(include={"sampler", "eval"}), "train.steps": 1, "run.num_threads": 1}
small |= {"run.output_dir": "runs/lora", "train.prompts_per_step": 2, "train.group_size": 4}
saved = "runs/trl_style/saved"
rl.Trainer(saved, example["each_once"], small, *rows, peft_config=LoraConfig(r=2)).train()
rl.evaluate("runs/lora", rows[1], example["each_once"], [2], {"gen_length": 4})
grpo_options(GRPOConfig(output_dir="runs/trl", bf16=False, use_cpu=True), num_rows=100)
run("train", "--config", "quickstart", *SMALL.split(), "train.steps=1")
run("train", "--config", "quickstart", *SMALL.split(), "train.steps=2", "run.resume=true")
run("eval", "--config", "quickstart", *SMALL.split(), "model.path=runs/quickstart")
print("smoke: passed on Python", sys.version.split()[0])

"""Every differentiable judge of images in a run of its own, on tiny random weights: it ends higher than it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import runs
from tests.test_rewards_images import save_head
from tests.tiny_pipelines import save_pipeline
from tests.tiny_vision import save_clip

MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(768, 2)

    def forward(self, images):
        return self.head(images.flatten(1))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with a pipeline and prompts, and the parameters of every judge."""
    folder = tmp_path_factory.mktemp("judges")
    save_pipeline(folder / "sd", "sd")
    save_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "config.yaml").write_text("{}")
    (folder / "net.py").write_text(MODULE)
    head = 0.1 * torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    save_file({"head.weight": head, "head.bias": torch.zeros(2)}, folder / "net.safetensors")
    module = {"model": f"{folder}/net.py:Net", "weights": str(folder / "net.safetensors"), "device": "cpu"}
    clip = {"model": str(folder / "clip"), "device": "cpu"}
    return folder, {
        "clip_score": clip,
        "pickscore": {**clip, "processor": str(folder / "clip")},
        "aesthetic": {**clip, "head": save_head(folder / "head.pth")},
        "image_classifier": {**module, "label": 1, "value": "logprob"},
    }


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic", "image_classifier"])
def test_a_run_raises_its_judge(name: str, weights: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    folder, params = weights
    task = {"name": "prompts", "params": {"train": str(folder / "prompts.txt"), "reward": None}}
    runs.train_here(
        [
            *("--config", str(folder / "config.yaml")),
            *(f"run.output_dir={tmp_path / 'run'}", "run.device=cpu", "run.num_threads=1", f"task={json.dumps(task)}"),
            *(f"model.path={folder / 'sd'}", "model.pipeline={height: 16, width: 16}", "sft.steps=0"),
            *("sampler={num_inference_steps: 3}", "algorithm={name: alignprop, gradient_steps: 2}"),
            f"reward.functions={json.dumps([{'name': name, 'params': params[name]}])}",
            *("train.steps=8", "train.prompts_per_step=4", "train.group_size=4", "train.updates_per_step=1"),
            *("train.micro_batch_size=16", "train.optimizer={lr: 2e-2, warmup_steps: 0}"),
            *("filters.drop_zero_variance=false", "eval.num_prompts=2", "eval.num_inference_steps=[3]"),
        ]
    )
    reward = [line["reward/mean"] for line in runs.lines(tmp_path / "run", "train")]
    spread = [line["reward/high"] - line["reward/low"] for line in runs.lines(tmp_path / "run", "train")]
    assert reward[-1] - reward[0] > spread[0] / 4, reward

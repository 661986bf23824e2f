"""Prompt lists for image models: the task, its verifier, the memory plan, and the shipped config on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from rewards.clip_score import ClipMatch, ClipScore
from rewards.load import downloads
from rl.config import load_config
from rl.modalities.image_memory import activation_bytes, build_denoiser
from rl.tasks.load import load_task
from rl.tasks.prompts import PromptsTask
from rl.train import plan
from tests import runs
from tests.tiny_pipelines import save_pipeline
from tests.tiny_vision import pictures, save_clip

SD15 = runs.ROOT / "configs" / "sd15_b2.yaml"


def test_the_built_in_list() -> None:
    task = load_task("prompts", {})
    assert len(task.prompts) == 45 and len(set(task.prompts)) == 45  # type: ignore[attr-defined]
    assert task.prompts[:2] == ["a cat washing dishes", "a dog washing dishes"]  # type: ignore[attr-defined]
    assert {"a raccoon riding a bike", "a snake riding a bike", "a turtle playing chess"} <= set(task.prompts)  # type: ignore[attr-defined]
    heldout = [row["prompt"] for row in task.heldout_examples(180)]
    assert len(set(heldout)) == 90 and heldout[:90] == heldout[90:]
    assert not set(heldout) & set(task.prompts)  # type: ignore[attr-defined]
    rows = task.train_examples(0, 3, 500)
    assert rows == task.train_examples(0, 3, 500) != task.train_examples(0, 4, 500)
    assert {row["prompt"] for row in rows} == set(task.prompts)  # type: ignore[attr-defined]
    assert all(len(row["others"]) == 44 and row["prompt"] not in row["others"] for row in rows)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red pear\n\n  a blue plum \n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "x on y", "others": ["y on x"], "kind": 1}) + "\n")
    task = PromptsTask(str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), reward="clip_score")
    assert task.prompts == ["a red pear", "a blue plum"] and task.reward == "clip_score"
    assert task.heldout_examples(1) == [{"prompt": "x on y", "others": ["y on x"], "kind": 1}]
    assert [row["prompt"] for row in PromptsTask(str(tmp_path / "a.txt")).heldout_examples(3)] == [
        *task.prompts,
        "a red pear",
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(ValueError, match="must hold prompts, row 1 has none"):
        PromptsTask(str(tmp_path / "c.jsonl"))
    with pytest.raises(
        ValueError, match=r"there is no file of prompts 'animals\.txt', and the built-in list is animal_act"
    ):
        PromptsTask("animals.txt")


def test_clip_match_is_the_best_cosine(tmp_path: Path) -> None:
    save_clip(tmp_path)
    texts = ["a cat", "seven dogs", "x"]
    images = pictures(4, size=16)
    cosine = torch.tensor([[s.value for s in ClipScore(str(tmp_path))([text] * 4, images)] for text in texts]).T
    reward = ClipMatch(str(tmp_path))
    for place, text in enumerate(texts):
        verdicts = reward([text] * 4, images, others=[texts] * 4)
        assert [v.value for v in verdicts] == (cosine.argmax(1) == place).double().tolist()
        rivals = cosine[:, [i for i in range(3) if i != place]].max(1).values
        assert [v.metrics["margin"] for v in verdicts] == pytest.approx((cosine[:, place] - rivals).tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="reward 'clip_match' needs a column `others`"):
        reward(["x"], images[:1])


def test_check_names_what_rewards_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").mkdir()
    clip = str(tmp_path / "clip")
    pick = ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]
    assert downloads("pickscore", {}) == pick and downloads("pickscore", {"processor": clip}) == pick[:1]
    assert downloads("clip_score", {"model": clip}) == downloads("jpeg_compressibility", {}) == []
    assert downloads("image_reward", {}) == ["the checkpoint of the package image-reward"]
    assert downloads("hpsv2", {"model": "org/hps"}) == ["org/hps"] and downloads("mmd", {"images": "x.npy"}) == []
    monkeypatch.setattr(plan, "load_reward", lambda name, params: lambda prompts, completions, **columns: [])
    rewards = "reward.functions=[{name: pickscore}, {name: pickscore, weight: 0}]"
    notes = plan.check_run(load_config(SD15, [rewards, "run.device=cpu", f"run.output_dir={tmp_path / 'run'}"]))
    assert notes[:2] == [f"reward 'pickscore' needs {name}, downloaded once" for name in pick]
    assert notes[2:] == ["reward 'clip_match' needs openai/clip-vit-large-patch14, downloaded once"]


def test_the_plans_activations_are_what_autograd_keeps() -> None:
    """The described network on the meta device, against the same one on the CPU with its real attention kernel."""
    sizes = (
        "{model_type: UNet2DConditionModel, sample_size: 8, block_out_channels: [8, 16], layers_per_block: 1, "
        "norm_num_groups: 2, attention_head_dim: 4, cross_attention_dim: 16, down_block_types: [DownBlock2D, "
        "CrossAttnDownBlock2D], up_block_types: [CrossAttnUpBlock2D, UpBlock2D]}"
    )
    config = load_config(SD15, [f"model.backbone={sizes}"])
    plan, real = build_denoiser(config), build_denoiser(config, "cpu")
    assert isinstance(real, diffusers.UNet2DConditionModel) and next(plan.parameters()).device.type == "meta"
    trained = [name for name, p in real.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    kept: dict[int, torch.UntypedStorage] = {}
    own = {p.untyped_storage()._cdata for p in real.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = real(torch.zeros(3, 4, 8, 8), torch.zeros(3), encoder_hidden_states=torch.zeros(3, 77, 16)).sample
    assert output.requires_grad
    assert activation_bytes(plan, 3) == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.02)


def test_the_shipped_config_runs_on_a_tiny_pipeline(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "sd", "sd")
    save_clip(tmp_path / "clip")
    params = {"model": str(tmp_path / "clip")}
    rewards = [{"name": "clip_score", "params": params}, {"name": "clip_match", "weight": 0, "params": params}]
    runs.train_here(
        [
            *("--config", str(SD15), f"run.output_dir={tmp_path / 'run'}", "run.device=cpu", "run.num_threads=1"),
            *(f"model.path={tmp_path / 'sd'}", f"reward.functions={json.dumps(rewards)}", "train.steps=1"),
            *("train.prompts_per_step=2", "train.updates_per_step=1", "sampler.num_inference_steps=4"),
            *("algorithm.num_steps=4", "algorithm.first_interval=2", "algorithm.positive_threshold=0.0"),
            *("algorithm.negative_threshold=0.0", "eval.num_inference_steps=[4]", "eval.num_prompts=4"),
            *("eval.viewer_items=2", "train.max_logprob_gap=1e-4"),
        ]
    )
    (line,) = runs.lines(tmp_path / "run", "train")
    # Two trees: 2 shared steps and 5 branches of 2, twice with guidance; then every decision twice, in 2 epochs.
    assert line["cost/sequence_forwards"] == 2 * (2 * (2 + 5 * 2)) + 2 * 2 * line["policy/decisions"] / 2
    assert line["reward/mean"] == pytest.approx(line["reward/clip_score/mean"]) and "reward/clip_match/mean" in line
    assert line["policy/logprob_gap_max"] < 1e-4 and line["policy/grad_norm"] > 0
    folder = tmp_path / "run" / "checkpoints" / "step_1" / "hf"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    viewer = json.loads((tmp_path / "run" / "viewer.json").read_text())
    assert len(viewer["items"]) == 2 and viewer["items"][0]["after"]["image"].startswith("data:image/png")

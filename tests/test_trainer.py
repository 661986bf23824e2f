"""`rl.Trainer` and the functions beside it: the same run as the command's, TRL's and peft's options, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import rl
from rl import Trainer
from rl.config import load_config
from rl.files import write_whole
from rl.inputs import as_lines
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.recipes import JustGRPO, TraceRL
from rl.tasks.char_tokenizer import char_tokenizer
from rl.train.loop import train
from rl.train.run import Run
from rl.trl_args import grpo_options, lora_options
from tests import runs

LETTERS = "abcdefg"
ROWS = [{"prompt": f"{a}{b}:", "answer": b + a} for a in LETTERS for b in LETTERS]
# What makes a run last a second.
SMALL = {
    "run.device": "cpu", "run.num_threads": 1, "sampler": {"gen_length": 4, "num_inference_steps": 2},
    "train": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "optimizer": {"lr": 0.01}},
    "eval": {"num_inference_steps": [2, 4], "num_prompts": 8, "viewer_items": 1},
}  # fmt: skip


def share_of_a(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [completion.count("a") / 4 + len(completion) / 100 for completion in completions]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer(LETTERS + ":", ends=False)


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    return load_policy(ModelConfig(backbone=runs.QWEN3), tokenizer, seed=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, policy: Any, tokenizer: Any) -> Any:
    """A run of Python objects that has ended: a loaded policy, rows, a function, a recipe."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    trainer = make(folder, policy, tokenizer)
    trainer.summary = trainer.train()
    return trainer


def make(folder: Path, policy: Any, tokenizer: Any, rows: Any = None, **more: Any) -> Trainer:
    given: dict[str, Any] = {"train_dataset": datasets.Dataset.from_list(rows or ROWS[:32]), "eval_dataset": ROWS[32:]}
    given |= {"args": {**SMALL, "run.output_dir": str(folder)}, "recipe": TraceRL(clip_high=0.28)}
    return Trainer(policy, share_of_a, processing_class=tokenizer, **(given | more))


def test_it_is_the_run_of_the_command(trained: Any, tmp_path: Path) -> None:
    """The config in the run folder, run as `denoise-rl train` does, gives the same numbers and weights."""
    config = load_config(trained.run.folder / "config.yaml", [f"run.output_dir={tmp_path / 'run'}"])
    assert type(config.algorithm) is TraceRL and config.algorithm.clip_high == 0.28
    with Run.open(config) as run:
        summary = train(run)
    assert runs.lines(tmp_path / "run") == runs.lines(trained.run.folder)
    assert summary["after"] == trained.summary["after"]
    assert runs.largest_difference(runs.weights(tmp_path / "run"), runs.weights(trained.run.folder)) == 0


def test_it_evaluates_the_model_as_it_is_now(trained: Any) -> None:
    metrics = trained.evaluate()
    assert {str(steps): metrics[f"eval_reward@{steps}"] for steps in (2, 4)} == trained.summary["after"]
    assert trained.evaluate(ROWS[:1])["eval_unscored@2"] == 0
    with pytest.raises(ValueError, match=r"^eval_dataset has no column 'answer'"):
        trained.evaluate([{"prompt": "ab:"}])


def test_a_saved_model_has_a_card_and_loads(trained: Any, tmp_path: Path, policy: Any) -> None:
    folder = trained.save_model(tmp_path / "saved")
    card = (folder / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "library_name: denoise-rl" in head and "tracerl" in head
    after = trained.summary["after"]["4"]
    low, high = trained.summary["after_interval"]["4"]
    assert f"{after:.3f} [{low:.3f}, {high:.3f}]" in card and "clip_high 0.28" in card
    assert "train_dataset.jsonl" in card and "denoise-rl train --config denoise_rl.yaml" in card
    assert load_config(folder / "denoise_rl.yaml") == trained.config
    saved = dict(load_policy(ModelConfig(path=str(folder)), None, 0).named_parameters())
    for name, parameter in trained.run.model.named_parameters():
        assert torch.equal(saved[name], parameter)
    assert any(not torch.equal(saved[name], parameter) for name, parameter in policy.named_parameters())


def test_a_model_takes_no_other_folders_place(trained: Any, tmp_path: Path) -> None:
    """`save_model(args.output_dir)` is a habit from TRL; here that folder is the run, which stays."""
    with pytest.raises(ValueError, match=r"run holds .*, which a model would replace: name a new folder"):
        trained.save_model(trained.config.run.output_dir)
    assert (trained.run.folder / "metrics.jsonl").is_file()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        trained.save_model(write_whole(tmp_path / "file", "x"))
    for _ in range(2):
        trained.save_model(tmp_path / "again")


def test_the_card_names_the_base_and_its_licence(tmp_path: Path, policy: Any, tokenizer: Any) -> None:
    base = tmp_path / "base"
    save_policy(policy, tokenizer, base)
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    card = (make(tmp_path / "run", str(base), None).save_model(tmp_path / "saved") / "README.md").read_text()
    assert "license: cc-by-4.0" in card and f"| base | `{base}` |" in card and "## Numbers" not in card


def test_large_models_are_saved_in_several_files(tmp_path: Path, policy: Any, tokenizer: Any) -> None:
    save_policy(policy, tokenizer, tmp_path, shard_size="4KB")
    assert (
        len(list(tmp_path.glob("model-0*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    )
    again = dict(load_policy(ModelConfig(path=str(tmp_path)), None, 0).named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in policy.named_parameters())


def test_a_run_of_objects_goes_on_where_it_ended(tmp_path: Path, policy: Any, tokenizer: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            assert (args.output_dir, args.metric_for_best_model) == (str(tmp_path / "run"), "eval_reward@2")
            control.should_training_stop = state.global_step == 1

    summary = make(tmp_path / "run", policy, tokenizer, callbacks=[Stop]).train()
    assert summary["train_steps"] == 1
    again = make(tmp_path / "run", policy, tokenizer)
    with pytest.raises(ValueError, match="already holds a run"):
        again.train()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint 'elsewhere': .*step_1"):
        again.train(resume_from_checkpoint="elsewhere")
    newest = tmp_path / "run" / "checkpoints" / "step_1"
    assert again.train(resume_from_checkpoint=str(newest))["train_steps"] == 2
    assert [line["step"] for line in runs.lines(tmp_path / "run", "train")] == [1, 2]
    with pytest.raises(ValueError, match="train_dataset is not what the run"):
        make(tmp_path / "run", policy, tokenizer, rows=ROWS[:31])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_trained_by_peft_config_and_plain_peft_reads_them(
    tmp_path: Path, policy: Any, tokenizer: Any
) -> None:
    from peft import PeftModel

    trainer = make(tmp_path / "run", policy, tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert trainer.config.model.lora.rank == 2
    trainer.train()
    folder = trainer.save_model(tmp_path / "adapters")
    base = load_policy(ModelConfig(path=str(trainer.config.model.path)), None, 0)
    adapted = PeftModel.from_pretrained(base.backbone, folder)
    ids = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        theirs, ours = adapted(input_ids=ids).last_hidden_state, trainer.run.model.hidden_states(ids)
        assert torch.equal(theirs, ours)
        assert not torch.equal(adapted.unload()(input_ids=ids).last_hidden_state, ours)


def test_pushing_uploads_what_is_saved(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, *names: str, **options: Any) -> None:
            calls.append((names, options))

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            return f"{repo_id} {sorted(p.name for p in Path(folder_path).iterdir())[:3]}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ValueError, match="repo_id is required"):
        trained.push_to_hub()
    done = trained.push_to_hub("me/mine", private=True, token="secret")
    assert done == "me/mine ['README.md', 'config.json', 'denoise_rl.yaml']"
    assert calls == ["secret", (("me/mine",), {"private": True, "exist_ok": True})]


def grpo(**fields: Any) -> Any:
    from trl import GRPOConfig

    with warnings.catch_warnings():
        # It warns about its own default.
        warnings.simplefilter("ignore", FutureWarning)
        return GRPOConfig(output_dir="runs/trl", bf16=fields.pop("bf16", False), **fields)


def test_a_grpo_config_is_mapped() -> None:
    args = grpo(
        learning_rate=2e-6, per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4,
        num_generations=4, num_iterations=3, max_steps=60, warmup_steps=0.1, lr_scheduler_type="cosine",
        max_completion_length=32, temperature=0.9, epsilon=0.1, epsilon_high=0.3, loss_type="dr_grpo",
        scale_rewards=False, save_steps=12, report_to=["wandb"], mask_truncated_completions=True, adam_beta2=0.95,
        logging_steps=1, gradient_checkpointing=False, beta=0.02, use_bias_correction_kl=False, save_total_limit=3,
    )  # fmt: skip
    # 16 completions are 4 prompts; 2 updates of 2 micro-batches, 3 times; 60 updates are 10 RL steps.
    assert grpo_options(args, 1000) == {
        "run.output_dir": "runs/trl", "run.seed": 42, "run.collective_timeout_seconds": 1800,
        "run.services": ["wandb"], "model.gradient_checkpointing": False, "sampler.gen_length": 32,
        "sampler.temperature": 0.9, "sampler.top_p": 1.0, "sampler.top_k": 0, "train.prompts_per_step": 4,
        "train.group_size": 4, "train.micro_batch_size": 4, "train.updates_per_step": 2, "train.epochs": 3,
        "train.steps": 10, "train.deepspeed": "zero0", "train.optimizer.lr": 2e-6, "train.optimizer.eps": 1e-8,
        "train.optimizer.betas": (0.9, 0.95), "train.optimizer.weight_decay": 0.0,
        "train.optimizer.max_grad_norm": 1.0, "train.optimizer.schedule": "cosine",
        "train.optimizer.warmup_steps": 6, "filters.drop_overlong": True, "checkpoint.every": 2, "checkpoint.keep": 3,
        "eval.every": 0, "algorithm.clip_low": 0.1, "algorithm.clip_high": 0.3, "algorithm.aggregation": "constant",
        "algorithm.scale": "none", "algorithm.kl_to": "reference", "algorithm.kl_coef": 0.02,
    }  # fmt: skip
    # Three epochs of 1000 rows in batches of one prompt.
    assert grpo_options(grpo(), 1000)["train.steps"] == 3000
    assert not [name for name in grpo_options(grpo(), 1000) if name.startswith("algorithm")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_vllm": True}, r"args\.use_vllm is True.*rollout\.engine"),
        ({"min_p": 0.1}, r"args\.min_p is 0\.1, which has no counterpart"),
        ({"loss_type": "cispo"}, r"args\.loss_type 'cispo'.*grpo, bnpo, dapo, dr_grpo"),
        ({"logging_steps": 5}, r"args\.logging_steps is 5.*every step is logged"),
        ({"max_steps": 3, "num_iterations": 2}, r"args\.max_steps \(3\) must be a multiple of the 2 updates"),
        ({"beta": 0.1}, r"args\.use_bias_correction_kl"),
        ({"lr_scheduler_type": "polynomial"}, r"args\.lr_scheduler_type 'polynomial'"),
        ({"save_strategy": "epoch"}, r"args\.save_strategy 'epoch'"),
        ({"push_to_hub": True}, r"args\.push_to_hub.*trainer\.push_to_hub\(\)"),
        ({"importance_sampling_level": "sequence"}, r"args\.importance_sampling_level"),
    ],
)
def test_a_field_without_a_counterpart_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_options(grpo(**fields), 100)


def test_a_lora_config_is_mapped_or_refused() -> None:
    mapped = lora_options(LoraConfig(r=4, lora_alpha=16, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"))
    assert mapped == {
        "model.lora.rank": 4, "model.lora.alpha": 16, "model.lora.targets": ["q_proj", "v_proj"],
        "model.lora.dropout": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"peft_config\.use_dora is True"):
        lora_options(LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match=r"target_modules '\.\*q_proj' is a pattern"):
        lora_options(LoraConfig(target_modules=".*q_proj"))


def needs_solution(prompts: Any, completions: Any, solution: Any, **columns: Any) -> list[float]:
    return [1.0] * len(prompts)


def a_file(name: str) -> str:
    return str(write_whole(name, "x"))


SMALL_WITHOUT_SAMPLER = {**SMALL, "sampler": {"num_inference_steps": 2}}
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "column": (lambda: {"train_dataset": [{"question": "a"}]}, "train_dataset has no column 'prompt', it has 'q"),
    "folder": (lambda: {"train_dataset": "."}, r"train_dataset \. is a folder: name a file in it, or give datasets"),
    "ending": (lambda: {"train_dataset": a_file("rows.tsv")}, r"train_dataset: data file rows\.tsv: the ending must"),
    "file": (lambda: {"args": {"run.output_dir": a_file("runs")}}, r"run\.output_dir runs is a file: name a folder"),
    "column's name": (lambda: {"eval_dataset": [{"prompt": "a", 1: 2}]}, "row 1: the column 1 is no text: rename it"),
    "NaN": (lambda: {"train_dataset": [ROWS[0], {"prompt": math.nan}]}, "train_dataset: row 2 has no 'prompt'"),
    "TRL's words": (lambda: {"args": grpo(top_k=-1), "options": SMALL_WITHOUT_SAMPLER}, r"'args\.top_k': .* got -1"),
    "stream": (lambda: {"train_dataset": iter(ROWS)}, r"train_dataset is a list_iterator: give a datasets\.Dataset"),
    "one": (lambda: {"eval_dataset": None}, r"eval_dataset is required .*train_test_split"),
    "both": (
        lambda: {"eval_dataset": ROWS[39:41]},
        "train_dataset: row 40: its prompt is that of row 1 of eval_dataset, and what measures is not trained on",
    ),
    "turns": (
        lambda: {"eval_dataset": [{"prompt": [{"role": "user", "content": "a"}] * 2, "answer": "a"}]},
        "eval_dataset: row 1: column 'prompt' is a conversation of several user turns, which is out of scope",
    ),
    "tools": (
        lambda: {"train_dataset": [{"prompt": "a:", "tools": ["x"]}]},
        "train_dataset: row 1: column 'tools': tool use is out of scope",
    ),
    "no JSON": (lambda: {"eval_dataset": [{"prompt": "a", "x": {1}}]}, r"eval_dataset: row 1: column 'x' holds a set"),
    "reward's column": (
        lambda: {"reward_funcs": needs_solution}, r"reward_funcs '.*needs_solution' needs the column 'solution'.*"
        "train_dataset has answer",
    ),
    "reward": (lambda: {"reward_funcs": [3]}, r"reward_funcs\[0\] is a int: give a function or a name"),
    "reward's name": (lambda: {"reward_funcs": "math_answr"}, "'math_answr'; did you mean 'math_answer'"),
    "model": (lambda: {"model": "no/such/folder/at_all"}, r"model 'no/such/folder/at_all' is not a folder"),
    "object": (lambda: {"model": 3}, r"model is a int: give a folder, a hub name, or a loaded one"),
    "args": (lambda: {"args": 3}, r"args is a int: give a Config, a dict of options, or a trl\.GRPOConfig"),
    "empty": (lambda: {"eval_dataset": []}, "eval_dataset is empty: give at least one row"),
    "no rows": (lambda: {"train_dataset": ["ab:"]}, "train_dataset is a list whose row 1 is a str: give a datasets"),
    "no file": (lambda: {"train_dataset": "nowhere.jsonl"}, r"train_dataset: data file nowhere\.jsonl does not exist"),
    "row 3": (
        lambda: {"train_dataset": [*ROWS[:2], {"prompt": None}]}, "train_dataset: row 3 has no 'prompt': fill it in"
    ),
    "letter": (
        lambda: {"train_dataset": [*ROWS[:2], {"prompt": "a9", "answer": "b"}]},
        "train_dataset: row 3: .*holds '9', which the tokenizer has no token for: mend it",
    ),
    "ragged": (
        lambda: {"train_dataset": [{"answer": "a"}, *ROWS[:2]]}, "train_dataset: row 1 has no 'prompt': fill it in"
    ),
    "answers": (
        lambda: {"eval_dataset": [{"prompt": "zz:"}]}, r"eval_dataset has no column 'answer'.*task\.params\.answer_col"
    ),
    "no tokenizer": (lambda: {"processing_class": None}, "^processing_class is required: this task does not bring"),
    "no reward": (lambda: {"reward_funcs": []}, r"reward_funcs is \[\]: give a function or a name"),
    "recipe's type": (lambda: {"recipe": 3}, "recipe is a int: give a recipe, its class, or its name"),
    "recipe's option": (lambda: {"recipe": {"name": "tracerl", "clip_hihg": 1}}, "did you mean 'clip_high'"),
    "options": (lambda: {"options": ["train.steps=3"]}, "options is a list: give a mapping of options by their names"),
    "callbacks": (lambda: {"callbacks": TrainerCallback()}, "callbacks is a TrainerCallback: give a list of them"),
    "option": (lambda: {"options": {"train.stepz": 3}}, r"unknown config key 'train\.stepz': did you mean 'steps'"),
    "callback": (lambda: {"callbacks": [len]}, r"callbacks\[0\] is a builtin_function_or_method"),
    "recipe": (lambda: {"recipe": "tracrl"}, r"'tracrl' does not exist: did you mean 'tracerl'"),
    "recipe twice": (
        lambda: {"recipe": TraceRL(clip_low=0.3), "args": grpo(epsilon=0.1), "options": SMALL},
        r"recipe has clip_low=0\.3, and args says 0\.1: give it once",
    ),
    "steps": (lambda: {"args": grpo()}, r"has no number of denoising steps: give options="),
    "weights": (lambda: {"args": grpo(reward_weights=[1.0, 2.0]), "options": SMALL}, r"args\.reward_weights has 2"),
    "requires": (lambda: {"recipe": JustGRPO}, r"justgrpo needs sampler\.selector=left_most"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_names_the_argument_before_a_model_is_loaded(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("rl.models.load.load_policy", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    given, message = REFUSED[case]
    options = {**SMALL, "run.output_dir": str(tmp_path / "run"), "model.backbone": runs.QWEN3}
    arguments: dict[str, Any] = {"model": None, "reward_funcs": share_of_a, "args": options, "train_dataset": ROWS[:40]}
    arguments |= {"eval_dataset": ROWS[40:], "processing_class": tokenizer} | given()
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(**arguments)
    assert "\n" not in str(caught.value)


def test_cells_of_numpy_and_torch_are_numbers() -> None:
    """As a list of dicts out of pandas has them."""
    rows = [{"prompt": "ab:", "n": np.int64(3), "x": np.arange(2), "t": torch.tensor(0.5)}]
    assert json.loads(as_lines(rows, "train_dataset")) == {"prompt": "ab:", "n": 3, "x": [0, 1], "t": 0.5}


def test_chats_reach_a_function_as_trl_gives_them(tmp_path: Path, tokenizer: Any) -> None:
    seen: list[Any] = []

    def judge(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [1.0] * len(prompts)

    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    options = {**SMALL, "run.output_dir": str(tmp_path / "run"), "model.backbone": runs.QWEN3, "train.steps": 0}
    with_template = char_tokenizer(LETTERS + ":", ends=False)
    with_template.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    trainer = Trainer(None, judge, options, chat[:40], chat[40:], with_template, options={"sft.steps": 0})
    trainer.train()
    prompt, completion = seen[0]
    assert prompt == chat[40]["prompt"] and [turn["role"] for turn in completion] == ["assistant"]
    assert set(completion[0]["content"]) <= set(LETTERS + ":")


def test_our_chat_prompts_are_trls(tokenizer: Any) -> None:
    from trl.data_utils import maybe_apply_chat_template

    from rl.tasks.chat import chat_prompt

    tokenizer = char_tokenizer(LETTERS + ":", ends=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    asked = [{"role": "user", "content": "ab:"}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "b"}]):
        assert chat_prompt(tokenizer, messages) == maybe_apply_chat_template({"prompt": messages}, tokenizer)["prompt"]


def test_samples_and_their_log_probs(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    options = {"gen_length": 4, "num_inference_steps": 2}
    made = rl.sample(policy, ["ab:", [0, 1]], options, tokenizer=tokenizer, num_samples=2)
    assert [len(t.prompt_ids) for t in made] == [3, 3, 2, 2] and made[0].num_steps == 2
    scored = rl.logprobs(policy, made)
    for trajectory, logprob in zip(made, scored, strict=True):
        assert logprob.requires_grad
        torch.testing.assert_close(logprob.double(), torch.tensor(trajectory.logprob), rtol=1e-5, atol=1e-6)
    # The sample of a prompt is its own, whatever is sampled beside it; from a folder it is the same.
    save_policy(policy, tokenizer, tmp_path)
    (alone,) = rl.sample(str(tmp_path), ["ab:"], options)
    assert alone.response_ids().tolist() == made[0].response_ids().tolist()
    # One decision an answer, masked anew.
    assert [len(logprob) for logprob in rl.logprobs(policy, made, "diffu_grpo")] == [4] * 4
    with pytest.raises(ValueError, match="tokenizer is required"):
        rl.sample(policy, ["ab:"])


def test_scores_and_evaluations_of_single_calls(policy: Any, tokenizer: Any) -> None:
    assert rl.score("math_answer", ["1+1="] * 2, ["2", "3"], answer=["2", "2"]) == [1.0, 0.0]
    double = {"name": "math_answer", "weight": 2.0}
    assert rl.score([double, share_of_a], ["1+1="], ["2"], answer=["2"]) == [pytest.approx(2.01)]
    with pytest.raises(ValueError, match="answer has 1 entries and there are 2 prompts"):
        rl.score("math_answer", ["a", "b"], ["1", "2"], answer=["1"])
    metrics = rl.evaluate(policy, ROWS[:8], share_of_a, [2, 4], {"gen_length": 4}, processing_class=tokenizer)
    greedy = {"gen_length": 4, "num_inference_steps": 2, "temperature": 0.0}
    answers = rl.sample(policy, [row["prompt"] for row in ROWS[:8]], greedy, tokenizer=tokenizer)
    rewards = share_of_a([], tokenizer.batch_decode([t.response_ids() for t in answers], skip_special_tokens=True))
    assert metrics["eval_reward@2"] == pytest.approx(sum(rewards) / 8) and "eval_reward_low@4" in metrics


def boom(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [{}[completion] for completion in completions]


CALLS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "prompts": (lambda p, t: rl.sample(p, "ab:", tokenizer=t), "prompts is a text: give a list of them"),
    "prompt": (lambda p, t: rl.sample(p, [None], tokenizer=t), r"prompts\[0\] is a NoneType: give text, messages"),
    "id": (lambda p, t: rl.sample(p, [[0], [99]]), r"prompts\[1\] holds token id 99, the model has 9"),
    "samples": (lambda p, t: rl.sample(p, [[0]], num_samples=0), "num_samples is 0"),
    "decoder": (lambda p, t: rl.sample(p, [[0]], {"gen_lenght": 4}), r"'decoder\.gen_lenght': did you mean 'gen_len"),
    "preset": (lambda p, t: rl.sample(p, [[0]], "lladaa"), r"decoder\.preset 'lladaa' .* did you mean 'llada'"),
    "folder": (lambda p, t: rl.sample("no/such/one", [[0]]), "^model 'no/such/one' is not a folder"),
    "policy": (lambda p, t: rl.sample(torch.nn.Linear(2, 2), [[0]]), "model is a Linear: give a loaded policy"),
    "none": (lambda p, t: rl.logprobs(p, []), "trajectories is list or empty"),
    "modality": (lambda p, t: rl.logprobs(p, rl.sample(p, [[0]]), "ddpo"), "estimator 'ddpo' scores images"),
    "reward's key": (lambda p, t: rl.score({"name": "math_answer", "wieght": 2}, [], []), "did you mean 'weight'"),
    "completions": (lambda p, t: rl.score(boom, ["a"], "b"), "completions is a text"),
    "steps": (lambda p, t: rl.evaluate(p, ROWS, boom, [], processing_class=t), "num_inference_steps is empty"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_mistake_in_a_single_call_names_the_argument(policy: Any, tokenizer: Any, case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message) as caught:
        call(policy, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_reward_that_fails_in_a_single_call_says_where() -> None:
    line = boom.__code__.co_firstlineno + 1
    with pytest.warns(
        UserWarning, match=rf"'boom' failed on 1 of 1 .*: KeyError: 'b' \(test_trainer\.py, line {line}\)"
    ):
        assert rl.score(boom, ["a"], ["b"]) == [None]


def test_importing_rl_is_instant() -> None:
    """The names are there, and nothing is imported for them."""
    script = "import sys, rl; assert 'Trainer' in rl.__all__; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'Trainerr'"):
        rl.Trainerr  # noqa: B018


def test_the_example_trains_evaluates_and_saves(tmp_path: Path) -> None:
    small = ["sft.steps=3", "train.steps=2", "eval.num_prompts=8", "eval.viewer_items=1"]
    done = runs.execute([sys.executable, runs.ROOT / "docs/examples/trl_style.py", *small], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/trl_style/summary.json").read_text())
    assert summary["train_steps"] == 2 and "log-probs of the first answer" in done.stdout
    assert (tmp_path / "runs/trl_style/saved/README.md").is_file()

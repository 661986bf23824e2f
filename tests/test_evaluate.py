"""`denoise-rl eval` on tiny models: the simple form, generations kept, continued, judged again, and every refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from rewards.math_answer import final_answer
from rl.cli import main
from rl.evaluation.benchmark import EvalPlan, decoders
from rl.evaluation.command import eval_config
from rl.evaluation.generations import GenerationFolder
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rl.track.intervals import pass_at_k
from rollouts.samplers.options import SamplerOptions
from tests import runs

Run = Callable[..., tuple[int, str, str]]  # exit code, standard output, standard error
ROOT = Path(__file__).parents[1]
# Judges an untrained model's digits so that all three outcomes occur.
REWARD = """
import time
from rewards import Score

def odd_ones(prompts, completions, completion_ids, pause=0.0, **columns):
    time.sleep(pause)
    none = Score(None, reason="ids divide")
    return [float(c.count("1") % 2) if sum(ids) % 4 else none for c, ids in zip(completions, completion_ids)]

def even_ones(prompts, completions, **columns):
    return [Score(float(c.count("1") % 2 == 0), metrics={"ones": c.count("1")}) for c in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "01234=", 64)


def save_model(path: Path, alphabet: str, positions: int, **config: Any) -> str:
    tokenizer = char_tokenizer(alphabet)
    backbone = {"model_type": "gpt2", "n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_policy(load_policy(ModelConfig(backbone=backbone, **config), tokenizer, seed=0), tokenizer, path)
    return str(path)


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "digits.py").write_text(REWARD)
    return str(tmp_path / "digits.py")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["eval", *arguments])
        return code, *capsys.readouterr()

    return run


def options(model: str, reward: str, *more: str) -> list[str]:
    sizes = ["sampler.gen_length=16", "eval.num_prompts=6", "eval.num_inference_steps=[4]", "run.device=cpu"]
    return [f"model.path={model}", "--reward", f"{reward}:odd_ones", *sizes, *more]


# --- the simple form ----------------------------------------------------------------------------------------------

INTERVAL = r"(\d\.\d{3})  95% \[(\d\.\d{3}), (\d\.\d{3})\]"
LINE = re.compile(r"^ *(\d+) steps: " + INTERVAL + r"  n=(\d+)  unscored=(\d+)  tokens/forward=(\d+\.\d\d)$")


def test_the_simple_form_prints_its_table_and_writes_json(run: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "puzzles.csv").write_text("Puzzle,Solution\n" + "0310200404001043,4312213434211243\n" * 5)
    code, out, _ = run(
        *["--config", str(ROOT / "configs" / "quickstart.yaml"), f"model.path={model}", "run.device=cpu"],
        *["--data", str(tmp_path / "puzzles.csv"), "--output", str(tmp_path / "result.json")],
        "eval.num_inference_steps=[2, 16]",
    )
    lines = [match for match in map(LINE.match, out.splitlines()) if match]
    assert code == 0 and [match[1] for match in lines] == ["2", "16"]
    assert {(match[5], match[6]) for match in lines} == {("5", "0")}
    assert out.startswith("accuracy, judged by sudoku\n")
    saved = json.loads((tmp_path / "result.json").read_text())
    # Answers of this untrained model end at their first token, of 2 and of 16 forwards.
    assert [match[7] for match in lines] == [f"{saved['results'][s]['tokens_per_forward']:.2f}" for s in ("2", "16")]
    assert [match[7] for match in lines] == ["0.50", "0.06"]
    assert saved["results"]["2"]["num_prompts"] == 5 and saved["task"] == "sudoku"
    assert sorted(os.listdir(tmp_path)) == ["puzzles.csv", "result.json"]


# --- generations kept ---------------------------------------------------------------------------------------------


def test_every_decoder_step_count_and_sample_is_kept_with_its_figures(
    run: Run, model: str, reward: str, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    code, out, err = run(
        *options(model, reward, "eval.num_inference_steps=[4,8]", "sampler.threshold=0.01", "run.seed=3"),
        *["--decoding", "static,dynamic", "--samples", "3", "--temperature", "0.7", "--output", str(folder)],
    )
    assert code == 0, err
    settings = json.loads((folder / "settings.json").read_text())
    names = ["static@4", "static@8", "dynamic@4", "dynamic@8"]
    assert list(settings["decoders"]) == names
    assert (
        settings["decoders"]["dynamic@8"]
        == SamplerOptions(selector="dynamic", num_inference_steps=8, temperature=0.7, threshold=0.01).model_dump()
    )
    assert settings["template"]["name"] == "plain" and settings["seed"] == 3 and settings["samples"] == 3
    assert settings["model"]["path"] == model and settings["versions"]["torch"]
    assert settings["reward"] == {"name": f"{reward}:odd_ones", "params": {}}

    generations = GenerationFolder(folder).generations()
    assert [g.key for g in generations] == [(d, str(p), s) for d in names for p in range(6) for s in range(3)]
    assert len({g.seed for g in generations}) == 18  # the same draws for every decoder
    results = json.loads((folder / "results.json").read_text())["results"]
    # Which completions begin with a four is up to the weights; without any, nothing below says a word about them.
    assert any(g.reward is None for g in generations) and any(g.reward is not None for g in generations)
    for name in names:
        own = [g for g in generations if g.decoder == name]
        for g in own:
            judged_right = (float(g.completion.count("1") % 2), None)
            assert (g.reward, g.reason) == (judged_right if sum(g.completion_ids) % 4 else (None, "ids divide"))
        # A threshold that everything exceeds reveals all 16 tokens at once.
        assert {g.steps for g in own} == ({1} if name.startswith("dynamic") else {int(name[-1])})
        judged = [[g.reward for g in own if g.prompt_id == str(p) and g.reward is not None] for p in range(6)]
        shares = [sum(values) / len(values) for values in judged if values]
        assert results[name]["avg"] == pytest.approx(sum(shares) / len(shares))
        assert results[name]["unscored"] == sum(g.reward is None for g in own)
        pairs = [pass_at_k(len(values), int(sum(values)), 2) for values in judged if len(values) >= 2]
        assert results[name]["pass_at"]["2"][0] == pytest.approx(sum(pairs) / len(pairs))
        tokens, steps = sum(len(g.completion_ids) for g in own), sum(g.steps for g in own)
        assert results[name]["tokens_per_forward"] == pytest.approx(tokens / steps)
        unscored = results[name]["unscored"]
        assert (f"unscored, {name}: {unscored}x ids divide" in out) == (unscored > 0)
    assert "template plain (denoise-rl: 16 cells and =; plain), reward" in out
    assert re.search(r"^static@4 +3 +\d\.\d{3}  \[\d\.\d{3}, \d\.\d{3}\]", out, re.MULTILINE)


def test_one_greedy_sample_agrees_with_the_simple_form(run: Run, model: str, reward: str, tmp_path: Path) -> None:
    base = [f"model.path={model}", "eval.num_prompts=6", "eval.num_inference_steps=[16]", "run.device=cpu"]
    _, simple, _ = run(*base)
    run(*base, "--output", str(tmp_path / "kept"))
    (result,) = json.loads((tmp_path / "kept" / "results.json").read_text())["results"].values()
    (match,) = [match for match in map(LINE.match, simple.splitlines()) if match]
    assert (f"{result['avg']:.3f}", f"{result['low']:.3f}", f"{result['high']:.3f}") == match.group(2, 3, 4)
    assert (str(result["num_problems"]), str(result["unscored"])) == match.group(5, 6)
    assert f"{result['tokens_per_forward']:.2f}" == match[7]
    assert result["interval"] == "wilson"


def test_a_killed_run_continues_to_the_same_files(run: Run, model: str, reward: str, tmp_path: Path) -> None:
    small = options(model, reward, "rollout.max_batch_size=2", "eval.num_inference_steps=[2,4]")
    slow = [f"{{name: '{word}', params: {{pause: 0.02}}}}" if "odd_ones" in word else word for word in small]
    sampling = ["--samples", "12", "--temperature", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*slow, *sampling, "--output", str(whole))[0] == 0

    command = [sys.executable, "-m", "rl.cli", "eval", *slow, *sampling, "--output", str(killed)]
    file, errors = killed / "generations.jsonl", tmp_path / "errors"
    # The process group of this process, which other tests may have started, is not the child's.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in launcher}
    with (
        errors.open("w") as out_and_err,
        subprocess.Popen(command, cwd=ROOT, env=own, stdout=out_and_err, stderr=out_and_err) as process,
    ):
        try:
            while not (file.exists() and file.read_bytes().count(b"\n") >= 7):
                assert process.poll() is None, errors.read_text()
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
    before = file.read_bytes()
    assert before.count(b"\n") < 144
    file.write_bytes(before + b'{"decoder": "static@2", "prompt_')  # as if killed while writing

    code, out, err = run(*slow, *sampling, "--output", str(killed))
    assert code == 0, err
    kept = before.count(b"\n")
    assert f"static@2: {kept} completions are there already" in out
    assert file.read_bytes() == (whole / "generations.jsonl").read_bytes()
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))
    assert (killed / "settings.json").read_bytes() == (whole / "settings.json").read_bytes()
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    for result in results:
        for figures in result["results"].values():
            assert figures.pop("tokens_per_second") > 0
    assert results[0] == results[1]
    # A third call has nothing left to do.
    run(*slow, *sampling, "--output", str(killed))
    assert file.read_bytes() == (whole / "generations.jsonl").read_bytes()


def test_more_samples_are_added_and_other_settings_refused(run: Run, model: str, reward: str, tmp_path: Path) -> None:
    folder, fresh = str(tmp_path / "kept"), str(tmp_path / "fresh")
    base = options(model, reward)
    sampling = ["--temperature", "1", "--output"]
    assert run(*base, "--samples", "2", *sampling, folder)[0] == 0
    first = GenerationFolder(folder).generations()
    other_model = save_model(tmp_path / "other", "01234=", 32)
    for change, message in (
        (["run.seed=1"], "seed 0, now it is 1"),
        (["sampler.top_k=2"], "decoders.static@4.top_k 0, now it is 2"),
        (["sampler.gen_length=8"], "decoders.static@4.gen_length 16, now it is 8"),
        (["eval.num_prompts=5"], "data.num_problems 6, now it is 5"),
        ([f"model.path={other_model}"], "model.fingerprint "),
        (["--reward", f"{reward}:even_ones"], "reward.name "),
    ):
        code, _, err = run(*base, *change, "--samples", "2", *sampling, folder)
        assert code == 2 and f"{folder} was written with {message}" in err, err
        assert len(err.strip().splitlines()) == 1
    assert GenerationFolder(folder).generations() == first
    # Rank 0 alone reads the folder; no other rank is left waiting for it.
    done = runs.ranks(2, "-m", "rl.cli", "eval", *base, "run.seed=1", "--samples", "2", *sampling, folder)
    complaints = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(complaints) == 2, done.stderr
    assert [line.split(" was")[0] for line in complaints] == [f"denoise-rl: rank {r}: {folder}" for r in (0, 1)]

    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert run(*base, f"model.path={moved}", "--samples", "4", *sampling, folder)[0] == 0
    run(*base, "--samples", "4", *sampling, fresh)
    grown, at_once = GenerationFolder(folder).generations(), GenerationFolder(fresh).generations()
    assert grown[: len(first)] == first
    assert sorted(grown, key=lambda g: g.key) == sorted(at_once, key=lambda g: g.key)
    code, _, err = run(*base, "--samples", "3", *sampling, folder)
    assert code == 2 and "samples 4, now it is 3" in err


def test_rescoring_needs_no_model_and_changes_the_verdicts_alone(
    run: Run, model: str, reward: str, tmp_path: Path
) -> None:
    copy, folder = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(model, copy)
    run(*options(str(copy), reward), "--samples", "2", "--temperature", "1", "--output", str(folder))
    shutil.rmtree(copy)
    before = GenerationFolder(folder).generations()
    results = (folder / "results.json").read_bytes()
    code, out, err = run("--rescore", str(folder))
    assert code == 0, err
    assert GenerationFolder(folder).generations() == before
    assert (folder / "results.json").read_bytes() == results

    code, out, _ = run("--rescore", str(folder), "--reward", f"{reward}:even_ones")
    after = GenerationFolder(folder).generations()
    assert [g.reward for g in after] == [float(g.completion.count("1") % 2 == 0) for g in before]
    assert [g.completion_ids for g in after] == [g.completion_ids for g in before]
    assert "even_ones" in out and "0/12" in out and "unscored," not in out
    assert json.loads((folder / "settings.json").read_text())["reward"]["name"].endswith("even_ones")
    assert run("--rescore", str(tmp_path / "none"))[0] == 2
    code, _, err = run("--rescore", str(folder), "--samples", "3")
    assert code == 2 and "--samples has no meaning with --rescore" in err


# --- benchmarks ---------------------------------------------------------------------------------------------------


def test_a_benchmark_file_from_question_to_corrected_answer(run: Run, reward: str, tmp_path: Path) -> None:
    questions = ["1+1?", "2+2 and so on, a question far too long for this model?", "3?"]
    data = tmp_path / "gsm8k.jsonl"

    def write(answers: list[str]) -> None:
        rows = [{"question": q, "answer": f"think\n#### {a}"} for q, a in zip(questions, answers, strict=True)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(["77", "4", "88"])
    alphabet = "".join(sorted(set("".join(questions) + "Question:\nAnswer: 0123456789")))
    model = save_model(tmp_path / "model", alphabet, 40)
    folder = tmp_path / "kept"
    arguments = [f"model.path={model}", "sampler.gen_length=8", "eval.num_inference_steps=[4]", "run.device=cpu"]
    arguments += ["--output", str(folder), "--temperature", "1"]
    code, out, err = run(
        "--task", "gsm8k", "--data", str(data), *arguments, "--output", str(folder), "--temperature", "1"
    )
    assert code == 0, err
    generations = GenerationFolder(folder).generations()
    assert [g.prompt_id for g in generations] == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]
    long = generations[1]
    assert (long.reward, long.completion, long.steps) == (None, "", 0) and long.reason is not None
    assert long.reason.startswith("prompt too long: 72 tokens and sampler.gen_length 8 do not fit the model's 40")
    assert "unscored, static@4: 1x prompt too long" in out
    assert "template question_answer (lm-evaluation-harness gsm8k, zero-shot; plain), reward math_answer" in out

    # The references are put right: they are what the model says.
    said = [final_answer(g.completion.split("Question:")[0]) for g in generations]
    assert said[0] and said[2]
    write([text or "99" for text in said])
    code, out, _ = run("--rescore", str(folder), "--data", str(data))
    assert code == 0
    assert [g.reward for g in GenerationFolder(folder).generations()] == [1.0, None, 1.0]
    write(["1", "2", "3"])
    data.write_text(data.read_text().replace("1+1", "1+2"))
    code, _, err = run("--rescore", str(folder), "--data", str(data))
    assert code == 2 and "does not hold the problems that" in err


def test_code_benchmarks_run_their_tests(run: Run, shared_data: Path, tmp_path: Path) -> None:
    alphabet = "".join(map(chr, [9, 10, *range(32, 127)]))
    model = save_model(tmp_path / "model", alphabet, 1024)
    data = str(shared_data / "code" / "HumanEval.jsonl.gz")
    code, out, err = run(
        *["--task", "humaneval", "--data", data, "--limit", "2", "--export", "human-eval", "run.device=cpu"],
        *[f"model.path={model}", f"run.output_dir={tmp_path}", "sampler.gen_length=8", "eval.num_inference_steps=[4]"],
    )
    assert code == 0, err
    folder = tmp_path / "eval" / "humaneval"
    generations = GenerationFolder(folder).generations()
    assert [(g.prompt_id, g.reward, g.reason) for g in generations] == [
        ("HumanEval/0", 0.0, None),
        ("HumanEval/1", 0.0, None),
    ]
    assert "template completion (HumanEval (Chen et al. 2021); plain), reward code_tests" in out
    lines = (folder / "human-eval-static@4.jsonl").read_text().splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == ["HumanEval/0", "HumanEval/1"]


def test_forwards_are_counted_and_what_the_judge_reports_is_kept(run: Run, reward: str, tmp_path: Path) -> None:
    """Self-speculative decoding takes two forwards a round; a step of its trajectories is a token."""
    model = save_model(tmp_path / "blocks", "01234=", 64, attention="block_causal", block_length=4)
    code, _, err = run(
        *options(model, reward, "sampler.verify=true", "eval.num_inference_steps=[16]"),
        *["--reward", f"{reward}:even_ones", "--output", str(tmp_path / "kept")],
    )
    assert code == 0, err
    made = GenerationFolder(tmp_path / "kept").generations()
    assert all(g.steps % 2 == 0 for g in made) and any(len(g.completion_ids) % 2 for g in made)
    assert [g.metrics for g in made] == [{"ones": g.completion.count("1")} for g in made]
    figures = json.loads((tmp_path / "kept" / "results.json").read_text())["results"]["static@16"]
    assert figures["metrics"] == {"ones": fmean(g.metrics["ones"] for g in made)}
    assert figures["tokens_per_forward"] == sum(len(g.completion_ids) for g in made) / sum(g.steps for g in made)


def test_a_task_that_is_asked_as_a_chat_is_evaluated_as_one(run: Run, reward: str, tmp_path: Path) -> None:
    """Where no template is named, `task.chat` holds for an evaluation that keeps its generations too."""
    tokenizer = char_tokenizer("01234=")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ '0' if add_generation_prompt }}"
    backbone = {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_policy(load_policy(ModelConfig(backbone=backbone), tokenizer, seed=0), tokenizer, tmp_path / "model")
    own = "from rl.tasks.sudoku import SudokuTask\nfrom rl.tasks.templates import OWN\n\n\n"
    (tmp_path / "own.py").write_text(own + "class Own(SudokuTask):\n    templates = (OWN,)\n")
    task, asked = f"task.name={tmp_path / 'own.py'}:Own", {}
    for chat in ("true", "false"):
        folder = tmp_path / chat
        more = [task, f"task.chat={chat}"]
        code, _, err = run(*options(str(tmp_path / "model"), reward, *more), "--output", str(folder))
        assert code == 0, err
        assert json.loads((folder / "settings.json").read_text())["template"]["chat"] == (chat == "true")
        asked[chat] = [g.completion_ids for g in GenerationFolder(folder).generations()]
    assert asked["true"] != asked["false"]


def test_presets_are_decodings(run: Run, model: str, reward: str, tmp_path: Path) -> None:
    """Also several greedy samples, where the order is drawn; the config's own decoder goes by its preset's name."""
    arguments = options(model, reward, "eval.num_prompts=3", "sampler.preset=fast_dllm_factor")
    decoding = ["--decoding", "rcr,llada_random,dynamic", "--samples", "2", "--temperature", "0.7"]
    folder = tmp_path / "kept"
    code, _, err = run(*arguments, *decoding, "--output", str(folder))
    assert code == 0, err
    saved = json.loads((folder / "settings.json").read_text())["decoders"]
    steps = {"num_inference_steps": 4, "temperature": 0.7}
    assert saved == {
        "rcr@4": SamplerOptions(preset="rcr", **steps).model_dump(),
        "llada_random@4": SamplerOptions(preset="llada_random", **steps).model_dump(),
        "dynamic@4": SamplerOptions(selector="dynamic", factor=1.0, **steps).model_dump(),
    }
    code, _, err = run(*arguments, "--limit", "2", "--output", str(tmp_path / "own"))
    assert code == 0, err
    assert list(json.loads((tmp_path / "own" / "settings.json").read_text())["decoders"]) == ["fast_dllm_factor@4"]
    code, _, err = run(*arguments, "--decoding", "llada_random", "--samples", "2", "--output", str(tmp_path / "drawn"))
    assert code == 0, err
    code, _, err = run(*arguments, "--decoding", "llada", "--samples", "2", "--output", str(tmp_path / "same"))
    assert code == 2 and "greedy samples are all the same" in err


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gsm8k"], "dataset openai/gsm8k cannot be loaded from the hub"),
        (["--task", "gsm8k", "--data", "none.jsonl"], "data file none.jsonl does not exist"),
        (["--task", "sudokus"], "task.name 'sudokus' does not exist, did you mean 'sudoku'"),
        (["--decoding", "fast"], "--decoding 'fast' does not exist: choose from static, dynamic"),
        (["--samples", "4"], "--samples 4 needs --temperature above 0: greedy samples are all the same"),
        (["--samples", "0"], "--samples must lie in [1, 1024], got 0"),
        (["--samples", "2", "--temperature", "1", "--pass-k", "3"], "--pass-k must lie between 1 and --samples 2"),
        (["--samples", "2", "--temperature", "1", "--pass-k", "x"], "--pass-k 'x' must be whole numbers"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "2", "--output", "x.json"], "--output x.json must name a folder"),
        (["--export", "human-eval"], "--export human-eval is for the task humaneval, not for sudoku"),
        (["--export", "csv"], "--export 'csv' does not exist: choose from human-eval"),
        (["--template", "boxed"], "--template 'boxed' does not exist: this task has answer_tag, plain"),
    ],
)
def test_mistakes_cost_one_line(run: Run, model: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, _, err = run(f"model.path={model}", f"run.output_dir={tmp_path / 'run'}", "run.device=cpu", *arguments)
    lines = [line for line in err.strip().splitlines() if line.startswith("denoise-rl:")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "run").exists()


def test_another_task_does_not_inherit_the_configs_task_parameters(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: {name: sudoku, params: {min_givens: 5}}\n")
    same = eval_config(str(tmp_path / "c.yaml"), [], "sudoku")
    assert same.task.params == {"min_givens": 5}
    other = eval_config(str(tmp_path / "c.yaml"), ["task.params.release=release_v2"], "livecodebench")
    assert (other.task.name, other.task.params) == ("livecodebench", {"release": "release_v2"})


def test_the_trained_reward_does_not_judge(run: Run, model: str, reward: str, tmp_path: Path) -> None:
    trained = f"reward.functions=[{{name: '{reward}:odd_ones'}}]"
    sizes = ["eval.num_prompts=4", "eval.num_inference_steps=[16]", "run.device=cpu"]
    assert run(f"model.path={model}", trained, *sizes, "--output", str(tmp_path / "kept"))[0] == 0
    assert GenerationFolder(tmp_path / "kept").settings["reward"] == {"name": "sudoku", "params": {}}


def test_decoders_take_the_configs_sampler_where_none_is_named() -> None:
    sampler = SamplerOptions(selector="dynamic", threshold=0.8, top_k=3, block_length=4, gen_length=8)
    ((name, only),) = decoders(EvalPlan(), sampler, [4]).items()
    assert name == "dynamic@4" and only == sampler.model_copy(update={"temperature": 0.0})
    with pytest.raises(ValueError, match=r"num_inference_steps \(3\) must be a multiple of the 2 blocks"):
        decoders(EvalPlan(), sampler, [3])
    many = decoders(EvalPlan(samples=4), sampler.model_copy(update={"score": "random"}), [4])
    assert list(many) == ["dynamic@4"]  # a random order makes greedy samples differ

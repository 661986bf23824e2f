"""A user's mistake is one line that names the field and the fix, exit code 2, and leaves no run behind.

Most commands run in this process, because starting torch anew for each mistake would take minutes; that the real
command behaves the same is shown once for each way of calling it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rl.cli import main
from rl.config import load_config
from rl.tasks.load import load_task
from rollouts.trajectory import load_trajectories
from tests import runs

QUICK = ["--config", str(runs.ROOT / "configs" / "quickstart.yaml")]

# What can be found before anything is built: arguments after the quickstart's, and what the line must say.
# {name} stands for a path below the test's folder, see `files`.
TRAINING = {
    "unknown key": (["train.stepz=1"], "unknown config key 'train.stepz': did you mean 'steps'?"),
    "unknown section": (["trian.steps=1"], "unknown config key 'trian': did you mean 'train'?"),
    "unknown recipe option": (["algorithm.clip=1"], "unknown config key 'algorithm.clip': did you mean 'clip_low'?"),
    "missing key": (["goal={steps: 4}"], "config key 'goal.before_max' is required"),
    "missing key in a list": (["reward.functions=[{weight: 1}]"], "config key 'reward.functions.name' is required"),
    "wrong type": (["train.steps=many"], "config key 'train.steps'"),
    "no number": (
        ["reward.functions=[{name: sudoku, weight: .nan}]"],
        "functions.weight': Input should be a finite number",
    ),
    "infinite option of a recipe": (["algorithm.kl_coef=.inf"], "'algorithm.kl_coef': Input should be a finite number"),
    "infinite option of a sampler": (["sampler.temperature=.inf"], "'sampler.temperature': Input should be a finite"),
    "seed that others share": (["run.seed=4294967296"], "config key 'run.seed': Input should be less than 4294967296"),
    "override without value": (["--train.steps"], "override '--train.steps' has no value"),
    "override without key": (["nonsense"], "must have the form section.key=value"),
    "missing config file": (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
    "folder for a config file": (["--config", "{folder}"], "is a folder"),
    "broken YAML": (["--config", "{broken.yaml}"], "is not valid YAML"),
    "YAML that is a list": (["--config", "{list.yaml}"], "must hold a mapping of sections"),
    "prompt longer than the context": (["model.backbone.n_positions=20"], "does not fit the model's 20 positions"),
    "micro-batch that does not divide": (["train.micro_batch_size=100"], "train.micro_batch_size (100) must divide"),
    "updates that do not divide": (["train.updates_per_step=5"], "train.updates_per_step (5)"),
    "steps that do not divide": (
        ["sampler.block_length=4"],
        "has 2: sampler.num_inference_steps (2) must be a multiple",
    ),
    "no model folder": (["model.path={nowhere/model}"], "model.path"),
    "incomplete model folder": (["model.path={folder}"], "is incomplete: config.json is missing"),
    "model folder without weights": (["model.path={weightless}"], "is incomplete: it has no .safetensors weights"),
    "model folder with a broken config": (["model.path={damaged}"], "no tokenizer can be loaded from '{damaged}'"),
    "no model": (["model.backbone={}"], "model.backbone or model.path is required"),
    "no such reward": (["reward.functions=[{name: sudoko}]"], "unknown reward 'sudoko'; did you mean 'sudoku'?"),
    "no such reward file": (["reward.functions=[{name: 'no.py:f'}]"], "reward 'no.py:f': no file"),
    "no such reward parameter": (["reward.functions=[{name: sudoku, params: {a: 1}}]"], "has no parameter 'a'"),
    "empty dataset": (["task.name=jsonl", "task.params={train: {void.jsonl}}"], "{void.jsonl}"),
    "dataset of another folder": (["task.name=jsonl", "task.params={train: a.jsonl}"], "a.jsonl does not exist in /"),
    "missing dataset": (["task.name=jsonl", "task.params={train: {nowhere.jsonl}}"], "{nowhere.jsonl}"),
    "dataset that is no JSON": (["task.name=jsonl", "task.params={train: {broken.jsonl}}"], "{broken.jsonl}"),
    "dataset without the column": (["task.name=jsonl", "task.params={train: {rows.jsonl}}"], "has no column 'prompt'"),
    "no such task": (["task.name=sudko"], "did you mean 'sudoku'"),
    "no such task module": (["task.name=nowhere:Task"], "task.name 'nowhere:Task'"),
    "no such task parameter": (["task.params={givens: 3}"], "task.params has unknown key 'givens'"),
    "task parameter out of range": (["task.params={min_givens: 9, max_givens: 3}"], "min_givens <= max_givens"),
    "task parameter of a wrong type": (["task.params={min_givens: few}"], "task.params.min_givens: Input should be a"),
    "task parameter that YAML reads otherwise": (
        ["task.name=jsonl", "task.params={train: {rows.jsonl}, template: {question}}"],
        "task.params.template: Input should be a valid string, got {'question': None}",
    ),
    "template without its place": (
        ["task.name=jsonl", "task.params={train: {rows.jsonl}, template: hello}"],
        "task.params.template 'hello' has no {prompt}",
    ),
    "folder for a dataset": (["task.name=jsonl", "task.params={train: '{folder}'}"], "is a folder"),
    "no such recipe": (["algorithm.name=ppo"], "algorithm.name 'ppo' does not exist"),
    "GPU without one": (["run.device=cuda"], "run.device is cuda, but torch sees no GPU: set run.device to cpu"),
    "no such device": (["run.device=abacus"], "run.device"),
    "no such DeepSpeed file": (["train.deepspeed=nope.json"], "train.deepspeed file nope.json cannot be read"),
    "DeepSpeed file that is a list": (["train.deepspeed={list.json}"], "train.deepspeed file {list.json}"),
    "DeepSpeed stage": (["train.deepspeed={stage9.json}"], "stage 9 must be 0, 1, 2 or 3"),
    "greedy rollouts": (["sampler.temperature=0"], "greedy rollouts carry no gradient"),
    "goal that is not evaluated": (
        ["eval.num_inference_steps=[2, 8]"],
        "goal.steps 4 is not in eval.num_inference_steps",
    ),
}
# What only building it can tell.
BUILDING = {
    "no such backbone": (
        ["model.backbone={model_type: gpt9}"],
        "model.backbone.model_type 'gpt9' is unknown: did you mean",
    ),
    "backbone that does not divide": (["model.backbone.n_head=5"], "model.backbone: "),
    "block length missing": (["model.attention=block_causal"], "model.block_length must be set"),
    "service that is not installed": (["run.services=[wandb]"], "wandb is not installed"),
    "output below a file": (["run.output_dir={list.json}/run"], "run.output_dir '{list.json}/run'"),
}

Complaint = Callable[..., str]


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    for name, text in {
        "broken.yaml": "a: [1",
        "list.yaml": "- 1",
        "list.json": "[]",
        "stage9.json": '{"zero_optimization": {"stage": 9}}',
        "void.jsonl": "",
        "broken.jsonl": "{no",
        "rows.jsonl": '{"question": "1"}\n',
        "weightless/config.json": "{}",
        "damaged/config.json": "{",
        "damaged/model.safetensors": "",
        "folder/readme": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)


@pytest.fixture
def complaint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complaint:
    """complaint(words...) runs the command, which must fail, and returns its one line."""

    def run(*words: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main([fill(word, tmp_path) for word in words]) == code
        said = capsys.readouterr()
        assert said.err.startswith("denoise-rl: ")
        assert said.err.count("\n") == 1, said.err
        assert len(said.err) < 700, "nobody reads a line of that length"
        assert "Traceback" not in said.out + said.err
        return said.err

    return run


def fill(text: str, folder: Path) -> str:
    """Put the folder in front of every {name} whose name is a path of `files` or starts with nowhere."""
    for name in ("folder", "weightless", "damaged", "nowhere/model", "nowhere.jsonl", "nowhere.csv"):
        text = text.replace("{" + name + "}", str(folder / name))
    for path in folder.iterdir():
        text = text.replace("{" + path.name + "}", str(path))
    return text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model, trained by the `sft` command."""
    folder = tmp_path_factory.mktemp("model")
    assert main(["sft", *runs.tiny_config(folder)]) == 0
    return folder / "run" / "model"


@pytest.mark.parametrize("mistake", [*TRAINING, *BUILDING])
def test_training_refuses(mistake: str, tmp_path: Path, complaint: Complaint) -> None:
    words, message = (TRAINING | BUILDING)[mistake]
    run = tmp_path / "run"
    assert fill(message, tmp_path) in complaint("train", *QUICK, f"run.output_dir={run}", *words)
    assert not run.exists() or not list(run.glob("*"))


def test_the_real_command_refuses_too(tmp_path: Path) -> None:
    """As `denoise-rl`, as `python -m rl.cli` and as the script that launchers start."""
    run = tmp_path / "run"
    words = [*QUICK, f"run.output_dir={run}", "train.stepz=1"]
    script = Path(sys.executable).parent / "denoise-rl"
    for command in ([script, "train"], [sys.executable, "-m", "rl.cli", "train"], [sys.executable, "scripts/train.py"]):
        done = runs.execute([*command, *words])
        assert done.returncode == 2
        assert done.stderr == "denoise-rl: unknown config key 'train.stepz': did you mean 'steps'? (keys of train)\n"
        assert not done.stdout
    assert not run.exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, complaint: Complaint) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "sft", "time": 0}\n')
    for command in ("train", "sft"):
        line = complaint(command, *QUICK, f"run.output_dir={tmp_path}")
        assert "already holds a run: choose another folder, delete it, or set run.resume=true" in line
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_start_that_failed_does_not_block_the_next(tmp_path: Path, complaint: Complaint) -> None:
    """Rows without an answer show only when supervised training asks for one."""
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "12"}\n' * 8)
    arguments = runs.tiny_config(tmp_path / "here", "train.steps=0")
    task = f"task.params={{train: {rows}, heldout: {rows}}}"
    tokens = tmp_path / "model"
    assert main(["sft", *runs.tiny_config(tmp_path / "there")]) == 0
    shutil.move(tmp_path / "there" / "run" / "model", tokens)
    line = complaint("sft", *arguments, "task.name=jsonl", task, f"model.path={tokens}")
    assert "row 1 (and 7 other rows): it has no answer to imitate (task.params.answer_column)" in line
    assert not (tmp_path / "here" / "run" / "model").exists()
    assert main(["sft", *arguments]) == 0


def test_damaged_models_are_named(model: Path, tmp_path: Path, complaint: Complaint) -> None:
    def damage(name: str, change: Callable[[Path], object]) -> str:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        change(folder)
        line = complaint("eval", *QUICK, f"model.path={folder}")
        assert f"model.path '{folder}'" in line or str(folder) in line
        return line

    damage("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"))
    damage("broken", lambda folder: (folder / "config.json").write_text("{"))
    damage("tokenless", lambda folder: (folder / "tokenizer.json").unlink())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"a,b\n1,2\n", "a Sudoku file has a column Puzzle; this one has a, b"),
        (b"Puzzle\n", "at least one"),
        (b"Puzzle\n12\n", ": row 1: column Puzzle must be 16 digits 0 to 4, got '12'"),
        (bytes(range(256)), "puzzles.csv:2: not UTF-8"),
    ],
    ids=["missing", "other columns", "empty", "bad row", "binary"],
)
def test_eval_refuses_bad_data(
    model: Path, tmp_path: Path, complaint: Complaint, data: bytes | None, message: str
) -> None:
    path = tmp_path / "puzzles.csv"
    if data is not None:
        path.write_bytes(data)
    line = complaint("eval", *QUICK, f"model.path={model}", "--data", str(path), "--output", str(tmp_path / "x.json"))
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", *QUICK], "model.path is required"),
        (["eval", *QUICK, "model.path=m", "--output", "{nowhere/model}/x.json"], "does not exist, make it first"),
        (["rollout", *QUICK], "--output"),
        (["rollout", *QUICK, "--output", "{folder}"], "exists: name a new or empty folder"),
        (["rollout", *QUICK, "--output", "{nowhere/model}", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["sft", *QUICK, "sft.steps=0"], "sft.steps is 0"),
        (["report", "{nowhere/model}"], "is not a run folder"),
        (["report", "{folder}"], "is not a run folder"),
        (["plot", "{nowhere/model}"], "has no metrics.jsonl"),
        (["plot", "a", "--colour"], "--colour"),
        (["export", "{nowhere/model}", "out"], "holds no model and no complete checkpoint"),
        (["score", "{nowhere.jsonl}", "--reward", "sudoku"], "nowhere.jsonl"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[:1] + value[3:])[:40],
)
def test_other_commands_refuse(words: list[str], message: str, complaint: Complaint) -> None:
    assert message in complaint(*words)


@pytest.mark.parametrize("address", ["own_task:Task", "own_task.py:Task"])
def test_what_a_plugin_raises_is_one_line(tmp_path: Path, address: str) -> None:
    """`raise ValueError(...)` in a plugin is a message for its user; of anything else the line names the place."""
    for mistake, code in (("raise ValueError('own.option is 7: set it below 5')", 2), ("int('a')", 1)):
        (tmp_path / "own_task.py").write_text(
            "from rl.tasks.sudoku import SudokuTask\n"
            "class Task(SudokuTask):\n"
            "    def train_examples(self, seed, step, count):\n"
            "        if step:\n"
            f"            {mistake}\n"
            "        return super().train_examples(seed, step, count)\n"
        )
        words = ["train", *runs.tiny_config(tmp_path / f"run_{code}", f"task.name={address}")]
        done = runs.cli(*words, cwd=tmp_path, DENOISE_RL_TRACEBACK=str(int(code == 1 and address.endswith("y:Task"))))
        assert done.returncode == code
        assert not (tmp_path / f"run_{code}" / "run" / "model").exists()
        last = done.stderr.splitlines()[-1]
        if code == 2:
            assert last == "denoise-rl: own.option is 7: set it below 5"
        else:
            place = (
                "own_task.py, line 5, in Task.train_examples: ValueError: invalid literal for int() with base 10: 'a'"
            )
            assert last == f"denoise-rl: {place} (DENOISE_RL_TRACEBACK=1 shows the traceback)"
        assert ("Traceback" in done.stderr) == (code == 1 and address.endswith("y:Task"))


@pytest.mark.parametrize(
    "option", ["algorithm.name={}", "task.name={}", "model.family={}", "reward.functions=[{{name: '{}'}}]"]
)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("x = {}\ny = x['a']", "KeyError: 'a' ({}, line 2)"),
        ("exit(3)", "SystemExit: 3 ({}, line 1)"),
    ],
)
@pytest.mark.parametrize("file", ["py", "module"])
def test_a_plugin_that_cannot_be_imported_is_one_line(
    option: str, text: str, says: str, file: str, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"bad{abs(hash((option, text, file)))}"
    Path(f"{name}.py").write_text(text)
    line = complaint("check", *QUICK, option.format(f"{name}.py:Thing" if file == "py" else f"{name}:Thing"))
    assert f"{name}" in line and "cannot import" in line and says.format(f"{name}.py") in line


RECIPE_FAULTS = {
    "advantage of one": (
        "def advantage(self, v): return v.reward[:1]",
        "advantage() gave a tensor [1], not a tensor [M]",
    ),
    "no advantage": ("def advantage(self, v): pass", "advantage() gave a NoneType, not a tensor [M] or [M, T]"),
    "mean loss": (
        "def loss(self, b): return LossOutput((b.advantage * b.logprob).mean(), {})",
        "loss() gave a loss that is a tensor [], not a tensor [",
    ),
    "bare loss": ("def loss(self, b): return b.logprob", "], not a rl.batch.LossOutput(loss, metrics)"),
    "detached loss": (
        "def loss(self, b): return LossOutput(b.logprob.detach(), {})",
        "loss() gave a loss without gradient",
    ),
    "metric": (
        "def loss(self, b): return LossOutput(-b.logprob, {'m': 1.0})",
        "a metric 'm' that is a float, not a tensor",
    ),
    "no rows": ("def rows(self, *a, **k): pass", "rows() gave a NoneType, not rows"),
    "rows not written": ("rows = Recipe.rows", "has no rows()"),
    "wrong requirement": (
        "def requires(self, c): return {'sampler.gen_lenght': 3}",
        "requires sampler.gen_lenght, which is no",
    ),
    "constructor": ("def __init__(self): pass", "X.__init__() got an unexpected keyword argument"),
}


@pytest.mark.parametrize("fault", RECIPE_FAULTS)
def test_what_a_recipe_of_ones_own_returns_is_checked(fault: str, tmp_path: Path, complaint: Complaint) -> None:
    body, says = RECIPE_FAULTS[fault]
    imports = [("rl.batch", "LossOutput"), ("rl.recipes.base", "Recipe"), ("rl.recipes.traced", "TracedRecipe")]
    head = "".join(f"from {module} import {name}\n" for module, name in imports)
    (tmp_path / "own.py").write_text(f"{head}class X(TracedRecipe):\n    {body}\n")
    small = ["sft.steps=0", "train.steps=1", "eval.num_prompts=1", "eval.viewer_items=0", "algorithm={}"]
    words = runs.tiny_config(tmp_path, *small, f"algorithm.name={tmp_path / 'own.py'}:X")
    assert says in complaint("train", *words)


def test_a_recipe_is_a_class_of_the_right_kind(tmp_path: Path, complaint: Complaint) -> None:
    (tmp_path / "own.py").write_text("def f(batch):\n    pass\nclass C:\n    pass\n")
    for name, kind in (("f", "function"), ("C", "type")):
        line = complaint("check", *QUICK, f"algorithm.name={tmp_path / 'own.py'}:{name}")
        assert f":{name}' is a {kind}: derive a class from rl.recipes.base.Recipe" in line


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path: Path, model: Path, complaint: Complaint) -> None:
    words = ["rollout", *QUICK, f"model.path={model}", "--num-prompts", "1", "--output", "{list.json}/rollouts"]
    assert "Not a directory" in complaint(*words, code=1)


def test_dashed_overrides_are_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`a.b=c`, `--a.b=c` and `--a.b c` mean the same, the last one wins, and a dry run writes nothing."""
    for words in (
        ["train.steps=7"],
        ["--train.steps=7"],
        ["--train.steps", "7"],
        ["train.steps=3", "--train.steps", "7"],
    ):
        assert main(["train", *QUICK, "--dry-run", f"run.output_dir={tmp_path / 'run'}", *words]) == 0
        assert "rl: 7 steps of 32 prompts x 8 rollouts = 256 trajectories per step" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["align", "--seeds", "0", "1", "train.stepz=1"], "unknown config key 'train.stepz'"),
        (["compare", "--seeds", "0", "train.stepz=1", "--recipes", "wd1", "--output", "x"], "config key 'train.stepz'"),
        (["compare", "--recipes", "wd1", "train.stepz=1", "--output", "x"], "unknown config key 'train.stepz'"),
        (["compare", "--output", "x", "--seeds", "0", "goal={}"], "'goal={}' is no whole number (an override of"),
        (["compare", "--output", "x", "--seeds", "0.5"], "'0.5' is no whole number"),
        (["compare", "--output", "x", "--recipes", "wd1", "--seeds", "0", "0"], "--seeds 0 0: a seed is there twice"),
        (["compare", "--output", "x", "--recipes", "wd1", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_overrides_may_follow_an_option_of_several_values(words: list[str], message: str, complaint: Complaint) -> None:
    assert message in complaint(words[0], *QUICK, *words[1:])


def test_check_says_that_a_config_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *QUICK]) == 0
    assert capsys.readouterr().out.endswith("config ok\n")


def test_rollouts_can_be_saved_and_read(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rollouts"
    arguments = ["rollout", *QUICK, f"model.path={model}", "--num-prompts", "2", "--group-size", "3"]
    assert main([*arguments, "--output", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    trajectories = load_trajectories(out / "trajectories.npz")
    assert len(lines) == len(trajectories) == 6
    assert len({line["prompt"] for line in lines}) == 2
    assert all(line["reward"] in (0.0, 1.0) for line in lines)


def test_rollouts_of_training_prompts_and_of_what_is_good_enough(
    model: Path, tmp_path: Path, complaint: Complaint
) -> None:
    out, reward = tmp_path / "rollouts", tmp_path / "reward.py"
    reward.write_text("def first(prompts, completions, **_):\n    return [float(c[:1] in '12') for c in completions]\n")
    arguments = ["rollout", *QUICK, f"model.path={model}", "--num-prompts", "8", "--train"]
    arguments.append(f"reward.functions=[{{name: '{reward}:first'}}]")
    assert main([*arguments, "--output", str(tmp_path / "all")]) == 0
    assert main([*arguments, "--min-reward", "1", "--output", str(out)]) == 0
    every, lines = (
        [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "all", out)
    )
    config = load_config(QUICK[1], [])
    asked = load_task(config.task.name, config.task.params).train_examples(config.run.seed, 0, 8)
    assert [line["prompt"] for line in every] == [row["prompt"] for row in asked]
    # Lines and trajectories stay beside each other.
    assert lines == [line for line in every if line["reward"] == 1] and 0 < len(lines) < 8
    kept = load_trajectories(out / "trajectories.npz")
    prompts = [list(t.prompt_ids) for t in load_trajectories(tmp_path / "all" / "trajectories.npz")]
    assert [list(t.prompt_ids) for t in kept] == [
        p for p, line in zip(prompts, every, strict=True) if line["reward"] == 1
    ]
    assert "no rollout has it" in complaint(*arguments, "--min-reward", "2", "--output", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_score_and_new_reward_work_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-reward", str(tmp_path / "ends_right")]) == 0
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "2+2", "completion": "it is 4", "answer": "4"}) + "\n")
    assert main(["score", str(samples), "--reward", f"{tmp_path / 'ends_right.py'}:ends_right"]) == 0
    said = capsys.readouterr().out
    assert "1 completions, 1 scored" in said
    assert "mean 1.0000" in said


def test_options_are_listed_with_their_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--options"]) == 0
    said = capsys.readouterr().out
    assert "train.prompts_per_step" in said
    assert "Prompts per RL step over all ranks." in said

"""Rewards of other frameworks run unchanged, and ours run unchanged in TRL's GRPOTrainer, with the real classes."""

import json
import pickle
import textwrap

import pytest

from rewards import RewardPart, RewardRunner, load_reward
from rewards.adapters import as_trl_reward

# The shapes of reward functions in TRL's documentation: extra columns, None, async, callable class, log hooks.
TRL_STYLE = """
import asyncio
import re

def columns_and_none(completions, task, ground_truth, **kwargs):
    rewards = []
    for completion, kind, truth in zip(completions, task, ground_truth):
        rewards.append(1.0 if kind == "math" and truth in completion else 0.0 if kind == "math" else None)
    return rewards

def conversational(prompts, completions, **kwargs):
    return [1.0 if re.match(r"^<think>", completion[0]["content"]) else 0.0 for completion in completions]

async def remote(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

def by_length(completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]

def curious(completions, trainer_state=None, log_extra=None, log_metric=None, **kwargs):
    log_extra("first_letter", [text[:1] for text in completions])
    log_metric("mean_length", sum(map(len, completions)) / len(completions))
    return [float(trainer_state.global_step if trainer_state else 0)] * len(completions)
"""

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    if data_source == "broken":
        raise ValueError("no such source")
    right = solution_str.strip() == ground_truth
    return {"score": float(right) + bonus, "acc": right, "index": (extra_info or {}).get("index", -1), "note": "text"}

def plain(data_source, solution_str, ground_truth, extra_info):
    return solution_str == ground_truth

async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "boom":
        raise RuntimeError("judge down")
    return 0.5
"""


@pytest.fixture
def trl_style(tmp_path):
    path = tmp_path / "trl_style.py"
    path.write_text(textwrap.dedent(TRL_STYLE))
    return path


@pytest.fixture
def verl_file(tmp_path):
    path = tmp_path / "verl_reward.py"
    path.write_text(textwrap.dedent(VERL))
    return path


def score(spec, completions, columns, mode="inline", **params):
    with RewardRunner([RewardPart(spec, params=params, label="it")], mode=mode, max_failure_share=1.0) as runner:
        return runner.score(["2 + 2?"] * len(completions), completions, columns)


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_trl_style_functions_run_unchanged(trl_style, mode):
    columns = {"task": ["math", "math", "code"], "ground_truth": ["4", "5", "x"], "completion_ids": [[1] * 5, [1], []]}
    texts = ["it is 4", "it is 4", "print"]
    assert score(f"{trl_style}:columns_and_none", texts, columns, mode).values == [1.0, 0.0, None]
    assert score(f"{trl_style}:remote", texts, columns, mode).values == [7.0, 7.0, 5.0]
    assert score(f"{trl_style}:by_length", texts, columns, mode).values == [0.5, 0.1, 0.0]
    chats = [[{"role": "assistant", "content": "<think>a"}], [{"role": "assistant", "content": "a"}]]
    assert score(f"{trl_style}:conversational", chats, {}, mode).values == [1.0, 0.0]
    table = score(f"{trl_style}:curious", ["ab", "c"], {}, mode)
    assert table.extra == {"first_letter": ["a", "c"]}
    assert table.metrics["reward/it/mean_length"] == 1.5


def test_trls_own_rewards_by_name():
    pytest.importorskip("trl.rewards")
    texts = [r"so \boxed{\frac{1}{3}}", r"so \boxed{\frac{1}{2}}"]
    assert score("trl:accuracy_reward", texts, {"solution": [r"\frac{1}{3}"] * 2}).values == [1.0, 0.0]
    assert score("trl:accuracy_reward", texts[:1], {"solution": [""]}).values == [None]  # unparsable: not applicable
    thoughts = ["<think>\nhm\n</think>\n4", "4"]
    assert score("trl:think_format_reward", thoughts, {}).values == [1.0, 0.0]
    lengths = {"completion_ids": [[0] * 90, [0] * 80]}
    table = score(
        "trl:get_soft_overlong_punishment()", ["a", "b"], lengths, max_completion_len=100, soft_punish_cache=20
    )
    assert table.values == [-0.5, 0.0]


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_verl_compute_score_runs_unchanged(verl_file, mode):
    columns = {
        "data_source": ["gsm8k", "gsm8k", "broken"],
        "reward_model": [{"style": "rule", "ground_truth": "4"}] * 3,
        "extra_info": [{"index": 7}, None, None],
    }
    table = score(f"verl:{verl_file}:compute_score", ["4", "5", "4"], columns, mode, bonus=0.25)
    assert table.values == [1.25, 0.25, None]
    first, _, broken = table.parts["it"]
    assert first.metrics == {"acc": 1.0, "index": 7.0}
    assert broken.reason == "ValueError: no such source"
    assert score(f"verl:{verl_file}:plain", ["4", "5"], {"ground_truth": ["4", "4"]}, mode).values == [1.0, 0.0]
    asynchronous = score(f"verl:{verl_file}:compute_score_async", ["a", "boom"], {"ground_truth": ["", ""]}, mode)
    assert asynchronous.values == [0.5, None]


VERL_PACKAGE = {
    "verl/__init__.py": "raise RuntimeError('the package around a file is not run')",
    "verl/utils/__init__.py": "raise RuntimeError('nor this one')",
    "verl/utils/words.py": "RIGHT = 'right'",
    "verl/utils/score/__init__.py": "raise RuntimeError('nor this one')",
    "verl/utils/score/helper.py": "from ..words import RIGHT\nSAME = lambda a, b: a.strip() == b",
    "verl/utils/score/gsm.py": """
from .helper import RIGHT, SAME
def compute_score(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    return score if SAME(solution_str, ground_truth) else format_score
""",
    "verl/utils/score/dapo.py": """
from .helper import SAME
def compute_score(solution_str, ground_truth, strict_box_verify=False, pause_tokens_index=None):
    right = SAME(solution_str, ground_truth)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str}
""",
    "verl/utils/score/prime/__init__.py": """
from . import norm
def compute_score(model_output, ground_truth=None, **kwargs):
    return float(norm.CUT(kwargs["solution_str"]) == ground_truth)
""",
    "verl/utils/score/prime/norm.py": "CUT = str.strip",
    "verl/utils/score/batch.py": """
async def compute_score(data_sources, solution_strs, ground_truths, extra_infos, bonus=0.0):
    assert data_sources == ["gsm8k"] * len(solution_strs) and all("num_turns" in info for info in extra_infos)
    return [float(text == truth) + bonus for text, truth in zip(solution_strs, ground_truths, strict=True)]
""",
    "plain/judge.py": """
from .beside import CUT
class Judge:
    def __init__(self, scale=1.0):
        self.scale = scale
    async def __call__(self, solution_str, ground_truth, extra_info):
        info = [extra_info[name] for name in ("index", "num_turns", "rollout_reward_scores")]
        assert info[1:] == [None, {}], info
        return self.scale * (CUT(solution_str) == ground_truth)
""",
    "plain/beside.py": "CUT = str.strip",
}


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_files_of_verls_own_shapes_run_unchanged(tmp_path, mode):
    """No `data_source` in the signature, relative imports, an async object, `**kwargs`, the batch form."""
    for name, text in VERL_PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = tmp_path / "verl" / "utils" / "score"
    truth = {"data_source": ["gsm8k"] * 2, "reward_model": [{"ground_truth": "4"}] * 2}
    texts = ["4", "5"]
    assert score(f"verl:{folder}/gsm.py:compute_score", texts, truth, mode, format_score=0.1).values == [1.0, 0.1]
    table = score(f"verl:{folder}/dapo.py:compute_score", texts, truth, mode)
    assert table.values == [1.0, -1.0]
    assert [part.metrics for part in table.parts["it"]] == [{"acc": 1.0}, {"acc": 0.0}]
    prime = score(f"verl:{folder}/prime/__init__.py:compute_score", texts, truth, mode, model_output="")
    assert prime.values == [1.0, 0.0]
    assert score(f"verl:{folder}/batch.py:compute_score", texts, truth, mode, bonus=0.5).values == [1.5, 0.5]
    infos = {"extra_info": ['{"index": 7}', {"index": 8}]}  # as text from a CSV file, as a dict from parquet
    judge = f"verl:{tmp_path}/plain/judge.py:Judge"
    assert score(judge, texts, truth | infos, mode, scale=2.0).values == [2.0, 0.0]


def test_verl_extra_info_is_a_dict_of_its_own(tmp_path):
    """verl hands over `{}` where there is none; one call must not see what another wrote."""
    path = tmp_path / "writes.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    extra_info['seen'] = extra_info.get('seen', 0) + 1\n"
        "    return float(extra_info['seen'])\n"
    )
    row = {"index": 1}
    columns = {"ground_truth": ["", ""], "extra_info": [row, row]}
    assert score(f"verl:{path}:compute_score", ["a", "b"], columns).values == [1.0, 1.0]
    assert score(f"verl:{path}:compute_score", ["a", "b"], {"ground_truth": ["", ""]}).values == [1.0, 1.0]
    assert row == {"index": 1}


VERIFIERS = """
class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"].strip()

async def exact(completion, answer, parser, **kwargs):
    assert kwargs["prompt"][0]["role"] == "user" and kwargs["state"]["answer"] == answer
    return float(parser.parse_answer(completion) == answer)

def short(completion, info):
    return float(len(completion[-1]["content"]) <= info["limit"])

def broken(state):
    raise KeyError(state["task"])

class Rubric:  # the shape of verifiers.Rubric
    def __init__(self, funcs, weights):
        self.funcs, self.weights, self.parser = funcs, weights, Parser()
        self.class_objects = {"parser": self.parser}

class RubricGroup(Rubric):
    def __init__(self, rubrics):
        super().__init__([], [])
        self.rubrics = rubrics

class Environment:
    def __init__(self, rubric):
        self.rubric = rubric

RUBRIC = Rubric([exact, short], [1.0, 0.5])

def load_environment(bonus=0.5):
    return Environment(RubricGroup([Rubric([exact], [1.0]), Rubric([short], [bonus])]))

def compare(completions, states):
    return [0.0] * len(states)

GROUPED = Rubric([exact, compare], [1.0, 1.0])
NOTHING = Rubric([], [])
"""


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_verifiers_functions_rubrics_and_environments(tmp_path, mode):
    path = tmp_path / "vf_env.py"
    path.write_text(VERIFIERS)
    columns = {"answer": ["4", "4", "4"], "info": [{"limit": 3}, '{"limit": 3}', {"limit": 3}], "task": ["sum"] * 3}
    texts = ["4", "5", "well, 4"]
    table = score(f"verifiers:{path}:RUBRIC", texts, columns, mode)
    assert table.values == [1.5, 0.5, 0.0]
    assert table.parts["it"][1].metrics == {"exact": 0.0, "short": 1.0}
    assert score(f"verifiers:{path}:load_environment", texts, columns, mode, bonus=2.0).values == [3.0, 2.0, 0.0]
    assert score(f"verifiers:{path}:short", texts, columns, mode).values == [1.0, 1.0, 0.0]
    failed = score(f"verifiers:{path}:broken", texts, columns, mode)
    assert failed.values == [None] * 3
    assert failed.parts["it"][0].reason == "KeyError: 'sum'"
    with pytest.raises(ValueError, match="compare asks for `completions`, so it compares a group"):
        load_reward(f"verifiers:{path}:GROUPED")
    with pytest.raises(ValueError, match="Rubric is no function and has no reward functions"):
        load_reward(f"verifiers:{path}:NOTHING")


def test_the_real_verifiers_rubric(tmp_path):
    verifiers = pytest.importorskip("verifiers")
    if not hasattr(verifiers, "Rubric"):
        pytest.skip("this release of verifiers has no Rubric")
    path = tmp_path / "vf_real.py"
    path.write_text(
        "import verifiers as vf\n"
        "parser = vf.XMLParser(['think', 'answer'], answer_field='answer')\n"
        "def right(completion, answer, parser):\n"
        "    return 1.0 if parser.parse_answer(completion) == answer else 0.0\n"
        "RUBRIC = vf.Rubric(funcs=[right, parser.get_format_reward_func()], weights=[1.0, 0.25], parser=parser)\n"
    )
    texts = ["<think>\nhm\n</think>\n<answer>\n4\n</answer>", "4"]
    values = score(f"verifiers:{path}:RUBRIC", texts, {"answer": ["4", "4"]}).values
    assert values[0] == pytest.approx(1.25)
    assert values[1] < 0.25


CHATS = """
def turns(prompts, completions, **columns):
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return [float(len(prompt)) for prompt in prompts]

def words(prompts, completions, **columns):
    return [float(len(completion.split())) for completion in completions]
"""


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_a_chat_reaches_rewards_as_trl_gives_it(tmp_path, mode):
    """Prompt and completion are messages; text stays text; `trl:` makes messages of text too."""
    path = tmp_path / "chats.py"
    path.write_text(CHATS)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    for spec, answer in ((f"{path}:turns", 2.0), (f"trl:{path}:turns", 2.0), ("math_answer", 1.0)):
        with RewardRunner([RewardPart(spec)], mode=mode) as runner:
            assert runner.score([chat], ["it is 4"], {"answer": ["4"]}).values == [answer]
    with RewardRunner([RewardPart(f"trl:{path}:turns")], mode=mode) as runner:
        assert runner.score(["2 + 2?"], ["it is 4"]).values == [1.0]
    for spec, prompt, hint in (
        (f"{path}:turns", "2 + 2?", "(it reads chats, the data is text: name it trl:FILE.py:FUNCTION"),
        (f"{path}:words", chat, "(the prompts are chats, so completions are too: rewards.text.text_of(completion)"),
    ):
        with RewardRunner([RewardPart(spec, label="it")], mode=mode, max_failure_share=1.0) as runner:
            assert hint in runner.score([prompt], ["it is 4"]).parts["it"][0].reason


def test_verl_mistakes(verl_file):
    with pytest.raises(ValueError, match="no parameter 'bonos'; did you mean 'bonus'"):
        load_reward(f"verl:{verl_file}:compute_score", {"bonos": 1})
    reward = load_reward(f"verl:{verl_file}:compute_score")
    with pytest.raises(ValueError, match="needs the column `ground_truth`"):
        reward(prompts=["p"], completions=["c"])


def test_as_trl_reward_logs_metrics_and_pickles():
    logged = {}
    reward = as_trl_reward(load_reward("sudoku"))
    assert reward.__name__ == "sudoku"
    answer = pickle.loads(pickle.dumps(reward))(
        prompts=["1" + "0" * 15, "not a puzzle"],
        completions=["1234341221434321"] * 2,
        log_metric=logged.__setitem__,
    )
    assert answer == [1.0, None]
    assert logged == {"sudoku/givens_kept": 1.0, "sudoku/units_right": 1.0, "sudoku/failures": 1.0}


def build_tokenizer(folder):
    """A word tokenizer of digits, enough for a tiny policy; saved as a real tokenizer is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *"0123456789="]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


# TRL and torch warn about CPU runs and about their own future; nothing of it concerns rewards.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_ours_run_unchanged_in_trls_grpo_trainer(tmp_path):
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    puzzles = ["1200340000000000", "0000000012003400"] * 2
    data = Dataset.from_dict({"prompt": [f"{puzzle}=" for puzzle in puzzles], "puzzle": puzzles, "answer": ["4"] * 4})
    seen = []

    def spy(prompts, completions, **columns):
        seen.append((columns["completion_ids"], sorted(columns)))
        return load_reward("sudoku")(prompts=prompts, completions=completions, **columns)

    rewards = [
        load_reward("sudoku"),  # returns Score objects
        load_reward("overlong", {"max_length": 8, "cache_length": 4}),  # returns floats, with bound parameters
        load_reward("math_answer"),
        as_trl_reward(load_reward("sudoku")),
        spy,
    ]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=rewards, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()

    assert seen
    assert {"puzzle", "answer", "completion_ids", "trainer_state"} <= set(seen[0][1])
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for entry, (ids, _) in zip(logs, seen, strict=True):
        by_hand = [-max(0.0, (len(item) - 4) / 4) for item in ids]
        assert entry["rewards/overlong/mean"] == pytest.approx(sum(by_hand) / 4)
        assert entry["rewards/sudoku/mean"] == 0.0  # eight random characters are no grid, and not NaN either
        assert 0.0 <= entry["rewards/math_answer/mean"] <= 1.0
        assert entry["sudoku/failures"] == 0.0
    assert json.dumps(logs)

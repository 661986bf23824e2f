"""Finding rewards by name, binding parameters, and what a user's mistake says."""

import importlib
import pickle
import sys
import textwrap

import pytest

from rewards import load_reward
from rewards.load import NAMES

PLUGIN = """
from helper_beside_the_file import FACTOR

def scaled(prompts, completions, scale=1.0, **columns):
    return [FACTOR * scale * len(text) for text in completions]

class Counter:
    def __init__(self, start):
        self.count = start

    def __call__(self, prompts, completions, **columns):
        self.count += 1
        return [self.count] * len(completions)

def make(offset):
    def reward(prompts, completions, **columns):
        return [offset] * len(completions)
    return reward

def narrow(prompts, completions):
    return [0.0] * len(completions)

CONSTANT = 3
"""


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "helper_beside_the_file.py").write_text("FACTOR = 10\n")
    path = tmp_path / "my_rewards.py"
    path.write_text(textwrap.dedent(PLUGIN))
    before = list(sys.path)
    yield path
    sys.path[:] = before
    for name in ("helper_beside_the_file", *[name for name in sys.modules if name.startswith("denoise_rl_file_")]):
        sys.modules.pop(name, None)


def call(reward, completions, **columns):
    return list(reward(prompts=["p"] * len(completions), completions=completions, **columns))


def test_file_function_with_and_without_parameters(plugin):
    assert call(load_reward(f"{plugin}:scaled"), ["ab"]) == [20.0]
    assert call(load_reward(f"{plugin}:scaled", {"scale": 0.5}), ["ab"], answer=["x"]) == [10.0]


def test_class_is_constructed_once(plugin):
    reward = load_reward(f"{plugin}:Counter", {"start": 5})
    assert [call(reward, ["a"]), call(reward, ["a"])] == [[6], [7]]


def test_name_with_brackets_is_a_factory(plugin):
    assert call(load_reward(f"{plugin}:make()", {"offset": 4}), ["a", "b"]) == [4, 4]


def test_importable_module_and_working_folder(tmp_path, monkeypatch):
    (tmp_path / "reward_in_working_folder.py").write_text("def r(prompts, completions, **columns):\n    return [2]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert call(load_reward("reward_in_working_folder:r"), ["a"]) == [2]
    assert load_reward("rewards.sudoku:sudoku") is load_reward("sudoku")


def test_entry_point_of_an_installed_distribution(tmp_path, monkeypatch):
    info = tmp_path / "their_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[denoise_rl.rewards]\npoliteness = their_rewards:polite\n")
    (tmp_path / "their_rewards.py").write_text("def polite(prompts, completions, **columns):\n    return [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert call(load_reward("politeness"), ["please"]) == [1]
    with pytest.raises(ValueError, match="did you mean 'politeness'"):
        load_reward("politenes")


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ("sudoko", {}, "unknown reward 'sudoko'; did you mean 'sudoku'?"),
        ("math", {}, "did you mean 'math_answer'?"),
        ("no_such_module:f", {}, "cannot import 'no_such_module'"),
        ("rewards.sudoku:sudoko", {}, "did you mean 'sudoku'?"),
        ("missing.py:f", {}, "no file"),
        ("math_answer", {"anchr": "boxed"}, "no parameter 'anchr'; did you mean 'anchor'?"),
        ("format", {"patern": "x"}, "no parameter 'patern'; did you mean 'pattern'?"),
        ("reward_model", {}, "needs the parameter 'model'"),
        ("reasoning_gym:countdwn", {}, "did you mean 'countdown'?"),
        ("trl:acuracy_reward", {}, "did you mean 'accuracy_reward'?"),
    ],
)
def test_mistakes_are_one_line_with_the_fix(spec, params, message):
    with pytest.raises(ValueError) as caught:
        load_reward(spec, params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_plugin(plugin):
    with pytest.raises(ValueError, match=r"add \*\*columns"):
        load_reward(f"{plugin}:narrow")
    with pytest.raises(ValueError, match="is a int, not something that can be called"):
        load_reward(f"{plugin}:CONSTANT")
    with pytest.raises(ValueError, match="did you mean 'scaled'"):
        load_reward(f"{plugin}:scald")


def test_a_column_cannot_silently_override_a_parameter(plugin):
    reward = load_reward(f"{plugin}:scaled", {"scale": 2.0})
    with pytest.raises(ValueError, match="`scale` is both a dataset column and a parameter"):
        call(reward, ["a"], scale=[3.0])


def test_a_broken_file_is_not_half_loaded(tmp_path):
    path = tmp_path / "broken_reward.py"
    path.write_text("raise RuntimeError('no')\n")
    for _ in range(2):  # the second time must not find a module left in sys.modules
        with pytest.raises(ValueError, match=r"cannot import .*broken_reward\.py: RuntimeError: no"):
            load_reward(f"{path}:f")


def test_bound_rewards_keep_their_name_and_pickle():
    reward = load_reward("math_answer", {"anchor": "boxed"})
    assert reward.__name__ == "math_answer"
    again = pickle.loads(pickle.dumps(reward))
    assert call(again, [r"\boxed{1}"], answer=["1"])[0].value == 1.0


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_shipped_name_points_at_something(name):
    """Without loading models or servers: the module imports and has the attribute."""
    module, _, attribute = NAMES[name].partition(":")
    assert hasattr(__import__(module, fromlist=[attribute]), attribute)

"""Benchmarks from their published files: how many problems, what is asked, and that right answers are judged right."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from rewards.load import load_reward
from rl.tasks.benchmark_examples import unpack
from rl.tasks.benchmarks import BENCHMARKS
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.load import load_task
from rl.tasks.records import read_records
from rl.tasks.templates import FIELD, Template, choose_template, with_chat

LCB_SAMPLE = "code/sandboxfusion_samples/code_eval_live_code_bench_v1.jsonl"
FILES = {
    "gsm8k": ("math/gsm8k_test.jsonl", 1319),
    "math500": ("math/math500_test.jsonl", 500),
    "aime24": ("math/aime24_test.jsonl", 30),
    "humaneval": ("code/HumanEval.jsonl.gz", 164),
    "mbpp": ("code/mbpp.jsonl", 500),
    "livecodebench": (LCB_SAMPLE, 3),
    "countdown": ("puzzles/d1_countdown_cd3_test.jsonl", 256),
    "sudoku": ("puzzles/spg_4x4_test_sudoku_split_new.csv", 256),
}


# --- the published files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_problem_of_the_file_is_asked_by_every_template(shared_data: Path, name: str) -> None:
    file, count = FILES[name]
    task = load_task(name, {})
    rows = task.file_examples(str(shared_data / file))
    assert len(rows) == count
    for template in task.templates:
        prompts = [template.render(row) for row in rows]
        # The problem itself is in the prompt, and no column is left unfilled.
        for row, prompt in zip(rows, prompts, strict=True):
            assert str(row.get("problem", row.get("puzzle", row.get("target")))) in prompt
            assert not any("{" + column + "}" in prompt for column in FIELD.findall(template.text))


def test_mbpp_is_its_test_split_and_shows_three_examples_from_outside_it(shared_data: Path) -> None:
    task = load_task("mbpp", {})
    rows = task.file_examples(str(shared_data / FILES["mbpp"][0]))
    assert [row["prompt_id"] for row in rows] == [f"Mbpp/{number}" for number in range(11, 511)]
    few_shot = choose_template(task, "few_shot", has_chat=False).render(rows[0])
    assert few_shot.count("[BEGIN]") == 4 and few_shot.count("[DONE]") == 3
    assert few_shot.endswith(f"{rows[0]['shown']}\n[BEGIN]\n")
    assert "def similar_elements(test_tup1, test_tup2):" in few_shot  # id 2
    assert "def is_not_prime(n):" in few_shot and "def heap_queue_largest" in few_shot  # ids 3 and 4


def test_without_the_example_rows_only_the_three_shot_prompt_is_refused(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / FILES["mbpp"][0]).read_text().splitlines()
    (tmp_path / "mbpp.jsonl").write_text("\n".join(lines[10:20]))
    task = load_task("mbpp", {})
    rows = task.file_examples(str(tmp_path / "mbpp.jsonl"))
    assert len(rows) == 10
    with pytest.raises(ValueError, match="template few_shot needs the column 'examples'"):
        choose_template(task, None, has_chat=False).render(rows[0])
    assert rows[0]["problem"] in choose_template(task, "zero_shot", has_chat=False).render(rows[0])


@pytest.mark.parametrize(("name", "solution"), [("gsm8k", "answer"), ("math500", "solution"), ("aime24", "solution")])
def test_no_prompt_gives_its_answer_away(shared_data: Path, name: str, solution: str) -> None:
    path = str(shared_data / FILES[name][0])
    task = load_task(name, {})
    for record, row in zip(read_records(path), task.file_examples(path), strict=True):
        for template in task.templates:
            prompt = template.render(row)
            assert record[solution] not in prompt and "####" not in prompt
            # The one box there may be is the empty one that the instruction speaks of.
            assert prompt.replace("\\boxed{}", "").count("\\boxed") == record.get("problem", "").count("\\boxed")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_no_code_prompt_holds_its_solution(shared_data: Path, name: str) -> None:
    path = str(shared_data / FILES[name][0])
    task = load_task(name, {})
    rows = {row["prompt_id"]: row for row in task.file_examples(path)}
    asked = 0
    for record in read_records(path):
        row = rows.get(str(record["task_id"]) if name == "humaneval" else f"Mbpp/{record['task_id']}")
        if row is None:
            continue
        solution = record["canonical_solution" if name == "humaneval" else "code"].replace("\r\n", "\n")
        for template in task.templates:
            assert solution.strip() not in template.render(row)
        assert solution not in "".join(str(value) for value in row.values())
        asked += 1
    assert asked == len(rows)


@pytest.mark.parametrize(("name", "solution"), [("gsm8k", "answer"), ("math500", "solution")])
def test_the_published_solutions_are_right_by_the_tasks_own_reward(shared_data: Path, name: str, solution: str) -> None:
    path = str(shared_data / FILES[name][0])
    task = load_task(name, {})
    rows = task.file_examples(path)
    reward = load_reward(task.reward)
    solutions = [record[solution] for record in read_records(path)]
    answers = [row["answer"] for row in rows]
    right = [score.value for score in reward([""] * len(rows), solutions, answer=answers)]
    assert right == [1.0] * len(rows)
    # The neighbour's solution is right only where the two answers agree.
    wrong = [score.value for score in reward([""] * len(rows), solutions[1:] + solutions[:1], answer=answers)]
    assert sum(wrong) < 0.05 * len(rows)


# --- LiveCodeBench ------------------------------------------------------------------------------------------------


def lcb_record(private: str, starter: str = "", func_name: str | None = None) -> dict[str, str]:
    return {
        "question_id": "abc301_a",
        "question_content": "Say who won.",
        "starter_code": starter,
        "public_test_cases": json.dumps([{"input": "1\nA\n", "output": "A\n", "testtype": "stdin"}]),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": func_name} if func_name else {}),
    }


def test_livecodebench_tests_are_public_and_private_packed_or_not(tmp_path: Path) -> None:
    hidden = json.dumps([{"input": "2\nTT\n", "output": "T\n", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    expected = {"inputs": ["1\nA\n", "2\nTT\n"], "outputs": ["A\n", "T\n"], "fn_name": None}
    assert unpack(packed) == hidden
    for private in (hidden, packed):
        (tmp_path / "lcb.jsonl").write_text(json.dumps(lcb_record(private)) + "\n")
        (row,) = load_task("livecodebench", {}).file_examples(str(tmp_path / "lcb.jsonl"))
        assert json.loads(row["input_output"]) == expected
        assert row["form"] == "stdin" and row["prompt_id"] == "abc301_a"


def test_livecodebench_functions_start_from_their_code(tmp_path: Path) -> None:
    starter = "class Solution:\n    def win(self, s: str) -> str:\n"
    (tmp_path / "lcb.jsonl").write_text(json.dumps(lcb_record("[]", starter, "win")) + "\n")
    task = load_task("livecodebench", {})
    (row,) = task.file_examples(str(tmp_path / "lcb.jsonl"))
    assert json.loads(row["input_output"])["fn_name"] == "win"
    assert starter in choose_template(task, None, has_chat=True).render(row)


def test_packed_tests_that_would_run_code_are_refused() -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("harm",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Harm()))).decode()
    with pytest.raises(ValueError, match=r"builtins\.eval: not data, refused"):
        unpack(packed)


def test_sandbox_fusion_samples_are_taken_apart(shared_data: Path) -> None:
    rows = load_task("livecodebench", {}).file_examples(str(shared_data / LCB_SAMPLE))
    assert [row["prompt_id"] for row in rows] == ["codeforces/1873_A", "leetcode/2727", "atcoder/abc301_a"]
    assert [row["form"] for row in rows] == ["stdin", "function", "stdin"]
    assert rows[1]["starter_code"].startswith("class Solution:\n    def countSeniors(")
    assert rows[0]["problem"].startswith("There are three cards") and "### Format" not in rows[0]["problem"]
    assert json.loads(rows[0]["input_output"])["outputs"][1] == "YES\n"
    reward = load_reward("code_tests")
    program = "```python\nfor _ in range(int(input())):\n    s = input()\n    print(sum(map(str.__ne__, s, 'abc')) < 3 "
    program += "and 'YES' or 'NO')\n```"
    tests = [rows[0]["input_output"]] * 2
    with reward as judge:
        scores = judge([""] * 2, [program, program.replace("'NO'", "'YES'")], input_output=tests)
    assert [score.value for score in scores] == [1.0, 0.0]


# --- templates ----------------------------------------------------------------------------------------------------


def test_a_completion_is_judged_up_to_the_first_stop_string() -> None:
    template = Template("t", "{problem}", "test", stop=("\ndef", "Question:"))
    assert template.cut("    return 1\ndef other():\nQuestion: 2") == "    return 1"
    assert template.cut("5\nQuestion: 2\ndef") == "5\n"
    assert template.cut("no stop") == "no stop"


def test_braces_that_are_no_column_stay() -> None:
    template = Template("t", "{problem} \\boxed{} \\frac{1}{2} {Q}", "test")
    assert template.render({"problem": "{x} + 1"}) == "{x} + 1 \\boxed{} \\frac{1}{2} {Q}"
    with pytest.raises(ValueError, match="template t needs the column 'problem'; the rows have question"):
        template.render({"question": "?", "answer": None})


def test_the_template_follows_the_tokenizer_unless_one_is_named(tmp_path: Path) -> None:
    task = load_task("gsm8k", {})
    assert choose_template(task, None, has_chat=True).name == "boxed"
    assert choose_template(task, None, has_chat=False).name == "question_answer"
    assert choose_template(task, "boxed", has_chat=False).name == "boxed"
    with pytest.raises(ValueError, match="--template 'boxd' does not exist: did you mean 'boxed'"):
        choose_template(task, "boxd", has_chat=False)
    (tmp_path / "mine.txt").write_text("Q {problem}")
    mine = choose_template(task, str(tmp_path / "mine.txt"), has_chat=True)
    assert (mine.name, mine.chat, mine.render({"problem": "1+1"})) == ("mine.txt", True, "Q 1+1")


def test_chat_markup_goes_around_chat_templates_only() -> None:
    tokenizer = char_tokenizer("ab")
    chat, plain = Template("c", "{p}", "t", chat=True, system="be short"), Template("p", "{p}", "t")
    assert with_chat(tokenizer, chat, "hi") == "be short\nhi"
    markup = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = markup + "{% if add_generation_prompt %}[answer]{% endif %}"
    assert with_chat(tokenizer, chat, "hi") == "[system]be short[user]hi[answer]"
    assert with_chat(tokenizer, plain, "hi") == "hi"


def test_every_benchmark_ends_in_a_template_that_every_file_can_fill() -> None:
    for benchmark in BENCHMARKS.values():
        assert benchmark.templates[0].chat and not benchmark.templates[-1].chat
        assert set(FIELD.findall(benchmark.templates[-1].text)) <= {"problem", "shown"}


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_without_network_and_file_one_line_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"dataset openai/gsm8k cannot be loaded from the hub .*--data FILE") as error:
        load_task("gsm8k", {}).heldout_examples(5)
    assert "\n" not in str(error.value)


def test_a_file_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"is not a gsm8k file: no column 'question'; it has problem, answer"):
        load_task("gsm8k", {}).file_examples(str(tmp_path / "math.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"problem": "1+1", "answer": "2"}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not JSON"):
        load_task("math500", {}).file_examples(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        load_task("math500", {}).file_examples(str(tmp_path / "missing.jsonl"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match="the ending must be"):
        load_task("math500", {}).file_examples(str(tmp_path / "rows.txt"))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("gsm9k", {}, "task.name 'gsm9k' does not exist, did you mean 'gsm8k'"),
        ("gsm8k", {"count": 3}, "task.params has unknown key 'count'; gsm8k takes release"),
        (
            "livecodebench",
            {"release": "release_v9"},
            "release 'release_v9' does not exist; livecodebench has release_v1",
        ),
        ("reasoning_gym:leg_countin", {}, "reasoning-gym has no task 'leg_countin': did you mean 'leg_counting'"),
        ("leg_counting", {"options": {"num": 3}}, "task.params.options of leg_counting"),
    ],
)
def test_mistakes_name_the_fix(name: str, params: dict[str, object], message: str) -> None:
    if "leg" in name:
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_task(name, params).heldout_examples(1)


def test_a_benchmark_is_not_trained_on() -> None:
    with pytest.raises(ValueError, match=r"task\.name gsm8k is a benchmark"):
        load_task("gsm8k", {}).train_examples(0, 0, 1)


# --- reasoning-gym ------------------------------------------------------------------------------------------------


def test_reasoning_gym_splits_share_no_question_and_answers_score_one() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task("leg_counting", {"options": {"max_animals": 4}})
    train = [row for step in range(3) for row in task.train_examples(0, step, 20)]
    test, validation = task.heldout_examples(20), task.validation_examples(20)
    questions = [{row["question"] for row in rows} for rows in (train, test, validation)]
    assert [len(part) for part in questions] == [60, 20, 20]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    assert task.heldout_examples(5) == test[:5] and task.train_examples(0, 1, 20) == train[20:40]
    reward = load_reward(task.reward)
    columns = {name: [row[name] for row in test] for name in ("question", "answer", "metadata")}
    given = [f"It is <answer>{row['answer']}</answer>" for row in test]
    assert [score.value for score in reward(columns["question"], given, **columns)] == [1.0] * 20
    chat = choose_template(task, None, has_chat=True)
    assert chat.render(test[0]) == test[0]["question"] and "<answer>" in chat.system

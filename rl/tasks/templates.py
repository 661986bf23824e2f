"""Prompts of evaluations, each with the name of the convention it follows.

A template is text with columns of a row in braces, `{problem}`. The first of a task's templates that is a chat turn
is used with tokenizers that have a chat template, the first that is not with all others; `--template` picks any, or
a text file of your own. Wherever a score is written, so is its template, text and all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.tasks.chat import chat_prompt, user_turn

FIELD = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Template:
    r"""How a row becomes a prompt, and where its completion ends.

    Example: `Template("boxed", "{problem}\nPut the answer in \\boxed{}.", "our own", chat=True)`.

    Attributes:
        name: what results call it.
        text: the prompt; `{column}` stands for a column of the row, `{}` for itself.
        source: whose convention it is, and where it departs from it.
        chat: True for a user turn, which the tokenizer's chat template is put around if it has one.
        stop: a completion is judged up to the first of these strings.
        function_text: used instead of `text` for rows whose column `form` is "function".
        system: system message of the chat.
    """

    name: str
    text: str
    source: str
    chat: bool = False
    stop: tuple[str, ...] = ()
    function_text: str = ""
    system: str = ""

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row, without chat markup.

        Raises:
            ValueError: the text names a column that the row does not have.
        """
        text = self.function_text if self.function_text and row.get("form") == "function" else self.text
        missing = [name for name in FIELD.findall(text) if row.get(name) is None]
        if missing:
            known = ", ".join(name for name, value in row.items() if value is not None)
            raise ValueError(f"template {self.name} needs the column {missing[0]!r}; the rows have {known}")
        return FIELD.sub(lambda match: str(row[match[1]]), text)

    def cut(self, completion: str) -> str:
        """The part of a completion that is judged: what comes before the first stop string."""
        found = [completion.find(word) for word in self.stop]
        return completion[: min((place for place in found if place >= 0), default=len(completion))]


OWN = Template("prompt", "{prompt}", "the task's own prompt")

BOXED = Template(
    "boxed",
    "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "TraceRL, zero-shot",
    chat=True,
)
ONE_BLOCK = "Place your code within a single Python code block ```python ```. Do not include more than one code block."
STDIN_BLOCK = (
    "This is the problem:\n{problem}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script."
)
STARTER_BLOCK = "{problem}\nStart from this code:\n{starter_code}\n" + ONE_BLOCK

MATH = (
    BOXED,
    Template("problem_solution", "Problem:\n{problem}\n\nSolution:", "lm-evaluation-harness minerva_math, zero-shot",
             stop=("Problem:",)),
)  # fmt: skip
GSM8K = (
    BOXED,
    Template("question_answer", "Question: {problem}\nAnswer:", "lm-evaluation-harness gsm8k, zero-shot",
             stop=("Question:",)),
)  # fmt: skip
HUMANEVAL = (
    Template("code_block", "{problem}\n" + ONE_BLOCK, "TraceRL, without a prefilled answer", chat=True),
    Template("completion", "{problem}", "HumanEval (Chen et al. 2021)",
             stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
)  # fmt: skip
MBPP_TASK = (
    "You are an expert Python programmer, and here is your task: {problem} "
    "Your code should pass these tests:\n\n{shown}"
)
MBPP = (
    Template("code_block", "{problem}\nYour code should pass these tests:\n\n{shown}\n" + ONE_BLOCK,
             "TraceRL, with the tests shown as Austin et al. 2021 do", chat=True),
    Template("few_shot", "{examples}" + MBPP_TASK + "\n[BEGIN]\n", "MBPP (Austin et al. 2021), three-shot, ids 2 to 4",
             stop=("[DONE]",)),
    Template("zero_shot", MBPP_TASK + "\n[BEGIN]\n", "MBPP (Austin et al. 2021), zero-shot", stop=("[DONE]",)),
)  # fmt: skip
LIVECODEBENCH = (
    Template("code_block", STDIN_BLOCK, "TraceRL", chat=True,
             function_text=STARTER_BLOCK),
    Template("plain_code_block", STDIN_BLOCK, "TraceRL, without chat markup",
             function_text=STARTER_BLOCK),
)  # fmt: skip
COUNTDOWN = (
    Template("answer_tag", "Write an arithmetic expression that equals {target} and uses each of the numbers {numbers} "
             "exactly once, with + - * / and brackets. Reason first, then give the expression alone, without an "
             "equals sign, inside <answer></answer>.", "denoise-rl wording of the task of d1", chat=True),
    Template("plain", "{prompt}", "denoise-rl: numbers=target:"),
)  # fmt: skip
SUDOKU = (
    Template("answer_tag", "Solve this 4x4 Sudoku, given row by row with 0 for an empty cell: {puzzle}\nEvery row, "
             "column and 2x2 box must hold the digits 1 to 4. Reason first, then give the 16 digits of the full grid "
             "inside <answer></answer>.", "denoise-rl wording of the task of d1, zero-shot", chat=True),
    Template("plain", "{prompt}", "denoise-rl: 16 cells and ="),
)  # fmt: skip


def choose_template(task: Any, asked: str | None, has_chat: bool) -> Template:
    """The template of an evaluation.

    Args:
        task: its attribute `templates` lists what there is; without it the task's own prompt is used.
        asked: name of one of them, or the path of a text file; None takes the first that suits the tokenizer.
        has_chat: the tokenizer has a chat template.

    Raises:
        ValueError: there is no such template.
    """
    templates: Sequence[Template] = getattr(task, "templates", (OWN,))
    if asked is None:
        return next((t for t in templates if t.chat == has_chat), templates[0])
    for template in templates:
        if template.name == asked:
            return template
    if Path(asked).is_file():
        return Template(Path(asked).name, Path(asked).read_text(), f"file {Path(asked).name}", chat=has_chat)
    names = [template.name for template in templates]
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"this task has {', '.join(names)}, and any text file will do"
    raise ValueError(f"--template {asked!r} does not exist: {hint}")


def with_chat(tokenizer: Any, template: Template, prompt: str) -> str:
    """The prompt as a chat of one user turn, where template and tokenizer both know chats; else as it is."""
    if not template.chat or not getattr(tokenizer, "chat_template", None):
        return f"{template.system}\n{prompt}" if template.system else prompt
    return chat_prompt(tokenizer, user_turn(prompt, template.system))

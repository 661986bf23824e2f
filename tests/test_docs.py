"""The pages under docs/ say what is true: the options are the code's, links lead somewhere, commands run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.cli import _parser, main
from rl.config import load_config
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rl.train.memory import memory_lines
from tests import runs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "rewards" / "README.md"]


def test_the_reference_of_options_is_up_to_date() -> None:
    written = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert written == runpy.run_path(str(ROOT / "scripts" / "options_page.py"))["options_page"](), "run make options"
    assert "| `train.group_size` | `8` | integer, >= 1, <= 1024 | Rollouts per prompt. |" in written


def anchors(page: Path) -> set[str]:
    """Of every heading of a page, what GitHub and the site make of it: "Will it fit?" is will-it-fit."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: no heading for {target}"


GUIDES = ["data", "own_recipe", "sft_to_rl", "troubleshooting", "hardware"]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The commands of a page say what a user would run; here they run with these sizes.
TINY = "train.steps=1 train.prompts_per_step=4 train.group_size=2 train.mixed_steps=[] sft.steps=2 sft.batch_size=8"
TINY += (
    " eval.num_prompts=4 eval.every=0 eval.viewer_items=1 eval.num_inference_steps=[2,4] goal=null run.num_threads=1"
)
LETTERS = "".join(map(chr, range(32, 127))) + "\n"


def tiny(line: str) -> list[str]:
    """The words of a command with `TINY` before its first flag; a stage that the line leaves out stays out."""
    words = shlex.split(line)
    if words[1] not in ("train", "sft", "eval", "compare", "check", "rollout") or "--plan" in words:
        return words[1:]
    small = [word for word in TINY.split() if not ("sft.steps=0" in words and word.startswith("sft.steps"))]
    first = next(place for place, word in enumerate(words) if word.startswith("--"))
    return [*words[1:first], *small, *words[first:]]


@pytest.fixture
def forget_files(tmp_path: Path) -> Iterator[None]:
    """Modules that a page's files became are forgotten behind it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("denoise_rl_file_") or str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs_from_top_to_bottom(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forget_files: None,
) -> None:
    """Blocks with a title are files, of Python blocks the rest runs, and every command ends well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder, alphabet in (("mine", LETTERS), ("sudoku", "01234=")):
        tokenizer = char_tokenizer(alphabet, ends=folder == "mine")
        save_policy(load_policy(ModelConfig(backbone=runs.GPT2), tokenizer, 0), tokenizer, Path("models") / folder)
    text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    ran = 0
    for language, title, body in BLOCK.findall(text):
        if title:
            Path(title).write_text(body)
        elif language == "python":
            exec(compile(body, f"docs/{name}.md", "exec"), {})
        else:
            assert language == "bash", f"a block of {language} without a title"
            for line in body.strip().replace("\\\n", " ").splitlines():
                assert line.startswith("denoise-rl "), line
                assert main(tiny(line)) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
                ran += 1
    assert ran


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of every `denoise-rl` command that stands indented on a page; what follows a pipe is left out."""
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (denoise-rl (?![A-Z]).*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            cut = next((place for place, word in enumerate(words) if word in ("|", ">", "&&", "&")), None)
            yield page.name, words[:cut]


def test_every_command_of_a_page_is_one_that_there_is() -> None:
    """Those of the guides run; of all others flags must be the command's, and options those of the shipped config."""
    known = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    seen, wrong = 0, []
    for page, words in commands():
        try:
            parsed, extra = _parser().parse_known_args(words)
        except ValueError as error:
            wrong.append(f"{page}: {' '.join(words)}: {error}")
            continue
        flags = [word for word in extra if word.startswith("--") and "." not in word.split("=")[0]]
        wrong += [f"{page}: {word} of {words[0]}" for word in flags]
        config = str(getattr(parsed, "config", None) or "").removeprefix("configs/").removesuffix(".yaml")
        options = [word for word in [*getattr(parsed, "overrides", []), *extra] if "..." not in word]
        if config in known and not flags:
            try:
                load_config(str(ROOT / "configs" / f"{config}.yaml"), options)
            except ValueError as error:
                wrong.append(f"{page}: {' '.join(words)}: {error}")
            seen += 1
    assert not wrong and seen > 20, "\n".join(wrong)


def test_every_page_is_in_the_table_of_pages_and_in_the_menu_of_the_site() -> None:
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    table, menu = (ROOT / "docs" / "index.md").read_text("utf-8"), (ROOT / "mkdocs.yml").read_text("utf-8").split()
    assert pages - set(re.findall(r"\]\(([^)#]+\.md)", table)) == set()
    assert pages - set(menu) == set()


def test_the_plan_of_the_hardware_page_is_todays() -> None:
    rows = re.findall(r"^\|.*`(llada_8b_mdpo|llada_8b_d1|sd15_b2|sd35_flow_grpo)`(?: \+ `([^`]*)`)?.*\| (\S+) \|$",
                      (ROOT / "docs" / "hardware.md").read_text("utf-8"), re.MULTILINE)  # fmt: skip
    assert len(rows) == 5
    for name, overrides, last in rows:
        lines = memory_lines(load_config(name, overrides.split()), 8, 256)
        assert any(f"peak {last} " in line for line in lines), (name, overrides, lines)

"""Our models in the real lm-evaluation-harness, on tasks made here."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'denoise-rl[eval]'")

from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.load import save_policy
from rl.tasks.char_tokenizer import char_tokenizer

# lm-eval and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
ALPHABET = "abcdefgh .?"

CHOICE = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["c", "."], max_gen_toks: 9}}
metric_list: [{{metric: exact_match}}]
"""


def save_model(path: Path, attention: str, block_length: int | None) -> str:
    tokenizer = char_tokenizer(ALPHABET)
    backbone = {"model_type": "gpt2", "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 2}
    config = DiffusionLMConfig(
        backbone={**backbone, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None},
        mask_token_id=tokenizer.mask_token_id,
        attention=attention,
        block_length=block_length,
    )
    torch.manual_seed(0)
    model = DiffusionLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.7, generator=generator)
    save_policy(model, tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def full_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("full"), "full", None)


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("causal"), "block_causal", 1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"a{letter} b?", "choices": [" abc", " d", " hg fe"], "gold": index % 3}
        for index, letter in enumerate("abcdefgh")
    ]
    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pick.yaml").write_text(CHOICE.format(data=data))
    (folder / "write.yaml").write_text(WRITE.format(data=data))
    return folder


def evaluate(model: Any, tasks: Path, *names: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("samples", [31, 5])
def test_multiple_choice_is_decided_by_our_likelihoods(full_model: str, tasks: Path, samples: int) -> None:
    from rl.evaluation.likelihood import log_likelihoods
    from rl.evaluation.lm_eval_model import DenoiseLM

    lm = DenoiseLM(full_model, num_likelihood_samples=samples, batch_size=5, device="cpu")
    results = evaluate(lm, tasks, "pick")
    right = 0
    for sample in results["samples"]["pick"]:
        context = lm.tok_encode(sample["doc"]["question"])
        texts = [lm.tok_encode(choice) for choice in sample["doc"]["choices"]]
        expected = [item.logprob for item in log_likelihoods(lm.model, [(context, text) for text in texts], samples)]
        assert [float(score) for ((score, _),) in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        right += max(range(3), key=expected.__getitem__) == sample["doc"]["gold"]
    assert results["results"]["pick"]["acc,none"] == right / 8
    info = results["config"]["denoise_rl"]
    assert info["num_likelihood_samples"] == samples and info["likelihoods"] == 24
    # The choice of two characters has 3 sets of masks, that of four 15, that of six 63.
    assert info["likelihoods_exact"] == 0
    assert info["likelihoods_bounds_without_error"] == {31: 16, 5: 8}[samples]
    assert info["likelihoods_mean_std_error"] > 0


def test_block_length_one_is_scored_exactly_in_one_forward(causal_model: str, tasks: Path) -> None:
    from rl.evaluation.lm_eval_model import DenoiseLM

    lm = DenoiseLM(causal_model, device="cpu", check_greedy=False)
    info = evaluate(lm, tasks, "pick")["config"]["denoise_rl"]
    assert info["likelihoods_exact"] == info["likelihoods"] == 24
    assert {item.num_samples for item in lm.likelihoods} == {1}


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_completions_are_the_engines_cut_at_stop_strings(
    full_model: str, causal_model: str, tasks: Path, kind: str
) -> None:
    from rl.evaluation.lm_eval_model import DenoiseLM
    from rollouts.engines.in_process import InProcessEngine, Request
    from rollouts.samplers.options import SamplerOptions

    lm = DenoiseLM(full_model if kind == "full" else causal_model, batch_size=3, device="cpu")
    samples = evaluate(lm, tasks, "write")["samples"]["write"]
    options = SamplerOptions(
        gen_length=9, num_inference_steps=9, temperature=0.0, block_length=1 if kind == "causal" else None
    )
    engine = InProcessEngine(lm.model, options, eos_token_id=lm.tokenizer.eos_token_id)
    cut = 0
    for sample in samples:
        prompt = lm.tok_encode(sample["doc"]["question"])
        (trajectory,) = engine.generate([Request(prompt, 0)])
        text = lm.tokenizer.decode(trajectory.response_ids(), skip_special_tokens=True)
        expected = text.split("c")[0].split(".")[0]
        cut += expected != text
        assert sample["resps"] == [[expected]]
    assert cut > 0


def test_completions_match_a_constraint(full_model: str, tasks: Path, tmp_path: Path) -> None:
    from rl.evaluation.lm_eval_model import DenoiseLM

    given = tmp_path / "constraint.json"
    given.write_text(json.dumps({"graph": {"<start>": ["a"], "a": ["b", "<end>"], "b": ["a"]}}))
    lm = DenoiseLM(full_model, batch_size=8, device="cpu", constraint=str(given))
    results = evaluate(lm, tasks, "write")
    answers = [sample["resps"][0][0] for sample in results["samples"]["write"]]
    assert len(answers) == 8 and all(re.fullmatch("a(ba)*", answer) for answer in answers), answers
    assert "graph" in str(results["config"]["denoise_rl"]["constraint"])


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_greedy_is_what_greedy_decoding_writes(full_model: str, causal_model: str, kind: str) -> None:
    from lm_eval.api.instance import Instance

    from rl.evaluation.lm_eval_model import DenoiseLM

    lm = DenoiseLM(full_model if kind == "full" else causal_model, device="cpu", num_likelihood_samples=3)

    def request(name: str, *arguments: Any) -> Any:
        return Instance(name, {}, arguments, 0, ("test", 0, 1))

    (text,) = lm.generate_until([request("generate_until", "ab d?", {"until": [], "max_gen_toks": 5})])
    assert len(text) == 5
    other = ("a" if text[2] != "a" else "b").join([text[:2], text[3:]])
    (_, yes), (_, no) = lm.loglikelihood([request("loglikelihood", "ab d?", t) for t in (text, other)])
    assert (yes, no) == (True, False)


def test_whole_texts_are_scored_in_windows_that_cover_them(causal_model: str) -> None:
    from lm_eval.api.instance import Instance

    from rl.evaluation.lm_eval_model import DenoiseLM

    lm = DenoiseLM(causal_model, device="cpu")
    short, long = "abc def", "abcdefgh ab" * 9  # 7 tokens, and 99 for 48 positions

    def rolling(text: str) -> float:
        return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("test", 0, 1))])[0]

    (expected,) = lm._score([([lm.eot_token_id], lm.tok_encode(short))])
    assert rolling(short) == pytest.approx(expected.logprob, abs=1e-4)
    lm.likelihoods.clear()
    assert rolling(long) < rolling(long[:47]) < 0
    # Windows of 47 tokens: three for 99.
    assert len(lm.likelihoods) == 4


def test_what_is_cut_off_is_counted(full_model: str, caplog: pytest.LogCaptureFixture) -> None:
    from lm_eval.api.instance import Instance

    from rl.evaluation.lm_eval_model import DenoiseLM

    lm = DenoiseLM(full_model, device="cpu", num_likelihood_samples=2)
    with caplog.at_level(logging.WARNING, "denoise-rl"):
        long = "ab " * 20
        lm.generate_until([Instance("generate_until", {}, (long, {"until": [], "max_gen_toks": 4}), 0, ("t", 0, 1))])
        lm.loglikelihood([Instance("loglikelihood", {}, (long, "abc"), 0, ("t", 0, 1))])
    assert lm.get_model_info()["denoise_rl"]["truncated"] == {"prompts": 1, "contexts of likelihoods": 1}
    assert "prompts longer than the model's 48 positions lose their beginning" in caplog.text
    with pytest.raises(ValueError, match="leaves no room for a prompt in 48 positions"):
        lm.generate_until([Instance("generate_until", {}, ("ab", {"until": []}), 0, ("t", 0, 1))])


def test_the_harness_own_command_knows_the_model(full_model: str, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rl.evaluation.lm_eval_model", "run", "--model", "denoise_rl"]
    command += ["--model_args", f"path={full_model},num_likelihood_samples=7", "--tasks", "pick"]
    command += [
        "--include_path",
        str(tasks),
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["denoise_rl"]["num_likelihood_samples"] == 7

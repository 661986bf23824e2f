"""DiffusionGemma: a tiny random model against transformers' own forward and `generate`, sampled, scored and trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.estimators.canvas_rows import random_canvas_rows
from rl.estimators.trace_rows import trace_rows
from rl.model_section import LoraOptions, ModelConfig
from rl.models import routing
from rl.models.load import load_policy, save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rollouts.engines.in_process import Request
from rollouts.engines.tokens import token_engine
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.uniform import noise_tokens, random_tokens, step_temperature
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories
from tests import runs

gemma = pytest.importorskip("transformers.models.diffusion_gemma")

TOKENIZER = char_tokenizer("01234=")
VOCAB, CANVAS, WINDOW, EOS = len(TOKENIZER), 4, 5, 7
# One prompt is longer than the window of the sliding layers, one is shorter.
PROMPTS = [[1, 2, 3, 4, 5, 1, 2], [3, 0, 5]]
DECODER = {"preset": "entropy_bound", "entropy_bound": 1.2, "temperature": 0.8, "final_temperature": 0.4}


def described(**text: Any) -> dict[str, Any]:
    """A config.json with small numbers: sliding and full layers, heads of two widths."""
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "patch_size": 2, "position_embedding_size": 4,
        "pooling_kernel_size": 1, "model_type": "gemma4_vision",
    }  # fmt: skip
    numbers = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 12,
        "num_global_key_value_heads": 1, "sliding_window": WINDOW, "num_experts": 6, "top_k_experts": 2,
        "moe_intermediate_size": 8, "attention_bias": False, "max_position_embeddings": 64, "eos_token_id": EOS,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "pad_token_id": None,
    }  # fmt: skip
    return {"text_config": {**numbers, **text}, "vision_config": vision, "canvas_length": CANVAS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: unequal experts, peaked logits, other scalars in the encoder, no biases."""
    path = tmp_path_factory.mktemp("gemma")
    model = gemma.DiffusionGemmaForBlockDiffusion(gemma.DiffusionGemmaConfig(**described()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            drawn = torch.randn(tensor.shape, generator=generator)
            if "vision" in name or name.endswith(("inv_freq", "embed_scale")):
                continue
            if tensor.ndim == 1:
                tensor.copy_(drawn * 0.3 + 1.0)
            elif "embed_tokens" in name:
                tensor.copy_(drawn * 0.5)
            else:
                tensor.copy_(drawn * tensor.shape[-1] ** -0.5)
                if "experts" in name:
                    tensor *= torch.linspace(0.5, 2.0, len(tensor))[:, None, None]
    model.tie_weights()
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def load(path: Path, **settings: Any) -> Any:
    return load_policy(ModelConfig(path=str(path), **settings), TOKENIZER, seed=0)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    return load(folder).double()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' model, untouched."""
    model = gemma.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, experts_implementation="eager").double()
    return model.eval()


def rollouts(policy: Any, count: int = 3, canvases: int = 2, steps: int = 4, **changes: Any) -> list[TokenTrajectory]:
    options = SamplerOptions(gen_length=canvases * CANVAS, num_inference_steps=canvases * steps, **DECODER | changes)
    engine = token_engine(policy, options, eos_token_id=EOS)
    return engine.generate([Request(prompt, seed) for prompt in PROMPTS for seed in range(count)])


@torch.no_grad()
def test_logits_are_transformers(policy: Any, theirs: Any) -> None:
    """Two rows of unequal length, with and without a signal; transformers pads to the left and is asked row by row."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, CANVAS), generator=generator)
    before = torch.randn(2, CANVAS, VOCAB, generator=generator, dtype=torch.float64)
    width = len(PROMPTS[0]) + CANVAS
    rows, visible = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, 1, width, dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        end = len(prompt) + CANVAS
        rows[row, :end] = torch.cat([torch.tensor(prompt), tokens[row]])
        visible[row, 0, :end] = True
    for logits, signal in ((None, None), (before, policy.signal(before))):
        hidden = policy.hidden_states(rows, visible=visible, signal=signal)
        for row, prompt in enumerate(PROMPTS):
            theirs_logits = theirs(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=tokens[row : row + 1],
                self_conditioning_logits=None if logits is None else logits[row : row + 1],
            ).logits[0]
            mine = policy.head(hidden[row, len(prompt) :][:CANVAS])
            torch.testing.assert_close(mine.float(), theirs_logits, rtol=0, atol=2e-5)
            assert theirs_logits.std() > 1 and theirs_logits.softmax(-1).amax(-1).max() > 0.7


class SharedDraws:
    """Our random numbers in the place of torch's, for one request of transformers' `generate`."""

    def __init__(self, policy: Any, seed: int, prompt: int):
        self.policy, self.seed, self.place = policy, torch.full((CANVAS,), seed), torch.arange(CANVAS)
        self.begin, self.taken, self.fresh = prompt, 0, True

    def noise(self, batch_size: int, device: Any) -> torch.Tensor:
        """A canvas begins with noise of its positions; later noise is that of the step to come."""
        step = torch.full((CANVAS,), 0 if self.fresh else self.taken)
        place = self.place + (self.begin if self.fresh else 0)
        self.fresh = False
        return random_tokens(self.policy, self.seed, step, place)[None]

    def multinomial(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        step = torch.full((CANVAS,), self.taken)
        self.taken += 1
        return draw(probs.log(), noise.uniform(self.seed, step, self.place, noise.TOKEN_STREAM))[:, None]


def generated(
    theirs: Any, policy: Any, prompt: Sequence[int], seed: int, monkeypatch: Any, **settings: Any
) -> tuple[list[int], int]:
    """The answer of transformers' `generate` up to its end token, and the steps it took."""
    draws = SharedDraws(policy, seed, len(prompt))
    module = gemma.generation_diffusion_gemma
    start = theirs._prepare_denoiser_inputs

    def prepared(**inputs: Any) -> Any:
        draws.fresh, draws.begin = True, inputs["decoder_attention_mask"].shape[1] - CANVAS
        return start(**inputs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", draws.multinomial)
        patch.setattr(module.EntropyBoundSampler, "initialize_canvas", lambda self, **kwargs: draws.noise(**kwargs))
        patch.setattr(
            module.EntropyBoundSampler, "renoise_canvas",
            lambda self, accepted, step: torch.where(self.accepted_token_mask, accepted, draws.noise(1, None)),
        )  # fmt: skip
        patch.setattr(theirs, "_prepare_denoiser_inputs", prepared)
        out = theirs.generate(
            torch.tensor([prompt]), eos_token_id=EOS, pad_token_id=0,
            sampler_config=module.EntropyBoundSamplerConfig(entropy_bound=DECODER["entropy_bound"]), **settings,
        )  # fmt: skip
    answer = out.sequences[0, len(prompt) :].tolist()
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer, draws.taken


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rollouts_are_those_of_generate(policy: Any, theirs: Any, monkeypatch: Any, temperature: float) -> None:
    """Token for token, under shared draws and at temperature 0, with early stops and answers of one canvas and two."""
    final, steps = (0.0, 6) if temperature == 0 else (0.4, 6)
    monkeypatch.setitem(policy.settings, "mask_token_id", VOCAB)
    monkeypatch.setitem(policy.settings, "excluded_token_ids", [])
    options = {"temperature": temperature, "final_temperature": final, "last_step": "argmax", "stop_entropy": 0.5}
    found = rollouts(policy, 4, 2, steps, **options)
    taken, lengths = set(), set()
    for index, trajectory in enumerate(found):
        prompt = PROMPTS[index // 4]
        answer, number = generated(
            theirs, policy, prompt, index % 4, monkeypatch, max_new_tokens=2 * CANVAS, max_denoising_steps=steps,
            t_max=temperature or 1e-9, t_min=final, stability_threshold=1, confidence_threshold=0.5,
        )  # fmt: skip
        assert trajectory.response_ids().tolist() == answer
        assert trajectory.num_steps == number
        taken.add(number)
        lengths.add(len(answer))
    assert len(taken) > 1 and (len(lengths) > 1 or temperature == 0)


def test_the_temperatures_of_the_steps() -> None:
    theirs = gemma.generation_diffusion_gemma.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, 5)
    for step in range(5):
        ours = float(step_temperature(step, torch.tensor([5]), 0.8, 0.4))
        assert ours == pytest.approx(1 / float(theirs(None, torch.ones(1), cur_step=5 - step)))
    assert step_temperature(3, torch.tensor([5]), 0.7, None).tolist() == pytest.approx([0.7])


def test_a_rollout_depends_on_its_seed_alone(policy: Any, tmp_path: Path) -> None:
    together = rollouts(policy, stop_entropy=0.5)
    save_trajectories(tmp_path / "t.npz", together)
    for index, (one, loaded) in enumerate(zip(together, load_trajectories(tmp_path / "t.npz"), strict=True)):
        options = SamplerOptions(gen_length=2 * CANVAS, num_inference_steps=8, stop_entropy=0.5, **DECODER)
        request = Request(PROMPTS[index // 3], index % 3)
        (alone,) = token_engine(policy, options, eos_token_id=EOS).generate([request])
        one.validate()
        for name in ("step", "position", "token", "is_noise"):
            np.testing.assert_array_equal(getattr(one, name), getattr(alone, name))
            np.testing.assert_array_equal(getattr(one, name), getattr(loaded, name))
        assert loaded.decoder["canvas_steps"] == 4 and loaded.sampler["final_temperature"] == 0.4
    assert len({t.num_steps for t in together}) > 1


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_learner_scores_what_was_sampled(policy: Any, monkeypatch: Any, chunk: int | None) -> None:
    monkeypatch.setattr(policy, "head_chunk", chunk)
    trajectories = rollouts(policy, stop_entropy=0.5)
    rows = trace_rows(trajectories, policy).distinct()
    with torch.no_grad():
        scores = rows.score(policy)
    recorded = np.concatenate([t.logprob[t.is_reveal] for t in trajectories])
    torch.testing.assert_close(scores.logprob, torch.from_numpy(recorded), rtol=0, atol=1e-9)
    torch.testing.assert_close(rows.sampler_logprob, torch.from_numpy(recorded))
    assert rows.depth.max() == 3 and (rows.depth == 0).sum() > len(trajectories)
    # The signals matter: without them the same canvases say something else.
    rows.depth = torch.zeros_like(rows.depth)
    with torch.no_grad():
        assert (rows.score(policy).logprob - scores.logprob).abs().max() > 0.1


def test_the_whole_gradient_and_what_is_left_out_of_it(policy: Any, monkeypatch: Any) -> None:
    """The whole gradient of a rollout's log-prob is its finite difference; the values are equal."""
    rows = trace_rows(rollouts(policy, 2, 1), policy)
    weights = [p for n, p in policy.named_parameters() if p.requires_grad and "vision" not in n and "embed" not in n]

    def gradient() -> tuple[float, list[torch.Tensor]]:
        logprob = rows.score(policy).logprob.sum()
        return float(logprob.detach()), [g for g in torch.autograd.grad(logprob, weights)]

    value, plain = gradient()
    monkeypatch.setattr(policy, "self_conditioning_gradient", True)
    same, whole = gradient()
    assert value == pytest.approx(same, abs=1e-12)
    # transformers' norms are in float32: a smaller step would see their rounding.
    generator, step = torch.Generator().manual_seed(0), 1e-5
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean() for p in weights]
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, move in zip(weights, way, strict=True):
                parameter += sign * step * move
            values.append(float(rows.score(policy).logprob.sum()))
    slope = (values[0] - values[1]) / (2 * step)
    assert float(sum((g * d).sum() for g, d in zip(whole, way, strict=True))) == pytest.approx(slope, rel=0.01)
    assert float(sum((g * d).sum() for g, d in zip(plain, way, strict=True))) != pytest.approx(slope, rel=0.05)
    one, other = (torch.cat([g.flatten() for g in gradient]) for gradient in (plain, whole))
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert 0.3 < float(cosine) < 0.95


def test_noised_answers(policy: Any, theirs: Any) -> None:
    """One canvas of each answer, behind the clean text before it; cross-entropies are those of transformers' logits."""
    prompts, count = [[1, 2, 3], [4, 5]], 60
    sequences = [np.array([*prompts[i % 2], 0, 1, 2, 3, 4, 5, EOS, EOS, EOS, EOS, EOS, EOS]) for i in range(count)]
    tokens = noise_tokens(policy).numpy()
    rows, weight = random_canvas_rows(
        sequences, [3 - i % 2 for i in range(count)], [7] * count, CANVAS, tokens, np.random.default_rng(0)
    )
    assert len(rows.target) == len(weight) == count * CANVAS and (weight == 1).all()
    begins = rows.column.reshape(count, CANVAS)[:, 0] - torch.tensor([3 - i % 2 for i in range(count)])
    # Seven tokens are two canvases; the third, all end tokens, is never drawn.
    assert set(begins.tolist()) == {0, CANVAS}
    twice = rows.depth.sum()
    assert len(rows.depth) == count + twice and 0.3 < float(twice) / count < 0.7
    with torch.no_grad():
        ours = rows.score(policy).logprob.reshape(count, CANVAS)
        for i in (0, 1, 2, 3, 4, 5, 6, 7):
            row = int(rows.row[i * CANVAS])
            start = int(rows.column[i * CANVAS])
            canvas = rows.input_ids[row, start : start + CANVAS][None]
            inputs = {"input_ids": torch.from_numpy(sequences[i][None, :start]), "decoder_input_ids": canvas}
            first = theirs(**inputs).logits.index_fill(-1, torch.tensor([policy.mask_token_id]), -1e9)
            logits = theirs(**inputs, self_conditioning_logits=first).logits if rows.depth[row] else first
            truth = torch.from_numpy(sequences[i][start : start + CANVAS])
            expected = logits[0].index_fill(-1, torch.tensor([policy.mask_token_id]), -1e9).log_softmax(-1)
            expected = expected.gather(-1, truth[:, None])[:, 0]
            torch.testing.assert_close(ours[i].float(), expected, rtol=0, atol=2e-5)


def canvas_logits(policy: Any) -> torch.Tensor:
    ids = torch.tensor([[*PROMPTS[0], 1, 4, 2, 0]])
    with torch.no_grad():
        return policy.token_logits(policy.hidden_states(ids)[:, len(PROMPTS[0]) :])


def test_adapters_serve_encoder_and_decoder(folder: Path, tmp_path: Path) -> None:
    plain = load(folder)
    policy = load(folder, lora=LoraOptions(rank=2, targets=["q_proj", "down_proj", "experts.gate_up_proj"]))
    torch.testing.assert_close(canvas_logits(policy), canvas_logits(plain), rtol=0, atol=1e-5)
    encoder = policy.model.model.encoder.language_model.layers[1]
    assert encoder.self_attn.q_proj is policy.body.layers[1].self_attn.q_proj
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and "vision" not in name for name in trained)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    moved = canvas_logits(policy)
    assert (moved - canvas_logits(plain)).abs().max() > 0.1
    save_policy(policy, TOKENIZER, tmp_path / "adapters")
    assert torch.equal(canvas_logits(load(tmp_path / "adapters")), moved)
    # Merged once, not once for the encoder and once for the decoder.
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(canvas_logits(load(tmp_path / "out")), moved, rtol=0, atol=1e-4)
    whole = load(folder, lora=LoraOptions(rank=1))
    assert not any(".router." in name for name, p in whole.named_parameters() if p.requires_grad)


def run_of(folder: Path, source: Path, *overrides: str) -> list[str]:
    return runs.tiny_config(
        folder, "model.backbone={}", f"model.path={source}", "train.steps=1", "eval.viewer_items=1",
        "train.max_logprob_gap=1e-3", "sampler.preset=entropy_bound", "sampler.entropy_bound=1.2",
        "sampler.temperature=0.8", "sampler.final_temperature=0.4", "sampler.num_inference_steps=8",
        "eval.num_inference_steps=[8]", *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_trained_saved_and_read_by_transformers(folder: Path, tmp_path: Path, lora: bool) -> None:
    """Two supervised updates and an RL step of two updates; the sampler's log-probs are the learner's."""
    more = ["model.lora.rank=2", "algorithm.kl_to=reference", "algorithm.kl_coef=0.1"] if lora else []
    runs.train_here(run_of(tmp_path, folder, *more))
    line = runs.lines(tmp_path / "run", "train")[0]
    assert line["policy/logprob_gap"] < 1e-5 and 0.5 < line["moe/load_entropy"] < 1
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    trained = load(tmp_path / "out")
    logits = canvas_logits(trained)
    assert (logits - canvas_logits(load(folder))).abs().max() > 1e-3
    model = gemma.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        other = model(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=torch.tensor([[1, 4, 2, 0]])).logits
    kept = noise_tokens(trained)
    torch.testing.assert_close(logits[..., kept], other[..., kept], rtol=0, atol=2e-4)


def test_zero_3_on_two_ranks_is_one_rank(folder: Path, tmp_path: Path) -> None:
    """Rollouts stop early, so that ranks have chains of other lengths: no rank waits for another."""
    settings = ["sft.steps=0", "train.epochs=1", "sampler.stop_entropy=0.5"]
    runs.train_here(run_of(tmp_path / "one", folder, *settings))
    both = run_of(tmp_path / "two", folder, *settings, f"train.deepspeed={runs.ZERO[3]}")
    result = runs.ranks(2, *runs.many([both]))
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (runs.weights(at / "run") for at in (tmp_path / "one", tmp_path / "two"))
    assert runs.largest_difference(one, two) < 1e-5


def test_trls_template_is_a_template_like_any_other() -> None:
    trl = pytest.importorskip("trl.chat_template_utils")
    template = getattr(trl, "diffusion_gemma_training_chat_template", None)
    if template is None:
        pytest.skip("this TRL has no template of DiffusionGemma")
    from rl.tasks.chat import answer_text, prompt_text

    tokenizer = char_tokenizer("01234=")
    tokenizer.chat_template = template
    example = {"prompt": "3=", "answer": [{"role": "assistant", "content": "12"}]}
    bos = tokenizer.bos_token or ""
    assert prompt_text(tokenizer, example, True) == f"{bos}<|turn>user\n3=<turn|>\n<|turn>model\n"
    assert answer_text(tokenizer, example, True) == "12<turn|>"


def test_routers_can_stay_as_they_are(folder: Path) -> None:
    policy = load(folder, train_router=False)
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad and "vision" not in name}
    assert frozen and all(".router." in name for name in frozen)
    assert len(routing.routers(policy)) == 3


@pytest.mark.parametrize(
    ("text", "whole", "message"),
    [
        ({"top_k_experts": 9}, {}, r"num_experts_per_tok 9 and num_experts 6"),
        ({"num_experts": None}, {}, r"no text_config\.num_experts"),
        ({"attention_bias": True}, {}, r"biases of their own"),
        ({}, {"canvas_length": 0}, r"canvas_length 0"),
        ({}, {"tie_word_embeddings": False}, r"read with tied weights only"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, text: Any, whole: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | whole))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.preset=null", "sampler.selector=top_n"], r"denoises canvases by their entropy"),
        (["sampler.gen_length=6"], r"sampler\.gen_length \(6\) must be a multiple of the model's canvas of 4"),
        (["sampler.last_step=argmax"], r"sampler\.last_step argmax decides tokens without a log-prob"),
        (["algorithm={name: espo}"], r"'espo' scores masks"),
        (
            ["algorithm={name: udm_grpo}"],
            r"'udm_grpo' scores uniform noise, .* in canvases: .* tracerl, cj_grpo$",
        ),
        ([f"model.backbone={json.dumps(runs.GPT2)}", "model.path=null"], r"sampler\.final_temperature is for models"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, run: Any, overrides: list[str], message: str
) -> None:
    import re

    code, _, error = run("check", *run_of(tmp_path, folder, *overrides))
    assert code == 2 and re.search(message, error), error

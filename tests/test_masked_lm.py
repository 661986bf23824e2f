"""Masked language models of Hugging Face as policies: their own logits, the contract, folders, a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM

from rl.estimators.trace_rows import remask_rows
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.models.masked_lm import MaskedLM
from rl.tasks.char_tokenizer import char_tokenizer
from rl.values.model import PolicyWithValue, ValueModel
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.options import SamplerOptions
from tests import runs

PAD, MASK, CLS, SEP = 1, 11, 0, 2
SIZES = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
ESM = {"mask_token_id": MASK, "token_dropout": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "bert": {},
    "distilbert": {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32},
    "electra": {"embedding_size": 8},
    "esm": {**ESM, "position_embedding_type": "rotary"},
    "esm-absolute": {**ESM, "position_embedding_type": "absolute"},
    "esmc": {"mask_token_id": MASK, "bos_token_id": CLS, "eos_token_id": SEP},
    "modernbert": {"bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP},
    "roberta": {},
}
SOME = ["bert", "esm", "roberta"]


def plain(name: str, seed: int = 0) -> Any:
    """A tiny `...ForMaskedLM` in float64 whose predictions are peaked and differ by position and context."""
    config = AutoConfig.for_model(name.partition("-")[0], **SIZES | ARCHITECTURES[name])
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def policy(name: str, seed: int = 0, **settings: Any) -> MaskedLM:
    around = {"begin_token_ids": [CLS], "end_token_ids": [SEP]}
    return MaskedLM(plain(name, seed), MASK, **around | settings)


def canvases() -> tuple[torch.Tensor, list[int]]:
    """Three canvases with masks, right-padded with masks as the engine pads; one holds the padding token as content."""
    ids = torch.tensor(
        [[4, 5, MASK, PAD, 7, MASK, 3, 9], [8, MASK, MASK, 5, 6, MASK, MASK, MASK], [3, 4, MASK] + [MASK] * 5]
    )
    return ids, [8, 5, 3]


def visible_of(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])[:, None]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_padded_batch_gets_the_models_own_logits(name: str) -> None:
    """The model itself is given one whole sequence at a time, `CLS canvas SEP` without padding."""
    model = policy(name)
    ids, lengths = canvases()
    ours = model(ids, visible=visible_of(ids, lengths))
    for row, length in enumerate(lengths):
        whole = torch.tensor([[CLS, *ids[row, :length].tolist(), SEP]])
        inputs: dict[str, Any] = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if name in ("roberta", "esm-absolute"):
            # Left to themselves these models take a padding token inside the canvas for padding.
            inputs["position_ids"] = torch.arange(PAD + 1, PAD + 1 + whole.shape[1])[None]
        theirs = model.model(**inputs).logits[0, 1:-1]
        other = [i for i in range(12) if i != MASK]
        torch.testing.assert_close(ours[row, :length][:, other], theirs[:, other], rtol=0, atol=1e-10)
        assert (ours[row, :length, MASK] - theirs[:, MASK] < -1e8).all()


@torch.no_grad()
def test_positions_count_from_behind_the_padding_id() -> None:
    model = policy("roberta")
    assert model.max_length == 64 - (PAD + 1) - 2
    longest = torch.full((1, model.max_length), MASK)
    whole = torch.cat([torch.tensor([[CLS]]), longest, torch.tensor([[SEP]])], 1)
    theirs = model.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[:, 1:-1, :MASK]
    torch.testing.assert_close(model(longest)[..., :MASK], theirs, rtol=0, atol=1e-10)
    # BERT counts from 0.
    assert policy("bert").max_length == 64 - 2
    assert policy("bert", begin_token_ids=[], end_token_ids=[]).max_length == 64


@torch.no_grad()
def test_forbidden_tokens_have_probability_zero() -> None:
    model = policy("bert", excluded_token_ids=[[0, 3], [7, 8]])
    assert isinstance(model, DenoisingModel)
    ids, lengths = canvases()
    model.model.get_output_embeddings().weight[[MASK, 7]] *= 100
    for temperature in (0.1, 1.0, 10.0):
        probabilities = (model(ids, visible=visible_of(ids, lengths)) / temperature).softmax(-1)
        assert (probabilities[..., [0, 1, 2, 7, MASK]] == 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_learner_and_sampler_agree(name: str) -> None:
    model = policy(name, excluded_token_ids=[[0, 3]])
    options = SamplerOptions(gen_length=8, num_inference_steps=4, temperature=0.9, top_p=0.95)
    requests = [Request([3 + n % 5] * n, seed=n) for n in range(1, 8) for _ in range(2)]
    trajectories = InProcessEngine(model, options, eos_token_id=4, max_batch_size=5).generate(requests)
    with torch.no_grad():
        logprob = remask_rows(trajectories).score(model).logprob
    recorded = np.concatenate([t.logprob[t.is_reveal] for t in trajectories])
    assert len(set(recorded.round(3))) > 30
    np.testing.assert_allclose(logprob.numpy(), recorded, rtol=0, atol=1e-9)
    drawn = np.concatenate([t.token for t in trajectories])
    assert not set(drawn.tolist()) & {0, 1, 2, MASK}


@pytest.mark.parametrize("name", SOME)
def test_a_value_model_leaves_the_head_alone_and_shared_embeddings_trainable(name: str) -> None:
    model = policy(name)
    trajectory = InProcessEngine(model, SamplerOptions(gen_length=4, num_inference_steps=2)).generate([Request([3], 0)])
    rows = remask_rows(trajectory)
    critic = ValueModel(model).double()
    assert (critic(rows) == 0).all() and not any(p.requires_grad for p in critic.model.head_parameters())
    torch.nn.init.ones_(critic.head.linear.weight)
    critic(rows).sum().backward()
    frozen = {id(p) for p in critic.model.head_parameters()}
    for key, parameter in critic.named_parameters():
        if "contact_head" not in key:
            assert (parameter.grad is None) == (id(parameter) in frozen), key
    embedding = critic.model.get_input_embeddings().weight
    assert embedding.grad is not None and critic.model.get_output_embeddings().weight is embedding
    scores = PolicyWithValue(model).double()(rows)
    assert scores.logprob.shape == scores.value.shape == (4,)


def test_models_that_do_not_fit_the_protocol_are_refused() -> None:
    ids = torch.full((1, 4), MASK)
    model = policy("bert")
    with pytest.raises(ValueError, match=r"set rollout\.cache to none"):
        model.hidden_states(ids, cache=object())
    with pytest.raises(ValueError, match=r"set algorithm\.pack_to to null"):
        model.hidden_states(ids, visible=torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"set algorithm\.pack_to to null"):
        model.hidden_states(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="special token id 12 must lie in the vocabulary of 12"):
        policy("bert", end_token_ids=[12])
    for name in ("fnet", "convbert"):
        mixing = AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **SIZES))
        with torch.no_grad():
            for parameter in mixing.parameters():
                parameter.normal_(0.0, 0.5)
        with pytest.raises(ValueError, match="mixes padding into its predictions"):
            MaskedLM(mixing, MASK)
    bart = AutoConfig.for_model("bart", vocab_size=12, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match="is no encoder"):
        MaskedLM(AutoModelForMaskedLM.from_config(bart), MASK)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_policy_loads_with_equal_logits(name: str, tmp_path: Path) -> None:
    model = policy(name, excluded_token_ids=[[0, 3]])
    tokenizer = char_tokenizer("0123456=")
    ids, lengths = canvases()
    for _ in range(2):
        save_policy(model, tokenizer, tmp_path)
        loaded = load_policy(ModelConfig(path=str(tmp_path)), None, seed=0)
        assert isinstance(loaded, MaskedLM) and loaded.dtype == torch.float64 and not loaded.training
        assert loaded.settings == model.settings
        with torch.no_grad():
            # The weights are equal to the bit; a matrix that lies elsewhere in memory may be summed in another order.
            for key, tensor in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], tensor), key
            expected = model(ids, visible_of(ids, lengths))
            torch.testing.assert_close(loaded(ids, visible_of(ids, lengths)), expected, rtol=0, atol=1e-12)
        model = loaded
    # It is still what transformers itself loads.
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in model.model.state_dict().items())


def test_a_published_folder_gets_its_special_tokens_from_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer("012345=")
    mask, eos, pad = tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.pad_token} $A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.pad_token, pad), (tokenizer.eos_token, eos)],
    )
    plain("bert").save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), never_generate=["special", "5", 0])
    model = load_policy(config, tokenizer, seed=0)
    assert model.settings["begin_token_ids"] == [pad] and model.settings["end_token_ids"] == [eos]
    assert model.mask_token_id == mask
    # Ids 10 and 11 are beyond the tokenizer.
    assert model.excluded_token_ids == [[0, 1], [5, 6], [7, 12]]
    bare = load_policy(config.model_copy(update={"wrap": False}), tokenizer, seed=0)
    assert bare.settings["begin_token_ids"] == bare.settings["end_token_ids"] == []
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        load_policy(config, None, seed=0)
    with pytest.raises(ValueError, match=r"model\.never_generate names 'x', which is no token"):
        load_policy(config.model_copy(update={"never_generate": ["x"]}), tokenizer, seed=0)
    with pytest.raises(ValueError, match=r"model\.tokenizer knows token id 13 and the model has a vocabulary of 12"):
        load_policy(config, char_tokenizer("0123456789="), seed=0)


@pytest.mark.parametrize("name", SOME)
def test_weights_that_do_not_fit_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    policy(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if k.endswith("layer.1.output.dense.weight"))

    def refusal(change: dict[str, torch.Tensor | None]) -> str:
        changed = {k: v for k, v in {**weights, **change}.items() if v is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError) as caught:
            load_policy(ModelConfig(path=str(tmp_path)), None, seed=0)
        message = str(caught.value)
        assert "\n" not in message and f"model.path {str(tmp_path)!r}" in message
        return message

    assert f"1 weights are missing, {key} first" in refusal({key: None})
    assert f"{key} has shape [3, 32] instead of [16, 32]" in refusal({key: weights[key][:3].clone()})
    assert "1 weights belong to no such model, extra.weight first" in refusal({"extra.weight": torch.ones(2)})
    # Parts for other tasks are what published checkpoints come with.
    spare = {f"{name}.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.weight": torch.ones(2, 16)}
    save_file({**weights, **spare}, file, metadata={"format": "pt"})
    load_policy(ModelConfig(path=str(tmp_path)), None, seed=0)


def test_weights_in_memory_make_a_policy() -> None:
    model = plain("roberta")
    config = {"model_type": "roberta", **SIZES}
    state = model.state_dict()
    settings: dict[str, Any] = {"mask_token_id": MASK, "begin_token_ids": [CLS], "end_token_ids": [SEP]}
    tied = {k: v for k, v in state.items() if k not in ("lm_head.decoder.weight", "lm_head.decoder.bias")}
    ids, lengths = canvases()
    with torch.no_grad():
        expected = policy("roberta")(ids, visible_of(ids, lengths))
        for weights in (state, tied):
            made = MaskedLM.from_weights(config, weights, **settings).double()
            torch.testing.assert_close(made(ids, visible_of(ids, lengths)), expected, rtol=0, atol=1e-3)
    del tied["roberta.embeddings.position_embeddings.weight"]
    with pytest.raises(ValueError, match=r"incomplete: 1 weights are missing, roberta\.embeddings\.position_emb"):
        MaskedLM.from_weights(config, tied, **settings)


def dplm_folder(folder: Path, seed: int = 0) -> Any:
    """A tiny model as DPLM's hub folders are: ESM-2's tensors, an own head, an own class name, a .bin file."""
    tokenizer = char_tokenizer("LAGV=")
    config = AutoConfig.for_model("esm", **SIZES | ARCHITECTURES["esm"], tie_word_embeddings=False)
    config.vocab_size, config.mask_token_id = len(tokenizer), tokenizer.mask_token_id
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    # The published config says nothing of the head.
    del described["tie_word_embeddings"]
    (folder / "config.json").write_text(
        json.dumps(described | {"architectures": ["EsmForDPLM"], "dplm_type": "dplm_esm"})
    )
    (folder / "model.safetensors").unlink()
    spare = {"esm.contact_head.regression.weight": torch.ones(1, 4), "esm.contact_head.regression.bias": torch.ones(1)}
    torch.save({**model.state_dict(), **spare}, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    return model


def test_a_folder_of_dplm_loads_with_its_own_head(tmp_path: Path) -> None:
    theirs, tokenizer = dplm_folder(tmp_path), char_tokenizer("LAGV=")
    model = load_policy(ModelConfig(path=str(tmp_path), wrap=False), tokenizer, seed=0)
    assert isinstance(model, MaskedLM)
    ids = torch.tensor([[3, 4, model.mask_token_id, 5]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model(ids)[..., :3], expected[..., :3], rtol=0, atol=1e-5)
    assert not torch.equal(theirs.lm_head.decoder.weight, theirs.esm.embeddings.word_embeddings.weight)
    # A checkpoint of DPLM's own trainer has the same tensors behind a prefix.
    state = {f"model.net.{name}": tensor for name, tensor in theirs.state_dict().items()}
    stripped = {name.removeprefix("model.net."): tensor for name, tensor in state.items()}
    made = MaskedLM.from_weights(theirs.config, stripped, tokenizer.mask_token_id)
    with torch.no_grad():
        torch.testing.assert_close(made(ids), model(ids), rtol=0, atol=1e-5)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_masked_lm_is_trained_and_loads_again(tmp_path: Path) -> None:
    """The whole loop with a value model: warm start, RL, checkpoint, and the folder evaluates."""
    tokenizer = char_tokenizer("01234=")
    sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    base = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **sizes, type_vocab_size=1))
    eos = tokenizer.eos_token_id
    save_policy(MaskedLM(base, tokenizer.mask_token_id, [eos], [eos]), tokenizer, tmp_path / "base")
    arguments = runs.tiny_config(
        tmp_path,
        "model.backbone={}",
        f"model.path={tmp_path / 'base'}",
        "model.never_generate=[special]",
        "train.max_logprob_gap=1e-4",
        "train.steps=2",
        "algorithm={name: tracerl, value: {lam: 0.9}}",
    )
    runs.train_here(arguments)
    assert max(runs.series(tmp_path / "run", "train", "policy/logprob_gap_max")) < 1e-4
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "base", tmp_path / "run/warm_start"))
    trained = runs.weights(tmp_path / "run")
    assert runs.largest_difference({k: v.numpy() for k, v in after.items()}, trained) > 1e-3
    assert before.keys() == after.keys() == trained.keys()
    folder = tmp_path / "run" / "checkpoints" / "step_2" / "hf"
    loaded = load_policy(ModelConfig(path=str(folder)), None, seed=0)
    specials = {i for start, stop in loaded.excluded_token_ids for i in range(start, stop)}
    assert specials == set(tokenizer.all_special_ids)


@pytest.mark.parametrize("name", ["dplm", "esmc"])
def test_a_protein_model_is_sampled_trained_and_exported(name: str, tmp_path: Path) -> None:
    tokenizer, base = char_tokenizer("01234="), tmp_path / "base"
    kind = "esm" if name == "dplm" else name
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    extra = ARCHITECTURES[kind] | {"mask_token_id": tokenizer.mask_token_id}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **sizes | extra))
    eos = tokenizer.eos_token_id
    save_policy(MaskedLM(model, tokenizer.mask_token_id, [eos], [eos]), tokenizer, base)
    arguments = runs.tiny_config(
        tmp_path,
        "model.backbone={}",
        f"model.path={base}",
        "model.never_generate=[special]",
        "sft.steps=0",
        "train.max_logprob_gap=1e-4",
        "train.steps=1",
    )
    runs.train_here(arguments)
    folder = tmp_path / "run" / "checkpoints" / "step_1" / "hf"
    trained = load_policy(ModelConfig(path=str(folder)), None, seed=0)
    save_policy(trained, tokenizer, tmp_path / "again")
    again = load_policy(ModelConfig(path=str(tmp_path / "again")), None, seed=0)
    theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.tensor([[3, 4, trained.mask_token_id, 2, 5]])
    whole = torch.cat([torch.tensor([[eos]]), ids, torch.tensor([[eos]])], 1)
    with torch.no_grad():
        assert torch.equal(trained(ids), again(ids))
        expected = theirs(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[:, 1:-1, :5]
        torch.testing.assert_close(trained(ids)[..., :5], expected, rtol=0, atol=1e-5)
    before = load_file(base / "model.safetensors")
    assert max(float((before[k] - v).abs().max()) for k, v in load_file(folder / "model.safetensors").items()) > 1e-5

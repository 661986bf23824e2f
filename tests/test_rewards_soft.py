"""Differentiable rewards: one function of text and of soft sequences, with frozen parameters and the right gradient."""

from __future__ import annotations

import csv
import gzip
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.load import load_reward
from rewards.motifs import CONSENSUS, MotifActivity, consensus_matrix, load_matrices, log_odds
from rewards.protein import AMINO_ACIDS, Hydropathy, NetCharge, ResidueContent
from rewards.sequence_oracle import SequenceOracle, train_oracle
from rewards.soft import DifferentiableSum, SoftReward, one_hot_of


def texts_over(alphabet: str, count: int, length: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(alphabet), length)) for _ in range(count)]


@pytest.fixture(scope="module")
def oracle_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oracle of the number of G, which a few seconds suffice to learn."""
    path = tmp_path_factory.mktemp("oracle") / "oracle.safetensors"
    texts = texts_over("ACGT", 256, 12)
    labels = [text.count("G") / 2 for text in texts]
    error = train_oracle(texts, labels, path, channels=8, epochs=10, batch_size=32, lr=2e-2)
    assert error < 0.5 * np.var(labels)
    return path


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *AMINO_ACIDS, "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folder = str(tmp_path_factory.mktemp("masked_lm"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=25, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, initializer_range=0.5, type_vocab_size=1,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def rewards_by_name(oracle_file: Path, masked_lm: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "motifs": ("motif_activity", {}),
        "oracle": ("sequence_oracle", {"path": str(oracle_file)}),
        "charge": ("net_charge", {"target": 2.0, "tolerance": 3.0}),
        "hydropathy": ("hydropathy", {}),
        "content": ("residue_content", {"residues": "KR"}),
        "humanness": ("pseudo_likelihood", {"model": masked_lm}),
        "masked humanness": ("pseudo_likelihood", {"model": masked_lm, "masked": True}),
    }


NAMES = ["motifs", "oracle", "charge", "hydropathy", "content", "humanness", "masked humanness"]


@pytest.mark.parametrize("name", NAMES)
def test_text_and_one_hots_get_the_same_value_and_the_gradient_goes_to_the_sequence(
    name: str, oracle_file: Path, masked_lm: str
) -> None:
    spec, params = rewards_by_name(oracle_file, masked_lm)[name]
    reward: Any = load_reward(spec, params)
    assert reward.differentiable is True
    texts = texts_over(reward.alphabet, 4, 20)
    prompts = ["ACD", "AC", "ACD", "A"]
    hard = torch.tensor([score.value for score in reward(prompts, texts)])
    assert hard.std() > 1e-4
    x = one_hot_of(texts, reward.alphabet).requires_grad_(True)
    soft = reward.soft(prompts, x)
    torch.testing.assert_close(soft.detach(), hard, rtol=1e-5, atol=1e-6)
    soft.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 1e-4
    for value in vars(reward).values():
        if isinstance(value, torch.nn.Module):
            assert all(not p.requires_grad and p.grad is None for p in value.parameters())
    # Along a soft direction the gradient is the finite difference (float32: 1e-2 steps, central).
    generator = torch.Generator().manual_seed(0)
    mixed = (0.6 * x.detach() + 0.4 / len(reward.alphabet)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.soft(prompts, mixed).sum(), mixed)
    direction = torch.randn(mixed.shape, generator=generator) / mixed.numel() ** 0.5
    ends = [float(reward.soft(prompts, mixed.detach() + s * 0.02 * direction).sum()) for s in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.03, abs=3e-3)


@pytest.mark.parametrize("name", ["motifs", "charge", "hydropathy", "content"])
def test_a_foreign_letter_is_a_row_of_zeros_and_nothing_is_a_reason(
    name: str, oracle_file: Path, masked_lm: str
) -> None:
    spec, params = rewards_by_name(oracle_file, masked_lm)[name]
    reward: Any = load_reward(spec, params)
    text = texts_over(reward.alphabet, 1, 20)[0]
    holed = one_hot_of([text], reward.alphabet)
    holed[0, 7] = 0
    scores = reward(["A", "A"], [text[:7] + "?" + text[8:], ""])
    assert scores[0].value == pytest.approx(float(reward.soft(["A"], holed)[0]), abs=1e-6)
    assert scores[1].value is None and scores[1].reason == "the completion is empty"


def test_motif_activity_by_hand() -> None:
    reward = MotifActivity(weights={"FOXA2": 1.2, "ZEB1": -1.0}, synergy=None)
    site, other = "TGTTTACTTA", "CCCACCTGAA"
    matrix = log_odds(consensus_matrix(CONSENSUS["FOXA2"]))
    # 0.85 in the first column with 0.01 added to each of four letters, against 1/4.
    assert matrix[0]["ACGT".index("T")] == pytest.approx(math.log(4 * 0.86 / 1.04))
    best = sum(max(column) for column in matrix)
    background = "A" * 12
    alone, planted = (reward(["x"], [text])[0].value for text in (background, site + background))
    repressed = reward(["x"], [site + other + background])[0].value
    assert planted - alone > 0.4
    assert repressed < planted - 0.4
    # One site of the highest score: occupancy sigmoid(1.5 * 0.35 * best), nearly 1.
    occupancy = reward.occupancy(one_hot_of([site], "ACGT"))["FOXA2"]
    assert float(occupancy) == pytest.approx(1 / (1 + math.exp(-1.5 * 0.35 * best)), abs=1e-5)


def test_synergy_needs_both_motifs() -> None:
    plain, with_synergy = MotifActivity(synergy=None), MotifActivity()
    a, c = "GTTAATAATT", "ATTACGCAAT"
    for text, expected in ((a + "G" * 20, 0.0), (a + c + "G" * 10, (1 - math.exp(-1)) ** 2)):
        more = with_synergy(["x"], [text])[0].value - plain(["x"], [text])[0].value
        assert more == pytest.approx(expected, abs=0.05)


def test_motifs_from_a_file_and_from_the_optional_package(tmp_path: Path) -> None:
    path = tmp_path / "motifs.csv.gz"
    rows = [["motif", "pos", "A", "C", "G", "T"], ["X.GATA", 1, 0, 0, 0, 1], ["X.GATA", 0, 0.7, 0.1, 0.1, 0.1]]
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)
    assert load_matrices(["gata"], str(path)) == {"gata": [[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]]}
    with pytest.raises(ValueError, match=r"motif 'FOX' fits 0 motifs of .*: name one of them, such as X.GATA"):
        load_matrices(["FOX"], str(path))
    with pytest.raises(ValueError, match="is no file, and none of consensus, jaspar, hocomoco"):
        load_matrices(["FOX"], str(tmp_path / "nothing.csv"))
    try:
        jaspar = load_matrices(["HNF1A"], "jaspar")["HNF1A"]
    except ValueError as error:
        assert "pip install --no-deps pyprego" in str(error)
    else:
        assert all(sum(column) == pytest.approx(1.0, abs=1e-2) for column in jaspar)


def test_protein_terms_by_hand() -> None:
    text = "KKRDEH" + "A" * 4
    charge = 2 * 0.999 + 1.0 - 1.0 - 0.999 + 0.038
    assert NetCharge()(["x"], [text])[0].value == pytest.approx(charge, abs=1e-5)
    assert NetCharge(target=0.0, tolerance=2.0)(["x"], [text])[0].value == pytest.approx(-((charge / 2) ** 2), abs=1e-5)
    hydropathy = (2 * -3.9 - 4.5 - 3.5 - 3.5 - 3.2 + 4 * 1.8) / 10
    assert Hydropathy()(["x"], [text])[0].value == pytest.approx(hydropathy, abs=1e-5)
    assert ResidueContent("KA")(["x"], [text])[0].value == pytest.approx(0.6)
    with pytest.raises(ValueError, match="must be letters of"):
        ResidueContent("KB")
    with pytest.raises(ValueError, match="tolerance must be positive"):
        NetCharge(tolerance=0)


def test_humanness_against_the_model_itself(masked_lm: str) -> None:
    """One sequence at a time through the whole model, without embeddings made by hand."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(masked_lm), AutoModelForMaskedLM.from_pretrained(masked_lm)
    prompt, text = "ACD", "WYK"
    ids = tokenizer(prompt + text, return_tensors="pt").input_ids
    where = range(4, 7)
    with torch.no_grad():
        shown = model(ids).logits.log_softmax(-1)[0]
        one_pass = sum(float(shown[i, ids[0, i]]) for i in where) / 3
        hidden = 0.0
        for i in where:
            holed = ids.clone()
            holed[0, i] = tokenizer.mask_token_id
            hidden += float(model(holed).logits.log_softmax(-1)[0, i, ids[0, i]]) / 3
    for masked, expected in ((False, one_pass), (True, hidden)):
        reward: Any = load_reward("pseudo_likelihood", {"model": masked_lm, "masked": masked, "scale": 2.0})
        assert reward([prompt], [text])[0].value == pytest.approx(2 * expected, abs=1e-5)
    assert abs(one_pass - hidden) > 1e-2


def test_an_oracle_is_fitted_saved_and_says_what_is_missing(oracle_file: Path, tmp_path: Path) -> None:
    oracle = SequenceOracle(str(oracle_file))
    texts = texts_over("ACGT", 200, 20, seed=1)
    values = [score.value for score in oracle(["x"] * 200, texts)]
    assert np.corrcoef(values, [text.count("G") for text in texts])[0, 1] > 0.7
    with pytest.raises(ValueError, match=r"no file .* denoise-rl align trains it"):
        SequenceOracle(str(tmp_path / "nothing.safetensors"))


def test_a_sum_joins_alphabets_and_weights() -> None:
    class Weird(SoftReward):
        alphabet = "TA?"

        def soft(self, prompts: Any, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
            return completions[..., 0].sum(1) - completions[..., 1].sum(1)

    total = DifferentiableSum([("motif_activity", 0.5, {}), ("residue_content", -2.0, {"residues": "A"})])
    assert total.alphabet.startswith("ACGT") and sorted(total.alphabet) == sorted(set("ACGT") | set(AMINO_ACIDS))
    text = "GTTAATAATTCCA"
    expected = 0.5 * MotifActivity()(["x"], [text])[0].value - 2.0 * text.count("A") / len(text)
    assert float(total.soft(["x"], one_hot_of([text], total.alphabet))[0]) == pytest.approx(expected, abs=1e-5)
    assert Weird()(["x"], ["TTA?G"])[0].value == 1.0
    with pytest.raises(ValueError, match=r"reward 'sudoku' .* has no gradient: algorithm.gradient pathwise needs"):
        DifferentiableSum([("sudoku", 1.0, {})])


def test_naming_a_differentiable_reward_imports_no_torch() -> None:
    code = "import sys, rewards.soft, rewards.motifs, rewards.protein; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

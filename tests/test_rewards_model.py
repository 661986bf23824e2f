"""Sequence classifiers as rewards: tiny random ones with the real classes, and one that TRL's RewardTrainer trained."""

import pytest

from rewards import RewardPart, RewardRunner, load_reward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "<eos>", "[CLS]", "good", "bad", "fine", "answer", "question", "user", "assistant"]


def save_tokenizer(folder, chat_template=None, cls=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if cls:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def causal_classifier(folder, seed=0, num_labels=1):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=num_labels,
        pad_token_id=0,
        initializer_range=0.5,
    )
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_values_are_the_models_and_do_not_depend_on_the_batch(tmp_path):
    model = causal_classifier(tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    completions = ["good", "bad bad bad bad bad", "fine answer", "good bad"]
    expected = []
    for text in completions:
        ids = tokenizer("question " + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).logits[0, 0].item())
    assert len({round(number, 3) for number in expected}) == 4
    for batch_size in (1, 2, 16):
        with RewardRunner(
            [RewardPart("reward_model", params={"model": str(tmp_path), "batch_size": batch_size, "device": "cpu"})]
        ) as runner:
            table = runner.score(["question "] * 4, completions)
        assert table.values == pytest.approx(expected, abs=1e-5)


def test_classes_special_tokens_and_judging_the_completion_alone(tmp_path):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.7,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, cls=True)
    with torch.no_grad():
        logits = model(torch.tensor([[2, 3, 6]])).logits[0]
    params = {"model": str(tmp_path), "include_prompt": False, "device": "cpu"}
    for label in ("POSITIVE", 1):
        reward = load_reward("reward_model", {**params, "label": label})
        assert reward(["question"], ["good answer"])[0].value == pytest.approx(
            logits.log_softmax(-1)[1].item(), abs=1e-5
        )
    with pytest.raises(ValueError, match=r"set `label` to one of \['NEGATIVE', 'POSITIVE'\]"):
        load_reward("reward_model", params)


def test_chats_use_the_template_once(tmp_path):
    model = causal_classifier(tmp_path)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    save_tokenizer(tmp_path, chat_template=template)
    reward = load_reward("reward_model", {"model": str(tmp_path), "device": "cpu"})
    chat = [[{"role": "user", "content": "question"}]]
    answer = [[{"role": "assistant", "content": "good"}]]
    with torch.no_grad():
        expected = model(torch.tensor([[8, 7, 9, 3]])).logits[0, 0].item()
    assert reward(chat, answer)[0].value == pytest.approx(expected, abs=1e-5)


def test_long_texts_keep_their_end(tmp_path):
    model = causal_classifier(tmp_path)
    save_tokenizer(tmp_path)
    reward = load_reward("reward_model", {"model": str(tmp_path), "max_length": 2, "device": "cpu"})
    with torch.no_grad():
        expected = model(torch.tensor([[4, 3]])).logits[0, 0].item()
    assert reward(["question fine "], ["bad good"])[0].value == pytest.approx(expected, abs=1e-5)


def test_an_empty_text_is_no_verdict_and_harms_no_other(tmp_path):
    causal_classifier(tmp_path)
    save_tokenizer(tmp_path)
    reward = load_reward("reward_model", {"model": str(tmp_path), "device": "cpu"})
    empty, good = reward(["", ""], ["", "good"])
    assert empty.failed and "empty text" in empty.reason
    assert good.value == pytest.approx(reward([""], ["good"])[0].value, abs=1e-5)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="cannot load model"):
        load_reward("reward_model", {"model": "/no/such/folder"})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_trained_by_trls_reward_trainer_prefers_what_it_was_taught(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    causal_classifier(tmp_path / "start")
    tokenizer = save_tokenizer(tmp_path / "start")
    pairs = [{"prompt": "question ", "chosen": f"{a} good", "rejected": f"{a} bad"} for a in ("fine", "answer")] * 8
    config = trl.RewardConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", num_labels=1)
    trl.RewardTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    ).train()
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")

    params = {"model": str(tmp_path / "trained"), "append_eos": True, "device": "cpu"}
    with RewardRunner([RewardPart("reward_model", params=params)]) as runner:
        good, bad = runner.score(["question "] * 2, ["fine good", "fine bad"]).values
    assert good > bad + 1.0
    # `append_eos` is what makes the text the one it was trained on.
    with torch.no_grad():
        ids = torch.tensor([[7, 5, 3, 1]])
        assert good == pytest.approx(model.eval()(ids).logits[0, 0].item(), abs=1e-4)

"""The `convert` stage: an autoregressive language model becomes a diffusion model (docs/convert.md).

The weights are the autoregressive model's own, the attention is already that of a diffusion model. The stage teaches
them to predict masked tokens, on the frozen model's own answers to the task's prompts or on texts of the user's. What
is hidden and what is fitted: `rl/estimators/conversion.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rewards.causal_lm import load_causal_lm, load_causal_tokenizer
from rl import distributed
from rl.estimators.conversion import Text, conversion_rows, soft_rows
from rl.estimators.rows import TokenRows
from rl.files import write_whole
from rl.stage_sections import ConvertConfig
from rl.tasks.chat import answer_text, token_ids
from rl.tasks.records import read_records
from rl.train.run import Run
from rl.train.sft import Fit, Part, epochs, fit

ANSWERS = "answers.jsonl"


def convert(run: Run, command: str = "train", told_to_stop: Callable[[], int] = lambda: 0) -> dict[str, float]:
    """Run the stage on `run.model` and return its summary; see `rl.train.sft.fit`.

    Raises:
        ValueError: one line: the model, the teacher or the data do not fit the section `convert`.
    """
    config = run.config.convert
    _check(config, run.model)
    teacher = _teacher(run) if config.targets == "soft" or config.data == "samples" else None
    return fit(run, _Conversion(run, teacher, _texts(run, teacher)), command, told_to_stop)


def _check(config: ConvertConfig, model: Any) -> None:
    """Raise ValueError where the options do not fit the model."""
    causal = model.attention == "block_causal"
    if config.block_lengths and not causal:
        raise ValueError(
            "convert.block_lengths is for block-causal models, and this one has full attention: set it to []"
        )
    if config.noise == "nbdiff" and not (causal and getattr(model, "context_causal", False) and model.logit_shift):
        raise ValueError(
            "convert.noise nbdiff fits clean tokens autoregressively, which needs a shifted readout and a causal "
            "context: set model.convert's readout to shifted and its context to causal, or convert.noise to sdar"
        )
    for length in {length for phase in config.block_lengths for length in phase.lengths}:
        if length > model.max_length:
            raise ValueError(f"convert.block_lengths has {length}, and the model has {model.max_length} positions")


def _teacher(run: Run) -> Any:
    """The frozen autoregressive model, in the dtype of the policy.

    Raises:
        ValueError: there is none, or it has another vocabulary.
    """
    if getattr(run.model, "vision", None) is not None:
        return _Twin(run)
    path = run.config.convert.teacher or run.config.model.path
    if path is None:
        raise ValueError("convert.teacher is required: a new model (model.backbone) was no autoregressive model before")
    option = "convert.teacher" if run.config.convert.teacher else "model.path"
    try:
        teacher = load_causal_lm(path, str(next(run.model.parameters()).dtype).removeprefix("torch."))
        tokenizer = load_causal_tokenizer(path)
    except ValueError as error:
        hint = "" if run.config.convert.teacher else " (name the autoregressive model in convert.teacher)"
        raise ValueError(f"{option}: {error}{hint}") from error
    # The mask token is the diffusion model's own.
    own, theirs = (
        {(word, i) for word, i in source.get_vocab().items() if i != run.model.mask_token_id}
        for source in (run.modality.tokenizer, tokenizer)
    )
    if own != theirs or teacher.config.vocab_size > run.model.vocab_size:
        what = f", token {min(own ^ theirs)[0]!r} for one" if own != theirs else ""
        raise ValueError(
            f"{option} {path!r} has another vocabulary than the model{what}: name the model it was made of"
        )
    return teacher.to(run.device)


class _Twin:
    """The autoregressive model with a vision tower that the policy was made of: a copy of the policy's weights.

    With the shifted readout and causal context, block length 1 is that model (`rl/models/families/causal.py`).
    """

    def __init__(self, run: Run):
        """
        Raises:
            ValueError: the policy is no such model, or an option needs another one.
        """
        config, model = run.config.convert, run.model
        if config.data == "samples" or config.teacher is not None:
            name = "data samples" if config.data == "samples" else f"teacher {config.teacher}"
            raise ValueError(
                f"convert.{name} is for models of text alone: set convert.data to task or a file, teacher to null"
            )
        if not (getattr(model, "context_causal", False) and model.logit_shift):
            raise ValueError(
                "convert.targets soft of a model with a vision tower needs model.convert's readout shifted and context "
                "causal: set them, or convert.targets to hard"
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.get_output_embeddings = self.model.get_output_embeddings

    def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        width = input_ids.shape[1]
        causal = (
            torch.ones(width, width, dtype=torch.bool, device=input_ids.device).tril().expand(len(input_ids), -1, -1)
        )
        return SimpleNamespace(last_hidden_state=self.model.hidden_states(input_ids, visible=causal))


def _texts(run: Run, teacher: Any) -> list[Text]:
    """The texts of the stage.

    Raises:
        ValueError: there are none, or one that cannot be trained on.
    """
    data = run.config.convert.data
    if data == "samples":
        records = _samples(run, teacher)
        where = str(run.folder / "convert" / ANSWERS)
    elif data == "task":
        count = run.config.convert.num_texts
        records, where = _with_ids(run, run.task.train_examples(run.config.run.seed, 0, count), "the task"), "the task"
    else:
        records, where = _with_ids(run, read_records(data), data), data
    texts = []
    eos, mask = run.modality.tokenizer.eos_token_id, run.model.mask_token_id
    longest = run.config.sampler.gen_length
    for number, record in enumerate(records, start=1):
        prompt, answer = record["prompt_ids"], record["answer_ids"][:longest]
        if not prompt or not answer:
            raise ValueError(f"{where}: row {number} has an empty {'answer' if prompt else 'prompt'}: leave it out")
        if mask in prompt or mask in answer:
            raise ValueError(
                f"{where}: row {number} holds the mask token (id {mask}), which stands for what is not decided: choose "
                "another model.convert mask_token, or leave the row out"
            )
        texts.append(Text(np.array([*prompt, *answer]), len(prompt), answer[-1] == eos))
    if not texts:
        raise ValueError(f"convert.data: {where} holds no texts")
    return texts


def _with_ids(run: Run, examples: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Examples with `prompt_ids` and `answer_ids`; those of a file of sampled answers are kept as they are."""
    if examples and all(row.get("prompt_ids") and row.get("answer_ids") for row in examples):
        return examples
    for number, row in enumerate(examples, start=1):
        if row.get("prompt") is None or row.get("answer") is None:
            raise ValueError(f"{where}: row {number} has no {'prompt' if row.get('prompt') is None else 'answer'}")
    tokenizer, chat = run.modality.tokenizer, run.config.task.chat
    prompts = run.modality.prompt_ids(examples)
    answers = token_ids(tokenizer, [answer_text(tokenizer, row, chat) for row in examples])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        {"prompt_ids": prompt, "answer_ids": answer + (end if answer[-1:] != end else [])}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _samples(run: Run, teacher: Any) -> list[dict[str, Any]]:
    """The teacher's own answers to training prompts; made once, a batch at a time, and kept in the run folder.

    A batch depends on run seed and index alone, so a stopped run goes on with the next one.
    """
    config, seed = run.config.convert, run.config.run.seed
    path = run.folder / "convert" / ANSWERS
    records: list[dict[str, Any]] = []
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if run.config.run.resume and path.is_file():
            records = [json.loads(line) for line in path.read_text().splitlines()]
    begun = int(distributed.reduce_number(len(records), "sum", run.device))
    run.progress.stage("convert answers", config.num_texts)
    for index in range(begun // config.sample_batch_size, -(-config.num_texts // config.sample_batch_size)):
        first = index * config.sample_batch_size
        if distributed.rank() == 0:
            count = min(config.sample_batch_size, config.num_texts - first)
            rows = run.task.train_examples(seed, index, config.sample_batch_size)[:count]
            records = records[:first] + _answers(run, teacher, rows, seed + index)
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
            run.progress.update(len(records))
        # Ranks that wait for all answers at once would wait longer than a collective may take.
        distributed.barrier()
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def _answers(run: Run, teacher: Any, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Sampled answers, each up to its end token or `sampler.gen_length`."""
    tokenizer, config = run.modality.tokenizer, run.config.convert
    prompts = token_ids(tokenizer, [run.modality.prompt_text(row) for row in rows])
    width, eos = max(map(len, prompts)), tokenizer.eos_token_id
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=run.device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=run.device)
    # What the converted model can never say.
    never = [run.model.mask_token_id, *(i for span in run.model.excluded_token_ids for i in range(*span))]
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    # Nothing else in the run draws from torch's own generators here.
    torch.manual_seed(seed)
    made = teacher.generate(
        ids,
        attention_mask=seen,
        max_new_tokens=run.config.sampler.gen_length,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
        suppress_tokens=never,
        **(sampling if config.temperature else {"do_sample": False}),
    )[:, width:].tolist()
    answers = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in made]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        {"prompt": run.modality.prompt_text(row), "answer": text, "prompt_ids": prompt, "answer_ids": answer}
        for row, text, prompt, answer in zip(rows, texts, prompts, answers, strict=True)
    ]


class _Conversion(Fit):
    """Texts under noise; see `rl.estimators.conversion`."""

    name = "convert"

    def __init__(self, run: Run, teacher: Any, texts: list[Text]):
        super().__init__(run)
        self.teacher, self.texts = teacher, texts
        self._block: int | None = None
        self._masked = 0

    def batch(self, step: int) -> list[Text]:
        self._block, self._masked = self._block_length(step), 0
        return epochs(self.texts, self.seed, step, self.config.batch_size)

    def _block_length(self, step: int) -> int | None:
        if self.run.model.attention == "full":
            return None
        for phase in self.config.block_lengths:
            if step < phase.until * self.config.steps:
                return int(np.random.default_rng([self.seed, step, 1]).choice(phase.lengths))
        return int(self.run.model.block_length)

    def fitted(self, micro: Part) -> tuple[TokenRows, torch.Tensor]:
        run, config = self.run, self.config
        rows, weight = conversion_rows(
            micro.batch,
            run.model,
            run.modality.tokenizer.eos_token_id,
            np.random.default_rng([self.seed, micro.step]),
            self._block,
            run.config.sampler.gen_length,
            config.position_slope if config.noise == "efficient_dlm" else 0.0,
            config.loss_weight == "elbo",
            config.ar_weight if config.noise == "nbdiff" else 0.0,
            micro.part,
        )
        if not micro.spare:
            self._masked += int((rows.input_ids[rows.row, rows.column] == run.model.mask_token_id).sum())
        if config.targets == "soft":
            rows = soft_rows(rows.to(run.device), micro.batch[micro.part], self.teacher)
        return rows, weight

    def seen(self) -> tuple[float, str, dict[str, float]]:
        masked = distributed.reduce_number(self._masked, "sum", self.run.device)
        return masked, "tokens", {"convert/block_length": float(self._block or 0), "convert/masked_tokens": masked}

"""Train, evaluate and save from Python, in TRL's shape: a minute on two CPU cores.

The task: four letters in any order, each once. The warm start learns a random order, letter by letter. Decided one at
a time the letters are right; decided two at a time they do not know of each other. RL makes the model settle on orders.
Run it: python docs/examples/trl_style.py
"""

# %% A dataset in TRL's format: the column `prompt`, and whatever the reward needs.
import itertools
import random
import sys

from datasets import Dataset
from transformers import TrainerCallback

import rl
from rl import Trainer
from rl.recipes import TraceRL
from rl.tasks.char_tokenizer import char_tokenizer

LETTERS = "abcdefghij"
# Smaller numbers, as `sft.steps=5 train.steps=2`, only show that it runs.
OPTIONS = dict(word.split("=", 1) for word in sys.argv[1:])


def rows(count: int) -> Dataset:
    rng = random.Random(0)
    # No prompt twice: a prompt to measure with must not be one to train on.
    drawn = rng.sample(list(itertools.permutations(LETTERS, 4)), count)
    answers = ["".join(rng.sample(letters, 4)) for letters in drawn]
    return Dataset.from_list([{"prompt": "".join(d) + ":", "answer": a} for d, a in zip(drawn, answers, strict=True)])


# %% A reward of TRL's signature.
def each_once(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [float(sorted(c) == sorted(p.rstrip(":"))) for p, c in zip(prompts, completions, strict=True)]


# %% A callback of transformers: training stops when a batch is nearly always right.
class GoodEnough(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop = (logs or {}).get("reward/mean", 0.0) > 0.95
        return control


# %% A new small model. `model="path or hub name"` starts from a trained one.
tokenizer = char_tokenizer(LETTERS + ":", ends=False)
backbone = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
backbone |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
dataset = rows(2300).train_test_split(test_size=300, seed=0)
trainer = Trainer(
    reward_funcs=each_once,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    recipe=TraceRL(clip_high=0.28),
    callbacks=[GoodEnough()],
    args={
        "run": {"output_dir": "runs/trl_style", "num_threads": 1},
        "model.backbone": backbone,
        "sampler": {"gen_length": 4, "num_inference_steps": 2},
        "sft": {"steps": 300, "batch_size": 64, "optimizer": {"lr": 3e-3}},
        "train": {"steps": 150, "prompts_per_step": 16, "group_size": 8, "optimizer": {"lr": 1e-3}},
        "eval.num_inference_steps": [1, 2, 4],
    },
    options={name: int(value) if value.isdigit() else value for name, value in OPTIONS.items()},
)
summary = trainer.train()

# %% Evaluate, sample, score.
print(trainer.evaluate())
model = trainer.run.model
trajectories = rl.sample(model, ["abcd:"], trainer.config.sampler, tokenizer=tokenizer, num_samples=4)
answers = [tokenizer.decode(trajectory.response_ids()) for trajectory in trajectories]
print(answers, rl.score(each_once, ["abcd:"] * 4, answers))
print("log-probs of the first answer's letters:", rl.logprobs(model, trajectories)[0].tolist())

# %% Save: weights, tokenizer, model card. `trainer.push_to_hub("owner/name")` uploads the same.
print("model:", trainer.save_model(f"{trainer.config.run.output_dir}/saved"))

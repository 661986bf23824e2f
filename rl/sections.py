"""Every option once: type, default and one sentence, which is also the help text. `rl.config` reads them from files.

Five sections have their options elsewhere: `model` in `rl/model_section.py`, `sft` and `convert` in
`rl/stage_sections.py`; `sampler` belongs to the task's modality, `algorithm` to the recipe.
Importing this module needs no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rl.errors import about
from rl.tasks.load import modality_of
from rollouts.engines.server.options import ServerOptions


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class RunConfig(Section):
    output_dir: str = Field("runs/default", description="Folder of the run; everything is written below it.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds data order, masks and rollouts.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads per process; null leaves torch's default.")
    device: str = Field("auto", description="cpu, cuda, or auto for a GPU when there is one.")
    resume: bool = Field(False, description="Continue from the newest complete checkpoint in output_dir.")
    collective_timeout_seconds: float = Field(
        1800.0, gt=0, description="A run of several ranks fails when one of them keeps the others waiting this long."
    )
    services: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [], description="Trackers that get the metrics of metrics.jsonl, and samples of held-out prompts."
    )


DEFAULT_VERIFIER = "math_answer"
MAX_GROUP = 1024  # samples of a prompt: a request's seed has 10 bits for them (`rl.train.rollouts.request_seed`)


class TaskConfig(Section):
    name: str = Field("sudoku", description="Task name, file.py:Class or pkg.module:Class.")
    params: dict[str, Any] = Field({}, description="Parameters of the task.")
    chat: bool = Field(
        False,
        description="Put a prompt of text into the tokenizer's chat template, as one user turn; messages always are.",
    )
    unfit: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Rows that cannot be used (an empty prompt, a mask token inside, too long for the model, a prompt "
        "that is held out): refuse them, or leave them out and say how many.",
    )

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        with about(f"task.name {name!r}"):
            modality_of(name)
        return name


class OptimizerConfig(Section):
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="Learning-rate schedule."
    )
    warmup_steps: int = Field(10, ge=0, description="Updates of linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")


class RewardPartConfig(Section):
    name: str = Field(description="Registered name, pkg.module:function, or path/file.py:function.")
    weight: float = Field(1.0, description="Weight in the sum of rewards.")
    params: dict[str, Any] = Field({}, description="Keyword arguments of the reward.")
    normalize: Literal["none", "group", "batch"] = Field("none", description="Normalise this part before the sum.")
    label: str | None = Field(None, description="Name in metrics, where several rewards have one name.")
    columns: dict[str, str] = Field({}, description="Argument of the reward: the dataset column that feeds it.")


class RewardConfig(Section):
    functions: list[RewardPartConfig] = Field([], description="Rewards to combine; empty takes the task's own.")
    mode: Literal["inline", "process"] = Field("inline", description="Run rewards here, or in bounded child processes.")
    num_workers: int = Field(1, ge=1, description="Child processes in mode process.")
    timeout_seconds: float = Field(10.0, gt=0, description="Wall-clock limit of one scoring call in mode process.")
    max_failure_share: float = Field(0.1, ge=0, le=1, description="Stop the run when more than this share fails.")
    outage_seconds: float = Field(
        0.0, ge=0, description="Wait this long for a reward server that is down before its verdicts count as failed."
    )

    def trained(self, verifier: str | None) -> list[RewardPartConfig]:
        """The rewards trained on: `functions`, without them those of `judges`."""
        return self.functions or self.judges(verifier)

    def judges(self, verifier: str | None) -> list[RewardPartConfig]:
        """The rewards that judge evaluations: the task's verifier alone, with its params and columns in `functions`.

        A task without one is judged by the rewards trained on, not normalised; by math_answer where none is named.

        Args:
            verifier: attribute `reward` of the task.
        """
        if verifier is not None or not self.functions:
            verifier = verifier or DEFAULT_VERIFIER
            found = next((part for part in self.functions if part.name == verifier), RewardPartConfig(name=verifier))
            return [RewardPartConfig(name=verifier, params=found.params, columns=found.columns)]
        return [part.model_copy(update={"normalize": "none"}) for part in self.functions]


class BlockStage(Section):
    from_step: int = Field(ge=0, description="First RL step of this stage.")
    rollout: int = Field(ge=1, description="Block length of rollouts.")
    train: int = Field(ge=1, description="Block length of the scored states.")


class TrainConfig(Section):
    steps: int = Field(100, ge=0, description="RL steps; 0 skips the stage.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts per RL step over all ranks.")
    group_size: int = Field(8, ge=1, le=MAX_GROUP, description="Rollouts per prompt.")
    micro_batch_size: int = Field(256, ge=1, description="Trajectories scored per forward and rank.")
    micro_batch_steps: int | None = Field(
        None, ge=1, description="Of each of them, at most this many steps per forward (images); null takes all."
    )
    updates_per_step: int = Field(1, ge=1, description="Optimizer updates per RL step, each on its share of prompts.")
    epochs: int = Field(1, ge=1, description="Passes over the rollouts of a step.")
    mixed_steps: list[int] = Field(
        [], description="Step counts to draw a prompt's num_inference_steps from; empty always uses the sampler's."
    )
    block_schedule: list[BlockStage] = Field(
        [], description="Block-size curriculum of a block-causal model; empty uses the model's block length."
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Stop when learner and sampler disagree on a recorded log-prob by more than this; null only logs.",
    )
    deepspeed: str = Field(
        "zero0",
        description="Name of a config in configs/deepspeed (zero2, zero3_bf16, ...), or the path of a DeepSpeed JSON.",
    )
    max_seconds: float | None = Field(None, gt=0, description="Stop the stage after this many seconds.")
    max_sequence_forwards: int | None = Field(
        None, gt=0, description="Stop the stage when this many sequences went through the model, sampling and learning."
    )

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step ({self.prompts_per_step}) must be a multiple of "
                f"train.updates_per_step ({self.updates_per_step})"
            )
        starts = [stage.from_step for stage in self.block_schedule]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"train.block_schedule must begin at from_step 0 and grow, got {starts}")
        for stage in self.block_schedule:
            if stage.train % stage.rollout:
                raise ValueError(
                    f"train.block_schedule: train ({stage.train}) must be a multiple of rollout ({stage.rollout})"
                )
        return self

    def blocks_at(self, step: int) -> BlockStage | None:
        """The stage of the block-size curriculum at an RL step, None without a curriculum."""
        return next((stage for stage in reversed(self.block_schedule) if stage.from_step <= step), None)


class FilterConfig(Section):
    drop_zero_variance: bool = Field(
        True,
        description="Leave out prompts whose rollouts all got one reward (they get no KL or entropy term then either).",
    )
    accuracy_low: float | None = Field(
        None, description="Leave out prompts whose mean reward is below this; null takes all."
    )
    accuracy_high: float | None = Field(
        None, description="Leave out prompts whose mean reward is above this; null takes all."
    )
    drop_overlong: bool = Field(False, description="Leave out responses that never reach the end token.")
    refill_rounds: int = Field(
        0, ge=0, description="Sample up to this many further batches of prompts to replace what was left out."
    )


class EvalConfig(Section):
    num_inference_steps: list[int] = Field([2, 4, 8, 16], description="Step counts to evaluate at.")
    num_prompts: int = Field(1000, ge=1, description="Held-out prompts of the before and after evaluation.")
    every: int = Field(
        0, ge=0, description="RL steps between evaluations on validation prompts; 0 evaluates at the ends only."
    )
    every_prompts: int = Field(256, ge=1, description="Validation prompts of the evaluations on the way.")
    viewer_items: int = Field(6, ge=0, description="Prompts shown step by step in the report.")
    viewer_steps: int | None = Field(None, ge=1, description="Step count of the viewer; null takes the sampler's.")
    sampler: dict[str, Any] = Field(
        {},
        description="Sampler options that evaluations change, {selector: top_n}; text is greedy without temperature.",
    )
    baseline: str | None = Field(
        None,
        description="Autoregressive model whose answers are judged too, in train before any training: folder, hub "
        "name, .gguf file, package:NAME/FILE.gguf, or http://HOST:PORT of a vLLM server.",
    )
    keep_answers: int = Field(
        0, ge=0, description="Held-out answers, the first ones, that each evaluation at the ends writes to answers/."
    )
    backslide: bool = Field(
        False,
        description="Also judge every step's x0 prediction: how often one was right and the answer wrong.",
    )

    @field_validator("sampler")
    @classmethod
    def _is_no_other_option(cls, sampler: dict[str, Any]) -> dict[str, Any]:
        for name, owner in {"num_inference_steps": "eval.num_inference_steps", "record_x0": "eval.backslide"}.items():
            if name in sampler:
                raise ValueError(f"eval.sampler has {name}, which evaluations take from {owner}: set that")
        return sampler


class GoalConfig(Section):
    steps: int = Field(description="Number of denoising steps the goal is about.")
    before_max: float = Field(ge=0, le=1, description="Accuracy before RL must not exceed this.")
    after_min: float = Field(ge=0, le=1, description="Accuracy after RL must reach this.")


class RayConfig(Section):
    workers: int = Field(2, ge=1, description="Rollout workers of every learner rank.")
    address: str | None = Field(
        None, description="Ray cluster to join, such as auto; null starts one on this machine for the run."
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that Ray reserves for a worker.")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; with 0 it samples on the CPU.")
    weights: Literal["file", "object_store"] = Field(
        "file",
        description="How weights reach workers: a file, or its bytes for those that do not see it; or bytes only.",
    )
    weights_dir: str | None = Field(
        None,
        description="Folder such as one in /dev/shm, in which the run makes one for its weight files (a killed run's "
        "stays until it is resumed); null takes the run folder.",
    )
    max_restarts: int = Field(3, ge=0, description="The run ends when more workers than this die under one request.")
    start_seconds: float = Field(300.0, gt=0, description="The run ends when a worker takes longer to start.")
    timeout_seconds: float = Field(
        1800.0, gt=0, description="A worker that takes longer over its share of a step's rollouts is replaced."
    )


class RolloutConfig(Section):
    engine: Literal["in_process", "ray", "server"] = Field(
        "in_process",
        description="What samples the rollouts: the learner's own process, workers under Ray, or servers "
        "(docs/engines.md).",
    )
    ray: RayConfig = RayConfig()
    server: ServerOptions = ServerOptions()
    max_batch_size: int = Field(256, ge=1, description="Requests decoded together (for images also by the VAE).")
    asynchronous: bool = Field(
        False, description="Sample the next step's rollouts while the learner works on this one's; needs workers."
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="The run ends when rollouts were sampled more optimizer updates ago; null allows those of one RL "
        "step when asynchronous, else none.",
    )
    max_importance_weight: float | None = Field(
        2.0,
        gt=0,
        description="Bound on the weight that corrects asynchronous or quantized rollouts for the policy that sampled, "
        "where the recipe's own ratio does not (old_logprob recompute and on_policy); null does not correct.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="int8 and fp8 (e4m3) sample with a copy whose linear layers have weights of 8 bits; log-probs then "
        "differ from the learner's (logprob_gap), which max_importance_weight corrects.",
    )
    compile: bool = Field(
        False,
        description="Sample with forwards compiled by torch.compile, of decoders of text in the learner's process; "
        "needs a C++ compiler or a GPU, and minutes at the start (docs/experiments/speed.md).",
    )
    cache: Literal["none", "prefix", "dual", "frozen"] = Field(
        "none", description="Approximate cache of full-attention models; log-probs then carry an error (logprob_gap)."
    )


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="RL steps between checkpoints; 0 writes one at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep.")


class AlignRow(Section):
    name: str = Field(description="Name of the row, and of its folder.")
    search: str | None = Field(
        None, description="Search with the pretrained model by this name or address (docs/search.md)."
    )
    params: dict[str, Any] = Field({}, description="Options of the search.")
    algorithm: dict[str, Any] | None = Field(None, description="Recipe that fine-tunes the pretrained model.")
    overrides: list[str] = Field([], description="Dotted overrides of this row's training, train.steps=50.")
    num_samples: int | None = Field(None, ge=1, description="Samples of this row; null takes align.num_samples.")


class AlignConfig(Section):
    """`denoise-rl align`: a table of ways to align one pretrained model with one reward."""

    rows: list[AlignRow] = Field([], description="What to compare.")
    num_samples: int = Field(128, ge=2, description="Samples per row.")
    pretrained: str | None = Field(None, description="Folder of the pretrained model; made if missing.")
    oracles: dict[str, int] = Field({}, description="Oracle file -> half of the labelled data; trained if missing.")
    oracle_labels: int = Field(8000, ge=1, description="Labelled sequences of each oracle.")
    judges: dict[str, RewardPartConfig] = Field({}, description="Column name -> reward nobody optimises.")
    likelihood_samples: int = Field(64, ge=1, description="Samples scored under the pretrained model.")
    likelihood_masks: int = Field(32, ge=1, description="Mask patterns per scored sample.")

"""Images in prompts: what stands for them, what a model sees, and that the learner computes what was sampled."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rl.config import load_config
from rl.estimators.draws import everything_hidden
from rl.estimators.masked_copies import copy_rows
from rl.estimators.trace_rows import packed_rows, remask_rows, trace_rows
from rl.modalities.text_memory import text_memory
from rl.modalities.text_plan import TextPlan
from rl.model_section import ConvertOptions, ModelConfig, VisionOptions
from rl.models.families.llava import Llava
from rl.models.folder import prompt_images
from rl.models.load import load_policy, save_policy
from rl.models.vision import add_vision
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.load import load_task
from rl.tasks.prompt_images import FIRST_IMAGE_ID, PromptImages, image_ids, key_and_place, pixels_of, read_pixels
from rl.tasks.read_number import ReadNumberTask
from rl.train.convert import _Twin
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories
from tests.runs import tiny_config, train_here

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, **SIZES}


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def seeing(make_model: Any, family: str, **tower: Any) -> Any:
    """A tiny float64 model with a vision tower, whose outputs are as large as its embeddings."""
    model = make_model(family)
    add_vision(model, VisionOptions(tower={**TOWER, **tower}), seed=0)
    with torch.no_grad():
        model.vision.projector[2].weight.mul_(8)
        model.vision.projector[0].weight.mul_(8)
    return model


def requests(images: list[np.ndarray], lengths: tuple[int, ...] = (2, 5)) -> list[Request]:
    """Two rollouts of a prompt for each image: some words, the image's 4 places, a word."""
    return [
        Request([*range(n), *image_ids(image, 4), 3], seed=100 * n + copy)
        for image, n in zip(images, lengths, strict=True)
        for copy in range(2)
    ]


def sampled(model: Any, asked: list[Request], **settings: Any) -> list[TokenTrajectory]:
    block = model.block_length
    options = SamplerOptions(**{"gen_length": 8, "num_inference_steps": 4, "block_length": block, **settings})
    return InProcessEngine(SharedForwards(model), options, eos_token_id=0, max_batch_size=3).generate(asked)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_an_image_is_a_run_of_ids_that_say_which_image_and_which_place() -> None:
    ids = np.array(image_ids(picture(1), 4))
    assert (ids >= FIRST_IMAGE_ID).all() and ids.dtype == np.int64
    key, place = key_and_place(ids)
    assert len(set(key.tolist())) == 1 and place.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(pixels_of(int(key[0])), picture(1))
    assert set(image_ids(picture(2), 4)).isdisjoint(ids.tolist())
    # The same pixels are the same image, however they are given.
    assert image_ids(picture(1).tolist(), 4) == ids.tolist() == image_ids(Image.fromarray(picture(1)), 4)


def test_a_prompt_has_the_places_where_its_placeholders_are() -> None:
    tokenizer, vision = char_tokenizer("abc"), PromptImages("<image>", 2)
    one, two = image_ids(picture(1), 2), image_ids(picture(2), 2)
    ids = vision.prompt_ids(tokenizer, "a<image>bc<image>", [picture(1), picture(2)])
    assert ids == [0, *one, 1, 2, *two]
    assert vision.prompt_ids(tokenizer, "ab", []) == [0, 1]
    with pytest.raises(ValueError, match="the prompt has 2 <image> and the row 1 images"):
        vision.prompt_ids(tokenizer, "a<image><image>", [picture(1)])


def test_a_grey_image_is_read_like_its_rgb_twin(tmp_path: Path) -> None:
    grey = picture(3)[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    for image in (grey, grey[..., None], str(tmp_path / "a.png"), {"bytes": (tmp_path / "a.png").read_bytes()}):
        np.testing.assert_array_equal(read_pixels(image, "image"), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "images.0.: the image 'nowhere.png' cannot be read: there is no such file"),
        (b"no picture", "images.0.: the image of 10 bytes cannot be read: it is no image"),
        ([[0, 300]], "images.0.: the pixels of an image lie in 0 to 255, and one is 300"),
        ([[-1, 2]], "images.0.: the pixels of an image lie in 0 to 255, and one is -1"),
        ([0.5, 0.5], "images.0.: an image is a path, bytes, or whole numbers"),
        ([[0], [0, 1]], "images.0.: an image is a path, bytes, or whole numbers"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptImages("<image>", 4).prompt_ids(char_tokenizer("a"), "a<image>", [image])


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(picture(1)).save(file)
    key, _ = key_and_place(image_ids(str(file), 1)[0])
    Image.fromarray(picture(2)).save(file)
    with pytest.raises(ValueError, match=r"a\.png' has changed since its prompt was made"):
        pixels_of(key)
    with pytest.raises(ValueError, match="has an image in its prompt that this run has not read"):
        pixels_of(123)


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tower", [{}, {"model_type": "clip_vision_model"}, {"num_channels": 1}])
def test_places_take_the_projected_states_of_the_tower(make_model, tower: dict[str, Any]) -> None:
    model = seeing(make_model, "qwen3-full", **tower)
    first, second = picture(1), picture(2)
    ids = torch.tensor([[5, *image_ids(first, 4), 6, *image_ids(second, 4)], [*range(10)]])
    embeds = model.vision.embed(ids, model.get_input_embeddings())
    for image, start in ((first, 1), (second, 6)):
        mean, std = (torch.tensor(model.config.vision[name]).double() for name in ("mean", "std"))
        assert float(mean[0]) == pytest.approx(0.48145466 if "model_type" in tower else 0.5)
        pixels = ((torch.from_numpy(image).double() / 255 - mean) / std).movedim(2, 0)[None]
        if model.vision.channels == 1:
            grey = np.asarray(Image.fromarray(image).convert("L"))
            pixels = torch.from_numpy(grey.copy()).double()[None, None] / 127.5 - 1
        states = model.vision.tower(pixel_values=pixels).last_hidden_state[0, -4:]
        torch.testing.assert_close(embeds[0, start : start + 4], model.vision.projector(states))
    words = model.get_input_embeddings()(torch.tensor([5, 6]))
    torch.testing.assert_close(embeds[0, [0, 5]], words)
    torch.testing.assert_close(embeds[1], model.get_input_embeddings()(torch.arange(10)))


@torch.no_grad()
def test_an_image_of_another_size_is_scaled_to_the_towers(make_model) -> None:
    model = seeing(make_model, "qwen3-full")
    flat = np.full((20, 12, 3), 51, np.uint8)
    assert model.vision.normalised([flat]).shape == (1, 3, 8, 8)
    torch.testing.assert_close(model.vision.normalised([flat]), torch.full((1, 3, 8, 8), -0.6).double())


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full", "gpt2-full-shifted", "qwen3-block4", "gpt2-block4"])
def test_the_learner_computes_what_was_sampled_and_pixels_matter(make_model, family: str) -> None:
    model = seeing(make_model, family)
    trajectories = sampled(model, requests([picture(1), picture(2)]))
    with torch.no_grad():
        rows = trace_rows(trajectories, model)
        torch.testing.assert_close(rows.score(model).logprob, rows.sampler_logprob, rtol=0, atol=1e-9)
    # The record alone conditions the learner: other pixels, other log-probs.
    for trajectory in trajectories:
        swapped = np.array(image_ids(picture(9), 4))
        at = trajectory.prompt_ids >= FIRST_IMAGE_ID
        trajectory.prompt_ids = trajectory.prompt_ids.copy()
        trajectory.prompt_ids[at] = swapped
    with torch.no_grad():
        other = trace_rows(trajectories, model).score(model).logprob
    assert (other - rows.sampler_logprob).abs().max() > 0.1


def test_shared_rows_and_prefixes_give_the_same_numbers(make_model) -> None:
    model = seeing(make_model, "qwen3-block4")
    # Prompts of whole blocks, so that the rollouts of a prompt share one copy of it.
    asked = [Request([1, 2, *image_ids(picture(n), 4), 3, 4], seed=10 * n + copy) for n in (1, 2) for copy in range(3)]
    trajectories = sampled(model, asked)
    with torch.no_grad():
        alone = packed_rows(trajectories).score(model).logprob
        rows = packed_rows(trajectories, pack_to=128)
        assert rows.context is not None and rows.num_rows < len(trajectories)
        torch.testing.assert_close(rows.score(model).logprob, alone, rtol=0, atol=1e-9)
        # Rows alike in all but the image are not alike.
        first = [t for t in trajectories if t.seed in (10, 20)]
        both = remask_rows(first, block_length=4)
        assert len(both.distinct().input_ids) == len(both.input_ids)


def test_trajectories_survive_their_file(make_model, tmp_path: Path) -> None:
    model = seeing(make_model, "qwen3-full")
    trajectories = sampled(model, requests([picture(1), picture(2)]))
    save_trajectories(tmp_path / "t.npz", trajectories)
    for loaded, trajectory in zip(load_trajectories(tmp_path / "t.npz"), trajectories, strict=True):
        np.testing.assert_array_equal(loaded.prompt_ids, trajectory.prompt_ids)


@pytest.mark.parametrize("pictured", [True, False])
def test_every_weight_of_the_tower_has_a_gradient(make_model, pictured: bool) -> None:
    model = seeing(make_model, "qwen3-full")
    ids = torch.tensor([[1, *image_ids(picture(1), 4), 2, 3, 11] if pictured else [1, 2, 3, 4, 5, 6, 7, 11]])
    model(ids)[0, -1, 2].backward()
    gradients = [p.grad for p in model.vision.parameters()]
    assert all(g is not None for g in gradients)
    largest = max(float(g.abs().max()) for g in gradients if g is not None)
    assert largest > 0 if pictured else largest == 0


# --- folders and options ----------------------------------------------------------------------------------------------

TINY = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def loaded(tmp_path: Path, **changed: Any) -> Any:
    return load_policy(ModelConfig(**{"path": str(tmp_path), **changed}), char_tokenizer("abc"), 0)


def test_a_model_with_a_tower_loads_back_as_it_was_saved(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc")
    config = ModelConfig(backbone=TINY, vision={"tower": TOWER, "placeholder": "[i]"})
    model = load_policy(config, tokenizer, 0)
    save_policy(model, tokenizer, tmp_path)
    again = loaded(tmp_path, vision={"train_tower": False})
    ids = torch.tensor([[1, *image_ids(picture(1), 4), 2, model.mask_token_id]])
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
    assert not any(p.requires_grad for p in again.vision.tower.parameters())
    assert all(p.requires_grad for p in again.vision.projector.parameters())
    described = json.loads((tmp_path / "config.json").read_text())
    assert prompt_images(ModelConfig(path=str(tmp_path)), described) == PromptImages("[i]", 4)
    with torch.no_grad():
        assert torch.equal(model(ids), loaded(tmp_path, vision={"tower": TOWER})(ids))
    with pytest.raises(ValueError, match=r"the model in model.path has another vision tower than this"):
        loaded(tmp_path, vision={"tower": {**TOWER, "patch_size": 8}})


def test_a_trained_tower_is_put_in_front_of_a_trained_decoder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    tokenizer = char_tokenizer("abc")
    save_policy(load_policy(ModelConfig(backbone=TINY), tokenizer, 0), tokenizer, tmp_path / "text")
    tower = AutoModel.from_config(AutoConfig.for_model(**TOWER))
    tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    model = loaded(tmp_path / "text", vision={"path": str(tmp_path / "tower")})
    assert torch.equal(model.vision.tower.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.weight)
    assert model.config.vision["mean"] == [0.1, 0.2, 0.3] and model.config.vision["std"] == [0.5] * 3
    with pytest.raises(ValueError, match=r"model.vision.path '.*text' has no|model.vision.path '.*text'"):
        loaded(tmp_path / "text", vision={"path": str(tmp_path / "text")})


def test_a_tower_whose_width_does_not_fit_is_named(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc")
    save_policy(load_policy(ModelConfig(backbone=TINY, vision={"tower": TOWER}), tokenizer, 0), tokenizer, tmp_path)
    file = tmp_path / "config.json"
    described = json.loads(file.read_text())
    described["vision"]["tower"]["hidden_size"] = 16
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"does not fit its config: vision\..* has shape \[8.*\] instead of \[16"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"tower": {**TOWER, "image_sise": 8}}, "unknown config key 'model.vision.tower.image_sise': did you mean"),
        ({"tower": {"model_type": "gpt2"}}, "model.vision.tower: gpt2 does not say image_size and patch_size"),
        ({"tower": {**TOWER, "patch_size": 16}}, "model.vision.tower: 0 patches of 16 in an image of 8"),
        ({"tower": {**TOWER, "num_channels": 4}}, "num_channels is 4: images have 1 or 3"),
        ({"tower": {**TOWER, "num_attention_heads": 3}}, "hidden_size [0-9]+ is no multiple of num_attention_heads 3"),
        ({"path": "/no/where"}, "model.vision.path '/no/where': "),
        ({"placeholder": "<image>"}, "model.vision is for a model with a vision tower"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_images(ModelConfig(backbone=TINY, vision=vision))


# --- an autoregressive model with a tower -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny random LLaVA and the tokenizer of the task read_number."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = char_tokenizer("0123456789no.i")
    text = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text = LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"})
    vision = CLIPVisionConfig(image_size=24, patch_size=12, **{**SIZES, "num_hidden_layers": 2})
    torch.manual_seed(0)
    image = tokenizer.convert_tokens_to_ids("i")
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=image))
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CONVERT = {"block_length": 4, "mask_token": "<mask>"}


@torch.no_grad()
def test_a_converted_llava_is_transformers_own_at_block_length_one(llava: Path, tmp_path: Path, run: Any) -> None:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(llava)
    tokenizer = char_tokenizer("0123456789no.i")
    ours = load_policy(ModelConfig(path=str(llava), convert={**CONVERT, "block_length": 1}), tokenizer, 0)
    image = picture(1, 24, 24)
    assert prompt_images(ModelConfig(path=str(llava)), json.loads((llava / "config.json").read_text())) == (
        "<image>",
        4,
    )
    words, i = [1, 2, 5], tokenizer.convert_tokens_to_ids("i")
    ids = torch.tensor([[3, *image_ids(image, 4), *words]])
    pixels = ours.vision.normalised([image])
    expected = theirs(input_ids=torch.tensor([[3, i, i, i, i, *words]]), pixel_values=pixels).logits
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None]
    found = ours.lm_head(ours.hidden_states(ids, visible=causal))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # The teacher of a conversion to longer blocks is that model too.
    options = {**CONVERT, "context": "causal", "readout": "shifted"}
    longer = load_policy(ModelConfig(path=str(llava), convert=options), tokenizer, 0)
    teacher = _Twin(SimpleNamespace(config=load_config(None, ["convert.data=task"]), model=longer))
    taught = teacher.get_output_embeddings()(teacher.base_model(ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(taught, expected, rtol=0, atol=1e-5)
    # Back in its own layout transformers reads it.
    save_policy(ours, tokenizer, tmp_path / "saved")
    code, _, err = run("export", str(tmp_path / "saved"), str(tmp_path / "out"), "--layout", "llava")
    assert code == 0, err
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters(), strict=True))


def test_a_llava_is_converted_on_answers_about_images(llava: Path, tmp_path: Path) -> None:
    overrides = [
        *RUN[:1], *RUN[4:], "model.backbone={}", f"model.path={llava}", f"model.convert={json.dumps(CONVERT)}",
        "convert={steps: 2, data: task, num_texts: 4, batch_size: 2, block_lengths: [{until: 0.5, lengths: [1]}]}",
        "train.steps=0", "sft.steps=0", "eval.num_prompts=2", "eval.viewer_items=0",
    ]  # fmt: skip
    train_here(tiny_config(tmp_path, *overrides, reward=LETTERS))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line["loss/total"] for line in metrics if line["stage"] == "convert")
    # In blocks of one the policy is the teacher, and that sees the pixels too.
    assert abs(first) < 1e-5 < 1e-3 < second


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full', the llava layout is read"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\], and one layer is read"),
        ({"text_config": {"model_type": "opt"}}, "text_config has model_type 'opt', and what is read is gemma"),
    ],
)
def test_a_llava_of_another_kind_is_refused(llava: Path, changed: dict[str, Any], message: str) -> None:
    described = {**json.loads((llava / "config.json").read_text()), **changed}
    with pytest.raises(ValueError, match=message):
        Llava().fields(described, convert=ConvertOptions(**CONVERT), mask_token_id=1)


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = (
    "task.name=read_number",
    "model.attention=block_causal",
    "model.block_length=4",
    f"model.vision.tower={json.dumps({**TOWER, 'image_size': 24, 'patch_size': 12, 'num_channels': 1})}",
    "sampler.gen_length=4",
    "sampler.block_length=4",
    "sampler.num_inference_steps=2",
    "eval.num_inference_steps=[2]",
)
LETTERS = "def dense(prompts, completions, **columns): return [sum(map(ord, c)) / 500 for c in completions]"


def test_a_run_learns_on_images_and_evaluates_without_them(tmp_path: Path, run: Any) -> None:
    packed = ("algorithm.pack_to=64", "train.max_logprob_gap=1e-4", "train.steps=2")
    config = tiny_config(tmp_path, *RUN, *packed, reward=LETTERS)
    train_here(config)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("policy/logprob_gap_max" in line for line in metrics) == 2
    code, _, err = run("eval", *config, f"model.path={tmp_path / 'run'}", "task.params.images=shuffled")
    assert code == 0, err


def test_chance_is_what_shuffled_pictures_leave() -> None:
    own, shuffled = (ReadNumberTask(images, noise=0).heldout_examples(40) for images in ("own", "shuffled"))
    ink = [np.count_nonzero(np.array(row["image"]) > 128) for row in own]
    strokes = {"0": 12, "1": 8, "2": 11, "3": 11, "4": 9, "5": 11, "6": 12, "7": 7, "8": 13, "9": 12}
    assert ink == [2 * sum(strokes[digit] for digit in row["answer"]) for row in own]
    other = [np.count_nonzero(np.array(row["image"]) > 128) for row in shuffled]
    right = [n == 2 * sum(strokes[digit] for digit in row["answer"]) for n, row in zip(other, shuffled, strict=True)]
    assert sum(right) < 12
    train = {row["answer"] for row in ReadNumberTask().train_examples(0, 0, 400)}
    assert train.isdisjoint(row["answer"] for row in own)


def jsonl(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = char_tokenizer("0123456789 ")
    vocabulary.save_pretrained(tmp_path / "tokenizer")
    params = {"train": str(tmp_path / "train.jsonl"), "answer_column": "answer"}
    return [
        *tiny_config(tmp_path, *RUN[1:]),
        "task.name=jsonl",
        f"task.params={json.dumps(params)}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<image>", "images": ["no.png"]}, r"row 2: images\[0\]: the image 'no.png' cannot be read"),
        ({"prompt": "<image><image>"}, "row 2: the prompt has 2 <image> and the row 1 images"),
        ({"prompt": "1"}, "row 2: the prompt has 0 <image> and the row 1 images"),
        ({"image": "a.png"}, "row 2: the row has images in two columns, image and images"),
    ],
)
def test_check_names_the_row_of_a_bad_image(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    good = {"prompt": "<image>1", "images": [str(tmp_path / "a.png")], "answer": "1"}
    arguments = jsonl(tmp_path, [good, {**good, **row}])
    config = load_config(arguments[1], arguments[2:])
    task = load_task(config.task.name, config.task.params)
    with pytest.raises(ValueError, match=message):
        TextPlan.check(config, task, task.train_examples(0, 0, 1))


def test_what_cannot_have_images_is_refused_before_a_run(tmp_path: Path, run: Any) -> None:
    drakes = ("algorithm={name: drakes}", "filters.drop_zero_variance=false", "train.epochs=1")
    for overrides, message in [
        (("rollout.engine=ray",), "rollout.engine ray cannot give answers to prompts with images (images)"),
        (("model.autoregressive=true",), "model.autoregressive is for eval"),
        (("rollout.compile=true",), "rollout.compile does not go with images in prompts"),
        (drakes, "drakes with a gradient through the sampler does not go with images in prompts"),
    ]:
        code, _, err = run("check", *tiny_config(tmp_path, *RUN, *overrides, reward=LETTERS))
        assert code == 2 and message in err, err


def test_the_prompt_masks_of_a_recipe_leave_images_alone(make_model) -> None:
    model = seeing(make_model, "qwen3-full")
    trajectories = sampled(model, requests([picture(1), picture(2)]))
    rows, _ = copy_rows(trajectories, model, everything_hidden, prompt_mask=1.0)
    for ids, trajectory in zip(rows.input_ids.numpy(), trajectories, strict=True):
        prompt, at = ids[: trajectory.prompt_length], trajectory.prompt_ids >= FIRST_IMAGE_ID
        np.testing.assert_array_equal(prompt[at], trajectory.prompt_ids[at])
        assert (prompt[~at] == model.mask_token_id).all()


def test_the_memory_plan_counts_tower_and_projector() -> None:
    overrides = ["model.backbone.vocab_size=17", "model.vision.train_tower=false", "train.prompts_per_step=2"]
    config = load_config("read_number", overrides)
    model = load_policy(config.model, char_tokenizer("0123456789no."), 0)
    plan = text_memory(config, ranks=1, prompt_length=12, half=False)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.vision.named_children()}
    whole = sum(p.numel() for p in model.parameters())
    assert (plan.total, plan.trained) == (whole, whole - sizes["tower"]) and sizes["projector"] > 0

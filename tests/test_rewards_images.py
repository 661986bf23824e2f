"""Image rewards: exact byte counts, tiny random models in the published layouts against direct computations."""

from __future__ import annotations

import io
import itertools
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards import RewardPart, RewardRunner, load_reward
from rewards.image import data_url, png_bytes, thumbnail, to_array, to_pil, upscaled
from tests.tiny_vision import clip_tokenizer, pictures, save_clip, save_vit_classifier

LABELS = ["cat", "dog", "bird"]


def score(name, prompts, images, columns=None, mode="inline", share=1.0, cache_size=0, **params):
    part = RewardPart(name, params=params)
    with RewardRunner([part], mode=mode, max_failure_share=share, cache_size=cache_size, retries=0) as runner:
        return runner.score(prompts, images, columns)


def reasons(table):
    return [verdict.reason for part in table.parts.values() for verdict in part]


# ---- what an image is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "uint8 in 0..255, got float32"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"must have shape \[H, W, 3\].*got \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"got \[0, 4, 3\]"),
        (Image.new("RGBA", (4, 4)), "mode RGB or L, got RGBA"),
        ("a cat", "got str"),
        (torch.zeros(3, 4, 4), "got Tensor"),
    ],
)
def test_what_is_no_image_is_refused_with_the_fix(image, message):
    with pytest.raises(TypeError, match=message):
        to_pil(image)


def test_arrays_pillow_images_and_files_hold_the_same_pixels():
    for channels in (1, 3):
        (image,) = pictures(1, channels=channels)
        assert np.array_equal(to_array(to_pil(image)), image)
        assert np.array_equal(to_array(Image.open(io.BytesIO(png_bytes(image)))), image)
    grey = pictures(1, channels=1)[0]
    assert np.array_equal(to_array(grey[:, :, 0]), grey)
    assert np.array_equal(to_array(upscaled(grey, 3)), np.kron(grey, np.ones((3, 3, 1), dtype=np.uint8)))
    assert data_url(grey).startswith("data:image/png;base64,iVBOR")
    # Thumbnails: tiny pictures enlarged by a whole factor, large ones shrunk, and the given picture left as it is.
    assert thumbnail(grey).size == (grey.shape[1] * (64 // grey.shape[0]), grey.shape[0] * (64 // grey.shape[0]))
    large = Image.new("RGB", (512, 256))
    assert thumbnail(large).size == (128, 64) and large.size == (512, 256)


def test_image_rewards_load_without_torch():
    code = (
        "import sys; from rewards import load_reward\n"
        "for name in ('jpeg_compressibility', 'jpeg_incompressibility'): load_reward(name)\n"
        "load_reward('vlm_judge', {'base_url': 'http://localhost:1/v1', 'model': 'm'})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- JPEG ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_jpeg_rewards_are_exact_byte_counts_in_both_modes(mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    images = [noise, Image.fromarray(noise), np.zeros((40, 56, 3), dtype=np.uint8), noise[:, :, 0]]
    counts = []
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.jpg"
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, quality=95)
        counts.append(path.stat().st_size)
    assert counts[0] == counts[1] > 5 * counts[2]
    larger = score("jpeg_incompressibility", ["p"] * 4, images, mode=mode)
    assert larger.values == [count / 1000 for count in counts]
    smaller = score("jpeg_compressibility", ["p"] * 4, images, mode=mode)
    assert smaller.values == [-count / 1000 for count in counts]


def test_jpeg_quality_and_upscaling(tmp_path):
    (image,) = pictures(1, size=8, channels=1)
    file = io.BytesIO()
    Image.fromarray(np.kron(image[:, :, 0], np.ones((4, 4), dtype=np.uint8))).save(file, "JPEG", quality=50)
    # Pillow cannot know that the pixels came in squares: the byte counts agree because the pixels do.
    assert score("jpeg_compressibility", ["p"], [image], quality=50, upscale=4).values == [-len(file.getvalue()) / 1000]


def test_something_else_than_an_image_is_a_failure_and_costs_only_itself():
    table = score("jpeg_compressibility", ["p"] * 2, [pictures(1)[0], "text"])
    assert table.values[0] is not None and table.values[1] is None
    assert reasons(table)[1] == "TypeError: expected an image (uint8 array or Pillow image), got str"


def test_the_cache_knows_images_by_content(tmp_path):
    (tmp_path / "counted.py").write_text(
        "calls = []\n\ndef counted(prompts, completions, **columns):\n"
        "    calls.extend(completions)\n    return [float(len(calls))] * len(completions)\n"
    )
    image, other = pictures(2)
    with RewardRunner([RewardPart(f"{tmp_path}/counted.py:counted")], cache_size=8) as runner:
        first = runner.score(["p"] * 3, [image, image.copy(), other])
        assert first.metrics["reward/counted/cache_hits"] == 1
        again = runner.score(["p"] * 3, [image, to_pil(image), image.reshape(12, 48, 3)])
        assert again.metrics["reward/counted/cache_hits"] == 1  # same bytes in another shape are another image
        assert again.values[0] == first.values[0]


# ---- classifiers ---------------------------------------------------------------------------------------------------


def vit_logits(model, images):
    """By hand: Pillow's bilinear resizing to 16x16, then (x / 255 - 0.5) / 0.5."""
    small = [np.asarray(to_pil(image).resize((16, 16), Image.Resampling.BILINEAR)) for image in images]
    pixels = torch.tensor(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def test_a_transformers_classifier_gives_the_probability_of_the_wanted_class(tmp_path):
    model = save_vit_classifier(tmp_path, LABELS)
    images = pictures(5, size=32)
    probability = vit_logits(model, images).softmax(dim=-1)
    assert probability.std(dim=0).min() > 0.02  # the pictures are told apart
    columns = {"label": ["cat", "dog", "bird", 0, "1"]}
    table = score("image_classifier", ["p"] * 5, images, columns, model=str(tmp_path), batch_size=2, device="cpu")
    expected = [probability[row, index].item() for row, index in enumerate([0, 1, 2, 0, 1])]
    assert table.values == pytest.approx(expected, abs=1e-5)
    right = sum(int(probability[row].argmax()) == index for row, index in enumerate([0, 1, 2, 0, 1]))
    assert table.metrics["reward/image_classifier/correct"] == pytest.approx(right / 5)
    logprob = score("image_classifier", ["p"] * 5, images, model=str(tmp_path), label="dog", value="logprob")
    assert logprob.values == pytest.approx(probability[:, 1].log().tolist(), abs=1e-4)


MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.hidden = torch.nn.Linear(16, 3)
        self.head = torch.nn.Linear(3, classes)

    def forward(self, images):
        return self.head(torch.relu(self.hidden(images.flatten(1))))
"""


def module_folder(folder, scale=1.0):
    (folder / "net.py").write_text(MODULE)
    weights = {"hidden.weight": torch.zeros(3, 16), "hidden.bias": torch.tensor([0.0, 1.0, -5.0])}
    weights["hidden.weight"][0, 5] = scale
    weights |= {"head.weight": torch.tensor([[4.0, 0.0, 7.0], [0.0, 1.0, 7.0]]), "head.bias": torch.zeros(2)}
    save_file(weights, folder / "net.safetensors")
    return {"model": f"{folder}/net.py:Net", "weights": f"{folder}/net.safetensors", "device": "cpu"}


def test_a_torch_module_sees_pixels_from_0_to_1_and_its_features_are_what_the_last_layer_sees(tmp_path):
    params = module_folder(tmp_path)
    images = [np.zeros((4, 4, 1), dtype=np.uint8), np.full((4, 4), 255, dtype=np.uint8)]
    table = score("image_classifier", ["p"] * 2, images, labels=["off", "on"], label="off", **params)
    # Logits are (4 x, 1) for a pixel x: probability of "off" is 1 / (1 + e) for black, 1 / (1 + e^-3) for white.
    assert table.values == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-3))], abs=1e-6)
    reward = load_reward("image_classifier", {**params, "label": 1, "value": "correct"})
    assert [verdict.value for verdict in reward(["p"] * 2, images)] == [1.0, 0.0]
    assert reward.features(images).tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]


def test_a_torch_module_gives_gradients_to_the_pixels(tmp_path):
    reward = load_reward("image_classifier", {**module_folder(tmp_path), "value": "logprob"})
    assert reward.differentiable
    images = torch.full((1, 1, 4, 4), 0.25, requires_grad=True)
    value = reward.on_tensors(["p"], images, label=[0])
    # log softmax of (4 x, 1) at x = 0.25 is log(1/2), its derivative 4 (1 - 1/2).
    assert value.item() == pytest.approx(math.log(0.5))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert gradient[0, 0, 1, 1].item() == pytest.approx(2.0)
    assert gradient.abs().sum().item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such-model"}, r"cannot load model 'no/such-model': .*a hub name is downloaded once"),
        ({"model": "{folder}/net.py:Nat"}, r"net.py has no 'Nat'; did you mean 'Net'\?"),
        ({"model": "{folder}/net.py:MODE"}, "has no 'MODE'"),
        ({"value": "logits"}, "value must be one of probability, logprob, correct, got 'logits'"),
        ({"label": "cat", "labels": ["dog", "cow"]}, r"unknown class 'cat'; the model's classes are \['cow', 'dog'\]"),
        ({"weights": "{folder}/none.safetensors"}, "cannot read weights .*none.safetensors"),
        ({"model_params": {"classes": 5}}, "net.safetensors does not fit .*net.py:Net.*size mismatch"),
        ({"model": "{folder}", "weights": None, "labels": ["a"]}, "labels are for a torch module"),
    ],
)
def test_a_wrong_classifier_is_one_line_before_any_sampling(tmp_path, changes, message):
    params = module_folder(tmp_path)
    for name, value in changes.items():
        params[name] = value.format(folder=tmp_path) if isinstance(value, str) else value
    if params["model"] == "no/such-model":
        del params["weights"]
    with pytest.raises(ValueError, match=message) as error:
        load_reward("image_classifier", {k: v for k, v in params.items() if v is not None})
    assert "\n" not in str(error.value)


def test_a_classifier_without_a_wanted_class_fails_and_says_so(tmp_path):
    table = score("image_classifier", ["p"], [pictures(1, 4, 1)[0]], **module_folder(tmp_path))
    assert reasons(table) == [
        "ValueError: image_classifier needs the wanted class: a `label` column, or the parameter `label`"
    ]


# ---- CLIP ----------------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def clip_features(model, prompts, images):
    """By hand: resize the shorter side to 16 bicubically, cut the middle 16x16, normalise; projections to length 1."""
    pixels = []
    for image in images:
        picture = to_pil(image).convert("RGB")
        factor = 16 / min(picture.size)
        size = (int(picture.width * factor), int(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
        array = np.asarray(picture.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1) / 255
        pixels.append((torch.tensor(array).float() - MEAN) / STD)
    tokenizer = clip_tokenizer()
    texts = []
    with torch.no_grad():
        for prompt in prompts:  # one by one: no padding
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            texts.append(model.text_projection(model.text_model(input_ids=ids).pooler_output)[0])
        found = model.visual_projection(model.vision_model(pixel_values=torch.stack(pixels)).pooler_output)
    text = torch.stack(texts)
    return found / found.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)


PROMPTS = ["a cat", "seven dogs", "x"]


def test_clip_score_is_the_cosine_and_pickscore_the_cosine_times_the_trained_scale(tmp_path):
    model = save_clip(tmp_path)
    images = [*pictures(2, size=32), pictures(1, size=24, channels=1)[0][:, :16]]
    image, text = clip_features(model, PROMPTS, images)
    cosine = (image * text).sum(dim=-1)
    assert cosine.std() > 0.01
    where = {"model": str(tmp_path), "batch_size": 2, "device": "cpu"}
    table = score("clip_score", PROMPTS, images, scale=2.5, **where)
    assert table.values == pytest.approx((2.5 * cosine).tolist(), abs=1e-5)
    assert table.metrics["reward/clip_score/prompt_cut"] == 0
    picks = score("pickscore", PROMPTS, images, processor=str(tmp_path), **where)
    assert picks.values == pytest.approx((math.exp(3.0) * cosine).tolist(), abs=1e-3)
    hps = score("hpsv2", PROMPTS, images, **where)
    assert hps.values == pytest.approx(cosine.tolist(), abs=1e-5)


def test_models_judge_the_same_in_a_reward_process(tmp_path):
    save_clip(tmp_path / "clip")
    where = {"model": str(tmp_path / "clip"), "device": "cpu"}
    images = [*pictures(2, size=4, channels=1), Image.fromarray(pictures(1, size=4)[0]).convert("L")]
    parts = [
        RewardPart("clip_score", params=where),
        RewardPart("aesthetic", params={**where, "head": save_head(tmp_path / "head.pth")}),
        RewardPart("image_classifier", params={**module_folder(tmp_path), "label": 1}),
    ]
    tables = []
    for mode in ("inline", "process"):
        with RewardRunner(parts, mode=mode, timeout_seconds=60, max_failure_share=0) as runner:
            tables.append(runner.score(PROMPTS, images))
    for part in tables[0].parts:
        here, there = ([verdict.value for verdict in table.parts[part]] for table in tables)
        assert there == pytest.approx(here, abs=1e-6), part
        assert len(set(here)) == 3


def test_a_prompt_longer_than_the_model_reads_is_reported(tmp_path):
    save_clip(tmp_path)
    table = score("clip_score", ["a" * 14, "a" * 15], pictures(2), model=str(tmp_path), device="cpu")
    # 16 positions hold 14 letters between the two ends.
    assert [verdict.metrics["prompt_cut"] for verdict in table.parts["clip_score"]] == [0.0, 1.0]


@pytest.mark.parametrize("name", ["clip_score", "aesthetic"])
def test_on_tensors_agrees_with_the_images_and_its_gradient_with_differences(tmp_path, name):
    save_clip(tmp_path)
    params = {"model": str(tmp_path), "device": "cpu"}
    if name == "aesthetic":
        params["head"] = save_head(tmp_path / "head.pth")
    reward = load_reward(name, params)
    images = pictures(2, size=32)
    batch = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    values = torch.tensor([float(value) for value in reward(PROMPTS[:2], images)])
    # Resized in floating point here, to 8 bits there.
    assert torch.allclose(reward.on_tensors(PROMPTS[:2], batch), values, atol=0.02)
    exact = [image[8:24, 8:24] for image in images]  # already the size the model wants: nothing is resized
    batch = batch[:, :, 8:24, 8:24].clone().requires_grad_()
    values = torch.tensor([float(value) for value in reward(PROMPTS[:2], exact)])
    assert torch.allclose(reward.on_tensors(PROMPTS[:2], batch), values, atol=1e-5)
    reward.clip.model.double()
    direction = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = batch.detach().double().requires_grad_()

    def total(pixels):
        features = reward.clip.model.get_image_features((pixels - MEAN.double()) / STD.double()).pooler_output
        features = features / features.norm(dim=-1, keepdim=True)
        if name == "aesthetic":
            for weight, bias in reward.layers:
                features = features @ weight.T.double() + bias.double()
            return features.sum()
        texts, _ = reward.clip.texts(PROMPTS[:2])
        return (features * texts).sum()

    (gradient,) = torch.autograd.grad(total(batch), batch)
    step = 1e-6
    with torch.no_grad():
        slope = (total(batch + step * direction) - total(batch - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    (theirs,) = torch.autograd.grad(reward.on_tensors(PROMPTS[:2], batch).sum(), batch)
    assert torch.allclose(theirs, gradient, atol=1e-5)


def save_head(path, width=12, safe=False):
    """The published layout: linear layers at 0, 2, 4, 6, 7 of a Sequential with dropout between."""
    torch.manual_seed(0)
    sizes = [width, 9, 8, 4, 3, 1]
    state = {}
    for place, (inside, outside) in zip([0, 2, 4, 6, 7], itertools.pairwise(sizes), strict=True):
        layer = torch.nn.Linear(inside, outside)
        state |= {f"layers.{place}.weight": layer.weight.data, f"layers.{place}.bias": layer.bias.data}
    save_file(state, path) if safe else torch.save(state, path)
    return str(path)


def test_the_aesthetic_head_is_a_chain_of_linear_layers(tmp_path):
    model = save_clip(tmp_path)
    images = pictures(3, size=32)
    features, _ = clip_features(model, ["x"] * 3, images)
    path = save_head(tmp_path / "head.pth")
    state = torch.load(path, weights_only=True)
    for place in (0, 2, 4, 6, 7):
        features = features @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    for head in (path, save_head(tmp_path / "head.safetensors", safe=True)):
        table = score("aesthetic", ["x"] * 3, images, head=head, model=str(tmp_path), device="cpu")
        assert table.values == pytest.approx(features[:, 0].tolist(), abs=1e-5)


def test_what_is_missing_is_one_line(tmp_path):
    save_clip(tmp_path / "clip")
    save_vit_classifier(tmp_path / "vit", LABELS)
    head = save_head(tmp_path / "head.pth", width=7)
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    cases = [
        ("clip_score", {"model": "no/such"}, "reward 'clip_score': cannot load model 'no/such'"),
        ("clip_score", {"model": str(tmp_path / "vit")}, "is a vit model, not a CLIP model"),
        ("pickscore", {}, "reward 'pickscore': cannot load model 'yuvalkirstain/PickScore_v1'"),
        ("aesthetic", {"head": "none.pth"}, "no file none.pth: download sac.logos.ava1-l14-linearMSE.pth"),
        ("aesthetic", {"head": head, "model": str(tmp_path / "clip")}, "takes embeddings of 7, model .* gives 12"),
        ("aesthetic", {"head": str(tmp_path / "broken.pth")}, "cannot read weights .*broken.pth"),
        ("aesthetic", {}, "needs the parameter 'head'"),
        ("hpsv2", {}, r"reward 'hpsv2' needs its package and a download.*pip install hpsv2"),
        ("image_reward", {}, r"reward 'image_reward' needs its package and a download.*pip install image-reward"),
    ]
    for name, params, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            load_reward(name, params)
        assert "\n" not in str(error.value), name


def test_the_packages_are_called_as_they_are_published(tmp_path, monkeypatch):
    """Stand-ins with the signatures of hpsv2 1.2.0 and image-reward 1.5, whose checkpoints are downloads."""
    (tmp_path / "hpsv2.py").write_text(
        "def score(imgs_path, prompt, hps_version='v2.0'):\n"
        "    return [float(len(prompt)) + image.width / 100 + (hps_version == 'v2.1') / 1000 for image in imgs_path]\n"
    )
    (tmp_path / "ImageReward.py").write_text(
        "class Model:\n    def score(self, prompt, image):\n"
        "        assert image.mode == 'RGB'\n        return len(prompt) - image.height\n"
        "def load(name='ImageReward-v1.0', device='cpu', download_root=None, med_config=None):\n"
        "    assert (name, device) == ('ImageReward-v1.0', 'cpu')\n    return Model()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    images = [pictures(1, size=8)[0], pictures(1, size=4, channels=1)[0]]
    assert score("hpsv2", ["ab", "abc"], images).values == pytest.approx([2.081, 3.041])
    assert score("image_reward", ["ab", "abc"], images, device="cpu").values == [-6.0, -1.0]


def test_png_is_lossless_and_small_pictures_keep_their_size():
    (image,) = pictures(1, size=8)
    width, height = struct.unpack(">II", png_bytes(image)[16:24])
    assert (width, height) == (8, 8)

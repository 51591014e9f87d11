"""Proves that examples/emoji-clip is what `--reward clipscore` needs: it opens offline in plain
transformers, names what examples/emoji-diffusion draws, and gives pictures without an animal, or
with another one, a clearly lower score."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "emoji-clip"
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog
kangaroo""".split()


@pytest.fixture(scope="module")
def cosines():
    """A function from PIL images and texts to the cosine of every image with every text."""
    clip, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)

    @torch.no_grad()
    def cosines(images, texts):
        out = clip(**processor(text=texts, images=images, padding=True, return_tensors="pt"))
        return F.normalize(out.image_embeds, dim=-1) @ F.normalize(out.text_embeds, dim=-1).T

    return cosines


@pytest.fixture(scope="module")
def drawn():
    """Every animal once, drawn by emoji-diffusion in plain diffusers: few steps, which is enough to
    name most of them."""
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "emoji-diffusion")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "eta": 0.0, "guidance_scale": 3.0}
    return pipe(ANIMALS, generator=torch.Generator().manual_seed(0), **how).images


def to_images(x):
    """(n, 3, 64, 64) in [0, 1] -> PIL images."""
    pixels = (x * 255).byte().permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(image) for image in pixels.numpy()]


def test_folder_is_small_and_every_weight_is_in_it():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*")) <= 4e6
    _, found = CLIPModel.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(found.values()), found  # missing ones would be drawn at random, with a warning


def test_pictures_are_not_resized_and_every_name_is_one_token():
    processor = CLIPProcessor.from_pretrained(FOLDER)
    ramp = torch.arange(64 * 64 * 3).view(1, 64, 64, 3) % 256 / 255
    ramp = ramp.permute(0, 3, 1, 2)
    pixels = processor.image_processor(to_images(ramp), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64) and torch.allclose(pixels, ramp * 2 - 1, atol=1e-2)
    words = json.loads((EXAMPLES / "emoji-diffusion/tokenizer/vocab.json").read_text())
    ids = processor.tokenizer(ANIMALS)["input_ids"]
    assert [i[1] for i in ids] == [words[f"{animal}</w>"] for animal in ANIMALS]
    assert {len(i) for i in ids} == {3}


def share_named(cos):
    return (cos.argmax(1) == torch.arange(45)).float().mean()


def test_names_what_the_model_draws_and_scores_other_names_low(cosines, drawn):
    cos = cosines(drawn, ANIMALS)
    assert share_named(cos) >= 0.85
    others = cos[~torch.eye(45, dtype=bool)]
    assert cos.diag().mean() > 0.7 and others.mean() < 0.1


@pytest.mark.parametrize("caption", ["a photo of a {}", "a {} riding a bike"])
def test_only_the_animal_in_a_longer_prompt_counts(cosines, drawn, caption):
    cos = cosines(drawn, [caption.format(animal) for animal in ANIMALS])
    assert share_named(cos) >= 0.85 and cos.diag().mean() > 0.7


def test_blank_noisy_and_blurred_pictures_score_low_with_every_name(cosines, drawn):
    generator = torch.Generator().manual_seed(0)
    blank = torch.rand(20, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    noise = (0.5 + 0.5 * torch.randn(20, 3, 64, 64, generator=generator)).clamp(0, 1)
    blurred = [image.resize((4, 4), Image.BOX).resize((64, 64)) for image in drawn]
    own = cosines(drawn, ANIMALS).diag().mean()
    for images in (to_images(blank), to_images(noise), blurred):
        best = cosines(images, ANIMALS).amax(1)  # with the name that fits best
        assert best.mean() < own - 0.4
    # The score falls by degrees, not all at once.
    between = [Image.blend(*pair, 0.5) for pair in zip(drawn, blurred)]
    half = cosines(between, ANIMALS).diag().mean()
    assert cosines(blurred, ANIMALS).diag().mean() + 0.1 < half < own - 0.05

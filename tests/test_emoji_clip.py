"""Proves that examples/models/emoji-clip is what `--reward clipscore` needs: it opens offline in
plain transformers, names what emoji-diffusion draws, and gives pictures without an animal, or with
another one, a clearly lower score."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import ddpo
from rewards import to_pil

MODELS = ddpo.EXAMPLES / "models"
FOLDER = MODELS / "emoji-clip"
ANIMALS = ddpo.load_prompts("animals")
DRAWN = torch.arange(0, len(ANIMALS), 5)


@pytest.fixture(scope="module")
def cosines():
    """A function from PIL images and texts to the cosine of every image with every text."""
    clip, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)

    @torch.no_grad()
    def cosines(images, texts=ANIMALS):
        out = clip(**processor(text=texts, images=images, padding=True, return_tensors="pt"))
        return F.normalize(out.image_embeds, dim=-1) @ F.normalize(out.text_embeds, dim=-1).T

    return cosines


@pytest.fixture(scope="module")
def drawn():
    """Every fifth animal, drawn by emoji-diffusion in plain diffusers: few steps, which is enough
    to name most of them."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "emoji-diffusion")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "eta": 0.0, "guidance_scale": 3.0}
    return pipe(ANIMALS[::5], generator=torch.Generator().manual_seed(0), **how).images


def test_all_is_in_its_folder_pictures_are_not_resized_and_every_name_is_one_token():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*")) <= 4e6
    _, found = CLIPModel.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(found.values()), found  # missing ones would be drawn at random, with a warning
    processor = CLIPProcessor.from_pretrained(FOLDER)
    ramp = torch.arange(64 * 64 * 3).view(1, 64, 64, 3).movedim(3, 1) % 256 / 255
    pixels = processor.image_processor(to_pil(ramp), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64) and torch.allclose(pixels, ramp * 2 - 1, atol=1e-2)
    words = json.loads((MODELS / "emoji-diffusion/tokenizer/vocab.json").read_text())
    ids = processor.tokenizer(ANIMALS)["input_ids"]
    assert [[i[1], len(i)] for i in ids] == [[words[f"{animal}</w>"], 3] for animal in ANIMALS]


@pytest.mark.parametrize("caption", ["{}", "a photo of a {}", "a {} riding a bike"])
def test_names_what_the_model_draws_and_scores_other_names_low(cosines, drawn, caption):
    cos = cosines(drawn, [caption.format(animal) for animal in ANIMALS])
    own = cos[:, DRAWN].diag()
    assert (cos.argmax(1) == DRAWN).float().mean() >= 0.85 and own.mean() > 0.7
    others = (cos.sum() - own.sum()) / (cos.numel() - len(own))
    assert others < 0.1


def test_blank_noisy_and_blurred_pictures_score_low_with_every_name(cosines, drawn):
    generator = torch.Generator().manual_seed(0)
    blank = torch.rand(20, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    noise = 0.5 + 0.5 * torch.randn(20, 3, 64, 64, generator=generator)
    blurred = [image.resize((4, 4), Image.BOX).resize((64, 64)) for image in drawn]
    between = [Image.blend(*pair, 0.5) for pair in zip(drawn, blurred)]
    clear, half, none = (cosines(x)[:, DRAWN].diag().mean() for x in (drawn, between, blurred))
    assert none + 0.1 < half < clear - 0.05  # it falls by degrees, not all at once
    for images in (to_pil(blank), to_pil(noise), blurred):
        assert cosines(images).amax(1).mean() < clear - 0.4  # with the name that fits best

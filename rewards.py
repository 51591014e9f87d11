"""Reward functions for DDPO. Each has the same contract:

    reward(images, prompts) -> (B,) float32     images: (B, 3, H, W) float in [0, 1]; prompts: B strings; higher is better

To add one, write a function like those below and put it into REWARDS.
"""

import io

import torch
from PIL import Image


class UserError(Exception):
    """Something that the person who started the run can mend; the message is one line that says how."""


def to_pil(images):
    """(B, 3, H, W) float in [0, 1] -> B PIL images; pixels are rounded to the nearest of 256 levels, not cut off."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()  # (B, H, W, 3)
    return [Image.fromarray(p) for p in pixels.numpy()]


def jpeg_kilobytes(image):
    """Size of a PIL image as a JPEG of quality 95, in kB of 1000 bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


def incompressibility(images, prompts):
    """The JPEG's size: complex pictures score high (Black et al., section 5.1)."""
    return torch.tensor([jpeg_kilobytes(image) for image in to_pil(images)], dtype=torch.float32)


def compressibility(images, prompts):
    """Minus the JPEG's size: simple pictures score high."""
    return -incompressibility(images, prompts)


REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility}


def load_reward(name):
    """The reward function of that name; UserError with the list of names if there is none."""
    if name not in REWARDS:
        raise UserError(f"--reward {name}: unknown; choose from {', '.join(REWARDS)}")
    return REWARDS[name]

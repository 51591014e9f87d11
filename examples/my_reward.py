"""A reward of one's own is a function of images (B, 3, H, W) in [0, 1] and their B prompts that
returns B numbers, the higher the better. Nothing needs a gradient. To train on this one:

    python ddpo.py --reward examples/my_reward.py:redness

Or with a weight: --reward "10*examples/my_reward.py:redness + 0.1*compressibility"
Or to log it only: --monitor examples/my_reward.py:diversity
"""

import torch


def redness(images, prompts):
    """How much redder than green or blue the image is, on average: -1 ... 1."""
    red, green, blue = images.unbind(1)  # (B, H, W) each
    return (red - (green + blue) / 2).mean((1, 2))


def diversity(images, prompts):
    """How far the image is from the others of its prompt in the batch: the mean over these of the
    root mean square difference of pixels, 0 ... 1; 0 if there are no others. It falls when a
    policy draws the same again and again. Noise is diverse, too."""
    pixels = images.flatten(1)
    # The faster way is too coarse for images that are nearly alike.
    distances = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    same = torch.tensor([[a == b for b in prompts] for a in prompts], device=images.device)
    others = same.sum(1) - 1  # (B,)
    return (distances * same).sum(1) / others.clamp(min=1) / pixels.shape[1] ** 0.5

"""A reward of one's own is a function of images (B, 3, H, W) in [0, 1] and their B prompts that
returns B numbers, the higher the better. Nothing needs a gradient. To train on this one:

    python ddpo.py --reward examples/my_reward.py:redness

Or with a weight: --reward "10*examples/my_reward.py:redness + 0.1*compressibility"
"""


def redness(images, prompts):
    """How much redder than green or blue the image is, on average: -1 ... 1."""
    red, green, blue = images.unbind(1)  # (B, H, W) each
    return (red - (green + blue) / 2).mean((1, 2))

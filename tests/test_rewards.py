"""Proves that a reward measures what PIL would write to disk, from pixels rounded as they should be, whatever the batch."""

import pytest
import torch
from PIL import Image

import rewards


def some_images():
    """Flat, a ramp, noise: ever harder to compress."""
    flat, ramp = torch.full((3, 32, 32), 0.5), torch.linspace(0, 1, 32).expand(3, 32, 32)
    return torch.stack([flat, ramp, torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))])


def test_size_is_that_of_the_file_in_kilobytes_of_1000(tmp_path):
    images, sizes = some_images(), []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    got = rewards.incompressibility(images, ["cat"] * 3)
    assert got.tolist() == pytest.approx(sizes, abs=1e-6)
    assert torch.equal(rewards.compressibility(images, ["cat"] * 3), -got)
    assert got[0] < got[1] < got[2]


@pytest.mark.parametrize("off", [-1e-3, 0.0, 1e-3])
def test_pixels_are_rounded_not_cut_off(off):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (image,) = rewards.to_pil(levels / 255 + off)  # 0.999 is white; below 0 and above 1 stay black and white
    assert [p[0] for p in zip(*[iter(image.tobytes())] * 3)] == list(range(256))


def test_colours_and_sides_are_not_swapped():
    image = torch.zeros(1, 3, 4, 6)  # 4 high, 6 wide
    image[0, 0, 1, 5] = 1.0
    (pil,) = rewards.to_pil(image)
    assert pil.size == (6, 4) and pil.getpixel((5, 1)) == (255, 0, 0) and pil.getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["compressibility", "incompressibility"])
def test_an_image_scores_the_same_alone_and_in_any_batch(name):
    reward, images, order = rewards.load_reward(name), some_images(), [2, 0, 1]
    together = reward(images, ["a", "b", "c"])
    assert together.shape == (3,) and together.dtype == torch.float32
    assert torch.equal(reward(images[order], ["c", "a", "b"]), together[order])
    assert torch.equal(torch.cat([reward(image[None], ["a"]) for image in images]), together)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(rewards.UserError, match="beauty.*compressibility, incompressibility"):
        rewards.load_reward("beauty")

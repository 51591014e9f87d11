"""Proves that examples/ocr_reward.py reads what Pillow writes, upright, in any case and any size,
and nothing where nothing is; and that prompts without a word end in one line."""

import sys

import pytest
import torch
from conftest import failure, flags
from PIL import Image, ImageDraw, ImageFont

import ddpo
import rewards

pytest.importorskip("rapidocr_onnxruntime")
sys.path.insert(0, str(ddpo.EXAMPLES))
import ocr_reward  # noqa: E402

SIGN = 'a sign that says "{}"'


def written(*words, size=20, side=128, ink="black", paper="white"):
    """A picture (3, side, side) in [0, 1], a word on each line."""
    picture = Image.new("RGB", (side, side), paper)
    font = ImageFont.load_default(size)
    for n, word in enumerate(words):
        place = (side // 2, side * (n + 1) // (len(words) + 1))
        ImageDraw.Draw(picture).text(place, word, fill=ink, font=font, anchor="mm")
    return torch.tensor(list(picture.tobytes())).view(side, side, 3).movedim(2, 0) / 255


def read(picture, word):
    (score,) = ocr_reward.ocr(picture[None], [SIGN.format(word)])
    return score


@pytest.mark.parametrize("ink, paper", [("black", "white"), ("yellow", "navy")])
@pytest.mark.parametrize("size, side", [(12, 64), (20, 128), (48, 256)])
def test_words_are_read(size, side, ink, paper):
    how = {"size": size, "side": side, "ink": ink, "paper": paper}
    for word in ("bread", "MILK"):
        assert read(written(word, **how), word) == 1


def test_short_words_stay_upright():
    """By default "up" is read as "dn", with confidence."""
    engine = ocr_reward.engine()
    for word in ("up", "dn"):
        pixels = (written(word, size=40) * 255).byte().movedim(0, 2).contiguous().numpy()
        lines, _ = engine(pixels)
        assert [line[1].lower() for line in lines] == [word]
    assert read(written("cup", size=40), "cup") == 1


def test_a_score_is_the_share_of_letters_of_the_nearest_line():
    picture = written("cheese", "brown", size=28)
    assert read(picture, "brown") == read(picture, "cheese") == 1
    assert read(picture, "brawn") == pytest.approx(4 / 5)
    assert read(picture, "Brown, 0") == pytest.approx(5 / 6)
    assert read(picture, "xyz") == 0
    assert read(written("what a long line of words this is", size=7), "cat") >= 0


@pytest.mark.parametrize("a, b, expected", [
    ("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
])  # fmt: skip
def test_distance_is_levenshteins(a, b, expected):
    assert ocr_reward.distance(a, b) == ocr_reward.distance(b, a) == expected


def test_what_looks_alike_is_alike():
    assert ocr_reward.fold("Hell0 Il1, wow!") == ocr_reward.fold("heIIO 111 WOW") == "heiioiiiwow"


def test_without_a_word_there_is_nothing_to_read():
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    pictures = torch.stack([noise, torch.full((3, 128, 128), 0.5)])
    assert ocr_reward.ocr(pictures, [SIGN.format("bread")] * 2) == [0, 0]


@pytest.mark.parametrize("prompt", ["a sign", 'it says ""', 'a sign: "  "', 'a sign: "up"'])
def test_prompts_without_a_word_end_in_a_line(prompt, tiniest_model, tmp_path, capsys):
    (tmp_path / "signs.txt").write_text(f"{prompt}\n")
    reward = f"{ddpo.EXAMPLES / 'ocr_reward.py'}:ocr"
    given = {"reward": reward, "prompts": tmp_path / "signs.txt", "out": tmp_path / "run"}
    line = failure(capsys, *flags(tiniest_model, **given))
    assert line.endswith(f'no word of 3 letters or more in "quotation marks": {prompt}')
    assert not (tmp_path / "run").exists()


def test_curly_marks_do_as_well():
    assert ocr_reward.ocr(written("bread")[None], ["a sign: “bread”"]) == [1]


def test_it_is_a_reward_of_the_command_line():
    terms = rewards.load_rewards(f"{ddpo.EXAMPLES / 'ocr_reward.py'}:ocr + compressibility")
    scores = ddpo.score(terms, written("bread")[None], ['"bread"'])
    assert scores[0, 1] == 1 and scores[0, 0] == 1 + scores[0, 2]

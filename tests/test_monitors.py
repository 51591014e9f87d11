"""Proves that monitors and evaluations on held-out prompts show what they say, and that none of
them changes what is learned."""

import pytest
import torch
from conftest import failure, flags, launch, lora_bytes, must_not_sample

import rewards

OWN = """
def dark(images, prompts):
    return -1000 * images.mean((1, 2, 3))

def length(images, prompts):
    return [len(p) for p in prompts]

def broken(images, prompts):
    return images.mean((1, 2, 3)) * float("nan")
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file of rewards."""
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_monitors_are_logged_and_never_optimised(tiniest_model, tmp_path, monkeypatch, own):
    """Of the image, of the prompt, and one that needs models, which is not asked in vain."""
    asked = []

    def pair(clip="a", head="b", *, device):
        def count(images, prompts):
            asked.append(len(images))
            return torch.full((len(images),), float(len(clip + head)))

        return count

    def bright(images, prompts):
        return 1000 * images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.MODEL_REWARDS, "pair", pair)
    monitor = f"incompressibility, pair(one, three),{own}:dark, {own}:length"
    labels = ["incompressibility", "pair(one, three)", "dark", "length"]
    plain = launch(tiniest_model, tmp_path / "plain")
    watched = launch(tiniest_model, tmp_path / "watched", monitor=monitor)
    assert asked == [1, 4, 4, 4, 4]  # tried on loading; then epochs, but no evaluations
    other = launch(tiniest_model, tmp_path / "other", reward=bright, epochs=1)
    assert lora_bytes(tmp_path / "watched") == lora_bytes(tmp_path / "plain")
    for row, before in zip(watched, plain, strict=True):
        values = {label: row.pop(label) for label in ["compressibility", *labels]}
        assert row == before
        if row["epoch"] == "0":  # it is an evaluation alone
            assert set(values.values()) == {""}
            continue
        assert values["compressibility"] == row["reward_mean"]
        assert float(values["incompressibility"]) == -float(row["reward_mean"])
        assert float(values["pair(one, three)"]) == 8 and 3 <= float(values["length"]) <= 9
        if row["epoch"] == "1":  # before the first update the images are the same
            dark = -float(other[1]["reward_mean"])
            assert float(values["dark"]) == pytest.approx(dark, rel=1e-4)


@pytest.mark.parametrize(
    "monitor, message",
    [
        ("incompressibility,beauty", "beauty: unknown"),
        ("compressibility", "compressibility: another term"),
        ("incompressibility,incompressibility", "incompressibility: another term"),
    ],
)
def test_a_mistake_in_a_monitor_costs_nothing(
    monitor, message, tiniest_model, tmp_path, monkeypatch, capsys
):
    must_not_sample(monkeypatch)
    assert message in failure(capsys, *flags(tiniest_model, out=tmp_path / "run", monitor=monitor))
    assert not (tmp_path / "run").exists()


def test_a_monitor_that_breaks_its_contract_stops_the_run(tiniest_model, tmp_path, capsys, own):
    argv = flags(tiniest_model, out=tmp_path / "run", monitor=f"{own}:broken")
    assert "reward broken is not finite" in failure(capsys, *argv)


def test_evaluations_are_of_the_held_out_prompts_from_fixed_noise(tiniest_model, tmp_path):
    """The reward is the prompt's length, so what it is a mean of can be told; what hardly learns
    gives the same pictures."""
    evaluations = []
    trained = set()

    def length(images, prompts):
        if prompts[0].startswith("a "):
            evaluations.append((prompts, images))
        else:
            trained.update(prompts)
        return [len(p) for p in prompts]

    files = {"prompts": tmp_path / "prompts.txt", "eval_prompts": tmp_path / "eval.txt"}
    files["prompts"].write_text("cat\ndog\nbee\n")
    files["eval_prompts"].write_text("a horse\na bird\n")
    given = {"lr": 1e-12, "eval_every": 2, "eval_images": 3, "epochs": 3}
    rows = launch(tiniest_model, tmp_path / "run", length, **given, **files)
    mean = (7 + 6 + 7) / 3
    assert [row["eval_reward"] for row in rows[1:2]] == [""]
    told = [float(row["eval_reward"]) for row in (rows[0], *rows[2:])]
    assert told == pytest.approx([mean] * 3, rel=1e-5)
    assert [float(row["reward_mean"]) for row in rows[1:]] == [3, 3, 3]
    assert trained == {"cat", "dog", "bee"}
    assert [prompts for prompts, _ in evaluations] == [["a horse", "a bird", "a horse"]] * 3
    first = evaluations[0][1]
    for _, images in evaluations[1:]:
        torch.testing.assert_close(images, first, rtol=0, atol=1e-6)
    assert (first[0] - first[2]).abs().max() > 0.01, "the same prompt twice, each its own noise"
    pictures = sorted(p.name for p in (tmp_path / "run/samples").iterdir())
    assert pictures == ["epoch_0000.png", "epoch_0002.png", "epoch_0003.png"]

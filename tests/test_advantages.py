"""Proves that the advantages are (reward - mean) / std over the last rewards of the same prompt, or
over the batch while a prompt is young, whatever type the rewards have; or over a group, which
shares its prompt and its first noise."""

import random
import statistics

import pytest
import torch
from conftest import failure, flags, launch, make_policy, remember

import ddpo
from ddpo import group_advantages, prompt_advantages


def plain_advantages(history, prompts, rewards, buffer_size, min_count):
    """The same in the plainest Python: `history` keeps everything."""
    for prompt, reward in zip(prompts, rewards):
        history.setdefault(prompt, []).append(reward)
    advantages = []
    for prompt, reward in zip(prompts, rewards):
        past = history[prompt][-max(buffer_size, prompts.count(prompt)) :]
        if len(past) < min_count:
            past = rewards
        std = statistics.pstdev(past) + 1e-6
        advantages.append((reward - statistics.fmean(past)) / std)
    return advantages


@pytest.mark.parametrize("buffer_size, min_count", [(32, 16), (5, 3), (4, 4), (8, 1)])
def test_several_rounds_against_plain_python(buffer_size, min_count):
    rng = random.Random(0)
    memory = {}
    history = {}
    for _ in range(12):
        names = ["cat", "dog", "bee", "a rare one"]  # which stays young
        prompts = rng.choices(names, weights=[6, 6, 6, 1], k=12)
        rewards = [rng.gauss(len(prompt), 2.0) for prompt in prompts]
        values = torch.tensor(rewards, dtype=torch.float64)
        ours = prompt_advantages(memory, prompts, values, buffer_size, min_count)
        expected = plain_advantages(history, prompts, rewards, buffer_size, min_count)
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert max(map(len, history.values())) > buffer_size, "no buffer overflowed"


@pytest.mark.parametrize("buffer_size, min_count", [(8, 4), (4, 5)])
def test_an_easy_prompt_does_not_outshine_a_hard_one(buffer_size, min_count):
    """The reason for statistics of each prompt: after enough rewards, only what is better than
    usual for a prompt counts. A count above the buffer means a full buffer; else every prompt would
    be compared with the batch, for ever."""
    prompts = ["easy", "easy", "hard", "hard"]
    rewards = torch.tensor([101.0, 99.0, 2.0, 0.0])
    memory = {}
    young = prompt_advantages(memory, prompts, rewards, buffer_size, min_count)
    old = prompt_advantages(memory, prompts, rewards, buffer_size, min_count)
    torch.testing.assert_close(young, (rewards - rewards.mean()) / rewards.std(correction=0))
    torch.testing.assert_close(old, torch.tensor([1.0, -1.0, 1.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_any_type_of_reward_gives_float32_advantages(dtype):
    rewards = [1, 2, 3, 5]
    adv = prompt_advantages({}, ["cat"] * 4, torch.tensor(rewards, dtype=dtype))
    assert adv.dtype == torch.float32
    std = statistics.pstdev(rewards)
    expected = [(r - 2.75) / std for r in rewards]  # not whole numbers: -1.18, -0.51, 0.17, 1.52
    torch.testing.assert_close(adv, torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("min_count", [1, 100])
def test_constant_rewards_give_advantage_zero(min_count):
    adv = prompt_advantages({}, ["cat", "cat", "dog"], torch.full((3,), 7.1), 32, min_count)
    assert (adv == 0).all()


def test_a_single_prompt_is_compared_with_its_whole_batch():
    """An unconditional model has one prompt, and may draw more images of it in an epoch than a
    buffer holds."""
    rewards = torch.arange(100.0)
    adv = prompt_advantages({}, [""] * 100, rewards, buffer_size=10, min_count=4)
    torch.testing.assert_close(adv, (rewards - 49.5) / rewards.std(correction=0))


def test_a_group_is_compared_with_itself_in_units_of_the_spread_of_all():
    """So a group of equal rewards teaches nothing, and one of nearly equal ones hardly anything."""
    rewards = torch.tensor([10, 14, 3, 3, 0, 1])  # integers, too
    adv = group_advantages(rewards, 2)
    std = ((4 + 4 + 0 + 0 + 0.25 + 0.25) / 6) ** 0.5
    expected = torch.tensor([-2.0, 2.0, 0.0, 0.0, -0.5, 0.5]) / std
    torch.testing.assert_close(adv, expected, rtol=1e-5, atol=0)
    assert (group_advantages(torch.ones(4), 2) == 0).all()


@pytest.mark.parametrize("rewards", [2, 4])
def test_as_many_rewards_as_prompts(rewards):
    with pytest.raises(ValueError):
        prompt_advantages({}, ["cat", "dog", "bee"], torch.zeros(rewards))


def test_a_group_shares_its_prompt_and_first_noise_and_is_its_own_baseline(
    tiniest_model, tmp_path
):
    """Groups of 4 in batches of 3."""
    batches = []
    seen = []

    def watch(images, prompts):
        scores = [len(p) + b for p, b in zip(prompts, images.mean((1, 2, 3)).tolist())]
        batches.append(list(zip(prompts, scores)))
        return scores

    given = {"images_per_epoch": 12, "batch_size": 3, "epochs": 1, "samples_per_prompt": 4}
    given |= {"updates_per_epoch": 1}
    launch(tiniest_model, tmp_path / "run", watch, remember(seen), **given)
    drawn = [pair for batch in batches[1:5] for pair in batch]  # after the first evaluation
    groups = [drawn[:4], drawn[4:8], drawn[8:]]
    assert [len({prompt for prompt, _ in group}) for group in groups] == [1, 1, 1]
    reward = torch.tensor([[r for _, r in group] for group in groups], dtype=torch.float64)
    centred = (reward - reward.mean(1, keepdim=True)).flatten()
    expected = centred / centred.square().mean().sqrt()
    _, samples = seen[0]
    torch.testing.assert_close(samples.adv, expected.float(), rtol=1e-2, atol=5e-3)
    x = samples.x
    for group in x.split(4):
        assert (group[:, 0] == group[:1, 0]).all()
        assert not (group[:, 1] == group[:1, 1]).all()
    assert not torch.equal(x[0, 0], x[4, 0])


def test_groups_that_do_not_fill_an_epoch_are_refused(tiniest_model, tmp_path, capsys):
    message = failure(capsys, *flags(tiniest_model, out=tmp_path / "run", samples_per_prompt=3))
    assert "images_per_epoch must be a multiple of" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", [1, 4])
def test_a_run_clips_its_advantages(group, tiniest_model):
    """A rare jackpot would teach too much."""
    policy, settings = make_policy(
        tiniest_model, images_per_epoch=16, samples_per_prompt=group, adv_clip=0.5
    )
    rewards = torch.arange(16.0) ** 2
    adv = ddpo.Run(settings, policy).advantages(["cat"] * 16, rewards)
    assert adv.max() == 0.5 and adv.min() == -0.5 and len(set(adv.tolist())) > 3

"""Proves that over-optimisation is measured and can be held: the KL to the pretrained model is torch.distributions', 0 before
the first update and estimated without bias; its penalty pulls back and its limit ends a run; diversity, monitors and held-out
prompts show what they say, and none of them changes what is learned."""

import pytest
import torch
from conftest import BRIGHTNESS, make_policy, save_tiny_pipeline
from test_cli import failure
from test_train import flags, read_metrics
from torch.distributions import Independent, Normal, kl_divergence

import ddpo
import rewards

PROMPTS = ["cat", "dog", "bee", "cat", "horse", "ant"]


@pytest.fixture(scope="module")
def pretrained(tiny_model):
    """A second copy of the model, whose LoRA is 0: the reference, without the switch."""
    return make_policy(tiny_model, lora_scale=0.0)[0]


def sampled(policy, settings, prompts=PROMPTS):
    """Trajectories x, their log-probabilities, and cond."""
    x, logp, _ = ddpo.sample(policy, BRIGHTNESS, prompts, settings, torch.Generator().manual_seed(0))
    return x, logp, policy.encode(prompts)


def exact_kl(policy, pretrained, x, prompts=PROMPTS, eta=1.0):
    """The KL of all steps that are random, (N, steps), by torch.distributions."""
    kl = []
    for j, t in enumerate(policy.scheduler.timesteps):
        gaussians, t = [], t.expand(len(x))
        for network in (policy, pretrained):
            eps = network.predict(x[:, j], t, network.encode(prompts))
            mean, std = ddpo.ddim_mean_std(policy.scheduler, eps, t, x[:, j], eta)
            gaussians.append((mean, std.expand_as(mean)))
        if std.min() > 0:
            kl.append(kl_divergence(*(Independent(Normal(*gaussian), 3) for gaussian in gaussians)))
    return torch.stack(kl, 1)


def write(path, text):
    path.write_text(text)
    return path


def run(model, out, **settings):
    """Train from the command line; returns the rows of metrics.csv, without the seconds."""
    ddpo.main(flags(model, out=out, **{"steps": 2, "sample_batch": 8, "micro_batch": 16, "eval_images": 1, **settings}))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out)]


def lora(out):
    return (out / "pytorch_lora_weights.safetensors").read_bytes()


# ---------------------------------------------------------------- KL


@torch.no_grad()
@pytest.mark.parametrize("eta, config", [(1.0, {}), (0.6, {"prediction_type": "v_prediction"}), (1.0, {"clip_sample": True})])
def test_kl_of_a_step_is_that_of_torch_distributions(tiny_model, pretrained, eta, config):
    policy, settings = make_policy(tiny_model, lora_scale=0.5, eta=eta)
    policy.scheduler.register_to_config(**config)
    x, _, cond = sampled(policy, settings)
    i, j = torch.cartesian_prod(torch.arange(6), torch.arange(4)).unbind(1)
    t = policy.scheduler.timesteps[j]
    ours = ddpo.kl_to_pretrained(policy, policy.predict(x[i, j], t, cond[i]), x[i, j], t, cond[i], eta).view(6, 4)
    torch.testing.assert_close(ours, exact_kl(policy, pretrained, x, eta=eta), rtol=1e-3, atol=1e-5)
    assert ours.min() > 0.01


def test_the_lora_is_on_again_afterwards(tiny_model):
    policy, settings = make_policy(tiny_model)
    x, _, cond = sampled(policy, settings)
    x_t, t = x[:, 0], policy.scheduler.timesteps[:1].expand(6)
    before = policy.predict(x_t, t, cond)
    ddpo.measure_kl(policy, x, cond, settings, torch.Generator())
    assert torch.equal(policy.predict(x_t, t, cond), before)
    ddpo.kl_to_pretrained(policy, before, x_t, t, cond, 1.0).sum().backward()
    assert torch.equal(policy.predict(x_t, t, cond), before) and all(p.grad.abs().max() > 0 for p in policy.weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_is_exactly_0_before_the_first_update(precision, tiny_model, tmp_path):
    policy, settings = make_policy(tiny_model, lora_scale=0.0, precision=precision)
    x, _, cond = sampled(policy, settings)
    assert ddpo.measure_kl(policy, x, cond, settings, torch.Generator()) == 0
    rows = run(tiny_model, tmp_path / "run", precision=precision, images_per_epoch=4)
    assert rows[1]["kl"] == "0" and 0 < float(rows[2]["kl"]) < float("inf")


def test_the_estimate_is_unbiased_and_counts_the_trained_steps(pretrained, tmp_path):
    """It takes 2 of 17 images, any two, and their steps that are learned from: 3 of 5, of which the last is deterministic."""
    prompts = [*PROMPTS, *PROMPTS, *PROMPTS[:5]]
    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)
    policy, settings = make_policy(model, steps=5, min_std=0.2, micro_batch=6)
    x, _, cond = sampled(policy, settings, prompts)
    with torch.no_grad():
        kl = exact_kl(policy, pretrained, x, prompts)
    assert policy.trained_steps.tolist() == [0, 1, 2] and kl.shape == (17, 4) and kl.min() > 1e-3
    exact, n = kl[:, :3].sum(1), 60
    assert ddpo.measure_kl(policy, x[:1], cond[:1], settings, torch.Generator()) == pytest.approx(exact[0].item(), rel=1e-3)
    all_random, settings_0 = make_policy(model, steps=5)
    bound = ddpo.measure_kl(all_random, x[:1], all_random.encode(prompts[:1]), settings_0, torch.Generator())
    assert bound == pytest.approx(kl[0].sum().item(), rel=1e-3) and bound > 1.01 * exact[0]

    estimates = torch.tensor([ddpo.measure_kl(policy, x, cond, settings, torch.Generator().manual_seed(i)) for i in range(n)])
    assert abs(estimates.mean() - exact.mean()) < 4 * exact.std() / (2 * n) ** 0.5
    of_two = (exact[:, None] + exact)[~torch.eye(17, dtype=bool)] / 2
    nearest = (estimates[:, None] - of_two).abs().argmin(1)
    torch.testing.assert_close(estimates, of_two[nearest], rtol=1e-3, atol=0)
    assert len(set(nearest.tolist())) > n / 3


def test_a_lora_to_start_from_is_not_the_pretrained_model(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "first")
    rows = run(tiny_model, tmp_path / "run", epochs=1, init_lora=tmp_path / "first/pytorch_lora_weights.safetensors")
    assert float(rows[1]["kl"]) > 0


def test_without_a_lora_there_is_no_kl(tiny_model, tmp_path, capsys):
    for option in ("--kl-coef", "--kl-stop"):
        message = failure(capsys, *flags(tiny_model, out=tmp_path / "run"), "--lora-rank", 0, option, 0.1)
        assert option in message and "--lora-rank 0" in message and not (tmp_path / "run").exists()
    rows = run(tiny_model, tmp_path / "run", epochs=1, lora_rank=0, samples_per_prompt=2)
    assert rows[1]["kl"] == "" and rows[1]["diversity"] == "1"


# ---------------------------------------------------------------- the penalty


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_the_penalty_has_the_gradient_of_the_kl(objective, tiny_model, pretrained):
    """Where no image is better than another, the whole update is that of the penalty, on the steps that are trained on."""
    policy, settings = make_policy(tiny_model, steps=5, min_std=0.3, objective=objective, kl_coef=0.3)
    x, logp_old, cond = sampled(policy, settings)
    kl = exact_kl(policy, pretrained, x)[:, policy.trained_steps]
    assert kl.shape == (6, 3)
    penalty = 0.3 * kl.mean() / (4 * 8 * 8)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(penalty, policy.weights)])
    before = torch.cat([p.detach().flatten() for p in policy.weights])
    learner = ddpo.Run(settings, policy)
    learner.optimizer = torch.optim.SGD(policy.weights, 1.0)
    metrics = ddpo.update(learner, (x, logp_old, cond, torch.zeros(6)), torch.Generator())
    moved = before - torch.cat([p.detach().flatten() for p in policy.weights])
    assert (moved - expected).norm() < 1e-3 * expected.norm()
    assert metrics["loss"] == pytest.approx(penalty.item(), rel=1e-3)


def updated(model, pretrained, lora_scale, kl_coef, adv, updates):
    """The metrics of updates on the same samples, and the nats from the pretrained model before the first and after each."""
    policy, settings = make_policy(model, lora_scale, lr=0.003, kl_coef=kl_coef, weight_decay=0.0, micro_batch=24)
    x, logp_old, cond = sampled(policy, settings)
    learner, metrics = ddpo.Run(settings, policy), []
    with torch.no_grad():
        nats = [exact_kl(policy, pretrained, x).sum(1).mean().item()]
        for _ in range(updates):
            with torch.enable_grad():
                metrics.append(ddpo.update(learner, (x, logp_old, cond, adv), torch.Generator().manual_seed(0)))
            nats.append(exact_kl(policy, pretrained, x).sum(1).mean().item())
    return metrics, nats


def test_the_penalty_pulls_back_to_the_pretrained_model(tiny_model, pretrained):
    _, nats = updated(tiny_model, pretrained, 0.1, kl_coef=1.0, adv=torch.zeros(6), updates=4)
    assert all(after < before for before, after in zip(nats, nats[1:])) and nats[-1] < 0.8 * nats[0]
    _, free = updated(tiny_model, pretrained, 0.1, kl_coef=0.0, adv=torch.zeros(6), updates=1)
    assert free == [nats[0], nats[0]], "without a penalty nothing should move"


def test_the_penalty_costs_nothing_at_the_pretrained_model_and_holds_on_the_way(tiny_model, pretrained):
    adv = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.0])
    free, free_nats = updated(tiny_model, pretrained, 0.0, kl_coef=0.0, adv=adv, updates=3)
    held, held_nats = updated(tiny_model, pretrained, 0.0, kl_coef=100.0, adv=adv, updates=3)
    assert free[0] == held[0] and free_nats[:2] == held_nats[:2] and free_nats[0] == 0 < free_nats[1]
    assert held_nats[3] < free_nats[3] and held[1]["loss"] > free[1]["loss"]


# ---------------------------------------------------------------- the limit


def test_the_limit_ends_a_run_that_stays_ended(tiny_model, tmp_path, monkeypatch, capsys):
    """Against the same run without a limit: all is the same up to the epoch that is too far, which learns nothing more."""
    settings = {"eval_every": 9, "save_every": 9}
    free = run(tiny_model, tmp_path / "free", epochs=3, **settings)
    run(tiny_model, tmp_path / "two", epochs=2, **settings)
    kl = [float(row["kl"]) for row in free[1:]]
    assert kl[2] > 1.2 * kl[1] > 0
    limit, out = (kl[1] + kl[2]) / 2, tmp_path / "stopped"
    capsys.readouterr()
    stopped = run(tiny_model, out, epochs=6, kl_stop=limit, **settings)
    said = f"stopped at {kl[2]:.1f} nats from the pretrained model, past --kl-stop {limit}"
    assert said in capsys.readouterr().out
    assert stopped[:3] == [{**row, "eval_reward": row["eval_reward"] if i == 0 else ""} for i, row in enumerate(free[:3])]
    assert len(stopped) == 4 and all(stopped[3][k] == free[3][k] for k in ("reward_mean", "kl", "diversity"))
    assert stopped[3]["loss"] == stopped[3]["grad_norm"] == "" and free[3]["loss"] != ""
    assert lora(out) == lora(tmp_path / "two") != lora(tmp_path / "free") and (out / "state_00003.pt").is_file()
    pictures = [(tmp_path / path).read_bytes() for path in ("stopped/samples/epoch_0003.png", "two/samples/epoch_0002.png")]
    assert pictures[0] == pictures[1]

    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("it went on"))
        ddpo.main(["--resume", str(out)])
    assert said in capsys.readouterr().out and len(read_metrics(out)) == 4
    ddpo.main(["--resume", str(out), "--kl-stop", "0"])
    assert [row["epoch"] for row in read_metrics(out)] == list("0123456")


def test_a_limit_that_is_not_reached_changes_nothing(tiny_model, tmp_path, capsys):
    free, far = run(tiny_model, tmp_path / "free"), run(tiny_model, tmp_path / "far", kl_stop=1e6)
    assert free == far and lora(tmp_path / "free") == lora(tmp_path / "far") and "stopped" not in capsys.readouterr().out


# ---------------------------------------------------------------- diversity


def test_spread_is_the_mean_distance_within_a_prompt():
    x_0 = torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 4.0], [9.0, 8.0], [77.0, 0.0]]).view(5, 2, 1, 1)
    assert ddpo.spread(x_0, ["cat", "dog", "cat", "dog", "bee"]) == pytest.approx((5 + 1) / 2)
    assert ddpo.spread(x_0[[0, 2, 0, 1, 3]], ["cat"] * 3 + ["dog"] * 2) == pytest.approx((5 + 0 + 5 + 1) / 4)
    assert ddpo.spread(x_0[[0, 0, 1, 1]], ["cat", "cat", "dog", "dog"]) == 0
    assert ddpo.spread(x_0, ["cat", "dog", "bee", "cow", "ant"]) is None


def test_diversity_is_relative_to_the_first_epoch(tiny_model, tmp_path, monkeypatch):
    spreads, spread = [], ddpo.spread
    monkeypatch.setattr(ddpo, "spread", lambda *args: spreads.append(spread(*args)) or spreads[-1])
    rows = run(tiny_model, tmp_path / "run", epochs=3, samples_per_prompt=2)
    values = [float(row["diversity"]) for row in rows[1:]]
    assert values == pytest.approx([s / spreads[0] for s in spreads], rel=1e-4) and values[0] == 1 != values[2] > 0


def test_diversity_is_blank_where_no_prompt_comes_twice(tiny_model, tmp_path):
    drawn = {"images_per_epoch": 2, "prompts": "imagenet", "epochs": 1}
    assert run(tiny_model, tmp_path / "run", **drawn)[1]["diversity"] == ""
    assert run(tiny_model, tmp_path / "pairs", samples_per_prompt=2, **drawn)[1]["diversity"] == "1"


def test_diversity_is_0_once_all_images_of_a_prompt_are_the_same(tiny_model, tmp_path, monkeypatch):
    """From the second epoch on the sampler gives the images of a prompt the same noise."""
    rollout, calls = ddpo.rollout, []

    def collapsed(policy, prompts, eta, generator):
        calls.append(prompts)
        if len(calls) <= 2:  # the look before, the first epoch
            return rollout(policy, prompts, eta, generator)
        x, logp = rollout(policy, prompts, eta, generator)
        first = [prompts.index(prompt) for prompt in prompts]
        return x[first], logp[first]

    monkeypatch.setattr(ddpo, "rollout", collapsed)
    rows = run(tiny_model, tmp_path / "run", samples_per_prompt=4, sample_batch=8)
    assert [row["diversity"] for row in rows[1:]] == ["1", "0"]


# ---------------------------------------------------------------- groups


def test_prompts_are_drawn_in_groups_with_their_own_baseline(tiny_model, tmp_path, monkeypatch):
    """Groups of 4 in batches of 3; the advantages of the first epoch are already those within a prompt."""
    seen, advantages, update = [], [], ddpo.update

    def reward(images, prompts):
        seen.append([(p, 100 * len(p) + r) for p, r in zip(prompts, images.mean((1, 2, 3)).tolist())])
        return [r for _, r in seen[-1]]

    def watch(run, samples, *args):
        advantages.append(samples[3])
        return update(run, samples, *args)

    monkeypatch.setitem(rewards.REWARDS, "watch", reward)
    monkeypatch.setattr(ddpo, "update", watch)
    argv = {"reward": "watch", "images_per_epoch": 12, "sample_batch": 3, "epochs": 1, "samples_per_prompt": 4}
    run(tiny_model, tmp_path / "run", **argv)
    drawn = [pair for batch in seen[1:5] for pair in batch]  # after the first look
    groups = [drawn[i : i + 4] for i in (0, 4, 8)]
    assert [len({prompt for prompt, _ in group}) for group in groups] == [1, 1, 1]
    assert len({group[0][0] for group in groups}) == 3, "another seed is needed: one prompt was drawn twice"
    reward = torch.tensor([[r for _, r in group] for group in groups], dtype=torch.float64)
    expected = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True, correction=0) + 1e-6)
    torch.testing.assert_close(advantages[0].view(3, 4), expected.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("group, count, needed", [(1, 16, 16), (4, 16, 4), (32, 16, 16), (4, 2, 2)])
def test_a_group_is_enough_for_a_baseline(group, count, needed, tiny_model):
    policy, settings = make_policy(tiny_model, images_per_epoch=32, samples_per_prompt=group, stats_min_count=count)
    assert ddpo.Run(settings, policy).stats.min_count == needed


def test_groups_that_do_not_fill_an_epoch_are_refused(tiny_model, tmp_path, capsys):
    message = failure(capsys, *flags(tiny_model, out=tmp_path / "run", samples_per_prompt=3))
    assert "--images-per-epoch must be a multiple of --samples-per-prompt" in message and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- monitors


@pytest.fixture
def known(monkeypatch):
    """Rewards to monitor: of the image, of the prompt, and one that needs models."""

    def pair(clip="a", head="b", *, device, batch_size):
        return lambda images, prompts: torch.full((len(images),), float(len(clip + head)))

    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, prompts: 1e3 * images.mean((1, 2, 3)))
    monkeypatch.setitem(rewards.REWARDS, "length", lambda images, prompts: [len(p) for p in prompts])
    monkeypatch.setitem(rewards.MODEL_REWARDS, "pair", pair)


def test_monitors_are_logged_and_never_optimised(tiny_model, tmp_path, known):
    own = write(tmp_path / "own.py", "def dark(images, prompts):\n    return -1000 * images.mean((1, 2, 3))\n")
    monitors = ["brightness", "pair(one, three)", "length", f"{own}:dark"]
    plain = run(tiny_model, tmp_path / "plain")
    watched = run(tiny_model, tmp_path / "watched", monitor=",".join(monitors))
    optimised = run(tiny_model, tmp_path / "optimised", reward="brightness")
    assert lora(tmp_path / "watched") == lora(tmp_path / "plain") != lora(tmp_path / "optimised")
    labels = ["brightness", "pair(one, three)", "length", "dark"]
    assert [{k: v for k, v in row.items() if k not in (*labels, "compressibility")} for row in watched] == plain
    for row, before in zip(watched[1:], plain[1:]):
        assert row["compressibility"] == before["reward_mean"] and row["pair(one, three)"] == "8"
        assert float(row["dark"]) == pytest.approx(-float(row["brightness"]), rel=1e-4) and 3 <= float(row["length"]) <= 9
    assert watched[1]["brightness"] == optimised[1]["reward_mean"], "the images before the first update are the same"


@pytest.mark.parametrize("monitor, message", [
    ("beauty", "beauty: unknown"),
    ("incompressibility,beauty", "beauty: unknown"),
    ("compressibility", "compressibility: two terms have this name"),
    ("incompressibility,incompressibility", "incompressibility: two terms have this name"),
])  # fmt: skip
def test_a_mistake_in_a_monitor_costs_nothing(monitor, message, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("sampled before the mistake was found"))
    assert message in failure(capsys, *flags(tiny_model, out=tmp_path / "run", monitor=monitor))
    assert not (tmp_path / "run").exists()


def test_a_monitor_that_breaks_its_contract_stops_the_run(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda images, prompts: torch.full((len(images),), float("nan")))
    message = failure(capsys, *flags(tiny_model, out=tmp_path / "run", monitor="broken"))
    assert "reward broken returned nan" in message


# ---------------------------------------------------------------- held-out prompts


def test_looks_are_at_the_held_out_prompts_from_fixed_noise(tiny_model, tmp_path, monkeypatch):
    """The reward is the prompt's length, so what it is a mean of can be told; what hardly learns gives the same pictures."""
    looks, trained = [], set()

    def length(images, prompts):
        if prompts[0].startswith("a "):
            looks.append((prompts, images))
        else:
            trained.update(prompts)
        return [len(p) for p in prompts]

    monkeypatch.setitem(rewards.REWARDS, "length", length)
    files = {"prompts": write(tmp_path / "prompts.txt", "cat\ndog\nbee\n"),
             "eval_prompts": write(tmp_path / "eval.txt", "a horse\na bird\n")}  # fmt: skip
    fixed = {"reward": "length", "lr": 1e-12, "eval_every": 2, "eval_images": 3, "epochs": 3, **files}
    rows = run(tiny_model, tmp_path / "run", **fixed)
    assert [row["eval_reward"] for row in rows] == [f"{(7 + 6 + 7) / 3:.6g}", "", f"{(7 + 6 + 7) / 3:.6g}", f"{20 / 3:.6g}"]
    assert [row["reward_mean"] for row in rows[1:]] == ["3", "3", "3"] and trained == {"cat", "dog", "bee"}
    assert [prompts for prompts, _ in looks] == [["a horse", "a bird", "a horse"]] * 3
    for _, images in looks[1:]:
        torch.testing.assert_close(images, looks[0][1], rtol=0, atol=1e-6)
    assert (looks[0][1][0] - looks[0][1][2]).abs().max() > 0.01, "the same prompt twice, each from its own noise"
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [f"epoch_{n:04d}.png" for n in (0, 2, 3)]

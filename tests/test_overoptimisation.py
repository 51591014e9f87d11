"""Proves that over-optimisation is measured and can be held: the KL to the pretrained model is
torch.distributions', 0 before the first update and estimated without bias; its penalty pulls back
and its limit ends a run; diversity, monitors and held-out prompts show what they say, and none of
them changes what is learned."""

import pytest
import torch
from conftest import (
    BRIGHTNESS,
    TINIEST,
    failure,
    flags,
    make_policy,
    read_metrics,
    save_tiny_pipeline,
    tiny_unet,
)
from torch.distributions import Independent, Normal, kl_divergence

import ddpo
import rewards

PROMPTS = ["cat", "dog", "bee", "cat", "horse", "ant"]


@pytest.fixture(scope="module")
def pretrained(tiniest_model):
    """A second copy of the model, whose LoRA is 0: the reference, without the switch."""
    return make_policy(tiniest_model, lora_scale=0.0)[0]


def sampled(policy, prompts=PROMPTS):
    """Trajectories x, their log-probabilities, and cond."""
    generator = torch.Generator().manual_seed(0)
    x, logp, _ = ddpo.sample(policy, BRIGHTNESS, prompts, 8, generator)
    return x, logp, policy.encode(prompts)


def exact_kl(policy, pretrained, x, prompts=PROMPTS):
    """The KL of all steps that are random, (N, steps), by torch.distributions."""
    kl = []
    for j, t in enumerate(policy.scheduler.timesteps):
        t = t.expand(len(x))
        gaussians = []
        for network in (policy, pretrained):
            eps = network.predict(x[:, j], t, network.encode(prompts))
            mean, std = ddpo.ddim_mean_std(policy.scheduler, eps, t, x[:, j], policy.eta)
            gaussians.append((mean, std.expand_as(mean)))
        if std.min() > 0:
            ours, theirs = (Independent(Normal(*gaussian), 3) for gaussian in gaussians)
            kl.append(kl_divergence(ours, theirs))
    return torch.stack(kl, 1)


def write(path, text):
    path.write_text(text)
    return path


def launch(model, out, reward=None, update=ddpo.update, **settings):
    """Train a small run; the rows of its metrics.csv, without the seconds."""
    small = {"steps": 2, "sample_batch": 8, "micro_batch": 16, "eval_images": 1, **settings}
    parsed, _ = ddpo.parse(flags(model, out=out, **small))
    ddpo.launch(parsed, reward=reward, update=update)
    rows = read_metrics(out)
    for row in rows:
        del row["seconds"]
    return rows


def lora(out):
    return (out / "pytorch_lora_weights.safetensors").read_bytes()


# ---------------------------------------------------- KL


@torch.no_grad()
@pytest.mark.parametrize(
    "eta, config",
    [(1.0, {}), (0.6, {"prediction_type": "v_prediction"}), (1.0, {"clip_sample": True})],
)
def test_kl_of_a_step_is_that_of_torch_distributions(tiniest_model, pretrained, eta, config):
    policy, _ = make_policy(tiniest_model, lora_scale=2.0, eta=eta)
    policy.scheduler.register_to_config(**config)
    x, _, cond = sampled(policy)
    i, j = torch.cartesian_prod(torch.arange(6), torch.arange(4)).unbind(1)
    t = policy.scheduler.timesteps[j]
    eps = policy.predict(x[i, j], t, cond[i])
    ours = ddpo.kl_to_pretrained(policy, eps, x[i, j], t, cond[i]).view(6, 4)
    torch.testing.assert_close(ours, exact_kl(policy, pretrained, x), rtol=1e-3, atol=1e-5)
    assert ours.min() > 0.01


def test_the_lora_is_on_again_afterwards(tiniest_model):
    policy, _ = make_policy(tiniest_model, steps=2)
    x, _, cond = sampled(policy)
    x_t = x[:, 0]
    t = policy.scheduler.timesteps[:1].expand(6)
    before = policy.predict(x_t, t, cond)
    ddpo.measure_kl(policy, x, cond, torch.Generator())
    assert torch.equal(policy.predict(x_t, t, cond), before)
    ddpo.kl_to_pretrained(policy, before, x_t, t, cond).sum().backward()
    assert torch.equal(policy.predict(x_t, t, cond), before)
    assert all(p.grad.abs().max() > 0 for p in policy.weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_is_exactly_0_before_the_first_update(precision, tiniest_model, tmp_path):
    rows = launch(tiniest_model, tmp_path / "run", precision=precision, images_per_epoch=4)
    assert rows[1]["kl"] == "0"
    assert 0 < float(rows[2]["kl"]) < float("inf")


def test_the_estimate_is_unbiased_and_counts_the_trained_steps(pretrained, tmp_path):
    """It takes 2 of 17 images, any two, and their steps that are learned from: 3 of 5, of which the
    last is deterministic."""
    prompts = [*PROMPTS, *PROMPTS, *PROMPTS[:5]]
    model = tmp_path / "model"
    save_tiny_pipeline(model, tiny_unet(**TINIEST), set_alpha_to_one=True)
    policy, _ = make_policy(model, lora_scale=0.5, steps=5, min_std=0.2, micro_batch=12)
    x, _, cond = sampled(policy, prompts)
    with torch.no_grad():
        kl = exact_kl(policy, pretrained, x, prompts)
    assert policy.trained_steps.tolist() == [0, 1, 2]
    assert kl.shape == (17, 4) and kl.min() > 1e-3
    exact = kl[:, :3].sum(1)
    one = ddpo.measure_kl(policy, x[:1], cond[:1], torch.Generator())
    assert one == pytest.approx(exact[0].item(), rel=1e-3)
    policy.trained_steps = torch.arange(4)  # as without --min-std: a bound, from all random steps
    bound = ddpo.measure_kl(policy, x[:1], cond[:1], torch.Generator())
    assert bound == pytest.approx(kl[0].sum().item(), rel=1e-3)
    assert bound > 1.01 * exact[0]
    policy.trained_steps = torch.arange(3)

    estimates = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        estimates.append(ddpo.measure_kl(policy, x, cond, generator))
    estimates = torch.tensor(estimates)
    error = exact.std() / (2 * len(estimates)) ** 0.5
    assert abs(estimates.mean() - exact.mean()) < 4 * error
    of_two = (exact[:, None] + exact)[~torch.eye(17, dtype=bool)] / 2
    nearest = (estimates[:, None] - of_two).abs().argmin(1)
    torch.testing.assert_close(estimates, of_two[nearest], rtol=1e-3, atol=0)
    assert len(set(nearest.tolist())) > len(estimates) / 3


def test_a_lora_to_start_from_is_not_the_pretrained_model(tiniest_model, tmp_path):
    policy, _ = make_policy(tiniest_model)
    ddpo.save_lora(policy.unet, tmp_path / "lora.safetensors")
    given = {"epochs": 1, "init_lora": tmp_path / "lora.safetensors"}
    rows = launch(tiniest_model, tmp_path / "run", **given)
    assert float(rows[1]["kl"]) > 0


def test_without_a_lora_there_is_no_kl(tiniest_model, tmp_path, capsys):
    for option in ("kl_coef", "kl_stop"):
        argv = flags(tiniest_model, out=tmp_path / "run", lora_rank=0, **{option: 0.1})
        message = failure(capsys, *argv)
        assert option in message and "--lora-rank 0" in message
        assert not (tmp_path / "run").exists()
    rows = launch(tiniest_model, tmp_path / "run", epochs=1, lora_rank=0, samples_per_prompt=2)
    assert rows[1]["kl"] == "" and float(rows[1]["diversity"]) > 0


# ---------------------------------------------------- the penalty


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_the_penalty_has_the_gradient_of_the_kl(objective, tiniest_model, pretrained):
    """Where no image is better than another, the whole update is that of the penalty, on the steps
    that are trained on."""
    given = {"steps": 5, "min_std": 0.3, "objective": objective, "kl_coef": 0.3}
    policy, settings = make_policy(tiniest_model, **given)
    x, logp_old, cond = sampled(policy)
    kl = exact_kl(policy, pretrained, x)[:, policy.trained_steps]
    assert kl.shape == (6, 3)
    penalty = 0.3 * kl.mean() / (4 * 8 * 8)
    gradient = torch.autograd.grad(penalty, policy.weights)
    expected = torch.cat([g.flatten() for g in gradient])
    before = torch.cat([p.detach().flatten() for p in policy.weights])
    learner = ddpo.Run(settings, policy)
    learner.optimizer = torch.optim.SGD(policy.weights, 1000.0)  # so that nothing is rounded away
    metrics = ddpo.update(learner, (x, logp_old, cond, torch.zeros(6)), torch.Generator())
    moved = before - torch.cat([p.detach().flatten() for p in policy.weights])
    assert (moved / 1000 - expected).norm() < 1e-3 * expected.norm()
    assert metrics["loss"] == pytest.approx(penalty.item(), rel=1e-3)


def updated(model, pretrained, lora_scale, kl_coef, adv, updates):
    """The metrics of updates on the same samples, and the nats from the pretrained model before the
    first and after each."""
    given = {"steps": 3, "lr": 0.003, "kl_coef": kl_coef, "weight_decay": 0.0, "micro_batch": 18}
    policy, settings = make_policy(model, lora_scale, **given)
    x, logp_old, cond = sampled(policy)
    learner = ddpo.Run(settings, policy)
    metrics = []
    nats = []
    for n in range(updates + 1):
        if n:
            samples = (x, logp_old, cond, adv)
            metrics.append(ddpo.update(learner, samples, torch.Generator().manual_seed(0)))
        with torch.no_grad():
            nats.append(exact_kl(policy, pretrained, x).sum(1).mean().item())
    return metrics, nats


def test_the_penalty_pulls_back_to_the_pretrained_model(tiniest_model, pretrained):
    _, nats = updated(tiniest_model, pretrained, 0.1, kl_coef=1.0, adv=torch.zeros(6), updates=4)
    assert all(after < before for before, after in zip(nats, nats[1:]))
    assert nats[-1] < 0.8 * nats[0]
    _, free = updated(tiniest_model, pretrained, 0.1, kl_coef=0.0, adv=torch.zeros(6), updates=1)
    assert free == [nats[0], nats[0]], "without a penalty nothing should move"


def test_the_penalty_costs_nothing_at_the_pretrained_model_and_holds_on_the_way(
    tiniest_model, pretrained
):
    adv = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.0])
    free, free_nats = updated(tiniest_model, pretrained, 0.0, kl_coef=0.0, adv=adv, updates=3)
    held, held_nats = updated(tiniest_model, pretrained, 0.0, kl_coef=100.0, adv=adv, updates=3)
    assert free[0] == held[0] and free_nats[:2] == held_nats[:2]
    assert free_nats[0] == 0 < free_nats[1]
    assert held_nats[3] < free_nats[3] and held[1]["loss"] > free[1]["loss"]


# ---------------------------------------------------- the limit


def test_the_limit_ends_a_run_that_stays_ended(tiniest_model, tmp_path, monkeypatch):
    """Against the same run without a limit: all is the same up to the epoch that is too far, which
    learns nothing more."""
    settings = {"eval_every": 9, "save_every": 9}
    free = launch(tiniest_model, tmp_path / "free", epochs=3, **settings)
    launch(tiniest_model, tmp_path / "two", epochs=2, **settings)
    kl = [float(row["kl"]) for row in free[1:]]
    assert kl[2] > 1.2 * kl[1] > 0
    out = tmp_path / "stopped"
    stopped = launch(tiniest_model, out, epochs=4, kl_stop=(kl[1] + kl[2]) / 2, **settings)
    assert len(stopped) == 4
    assert stopped[:3] == free[:3]
    for column in ("queries", "reward_mean", "reward_std", "kl", "diversity"):
        assert stopped[3][column] == free[3][column]
    assert stopped[3]["loss"] == stopped[3]["grad_norm"] == "" and free[3]["loss"] != ""
    assert lora(out) == lora(tmp_path / "two") != lora(tmp_path / "free")
    last = (out / "samples/epoch_0003.png").read_bytes()
    assert last == (tmp_path / "two/samples/epoch_0002.png").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "rollout", lambda *args: pytest.fail("it went on"))
        ddpo.main(["--resume", str(out)])
    assert len(read_metrics(out)) == 4
    ddpo.main(["--resume", str(out), "--kl-stop", "0"])
    assert [row["epoch"] for row in read_metrics(out)] == list("01234")
    assert lora(out) != lora(tmp_path / "two")


def test_a_limit_that_is_not_reached_changes_nothing(tiniest_model, tmp_path):
    free = launch(tiniest_model, tmp_path / "free")
    far = launch(tiniest_model, tmp_path / "far", kl_stop=1e6)
    assert free == far and lora(tmp_path / "free") == lora(tmp_path / "far")


# ---------------------------------------------------- diversity


def test_diversity_is_the_mean_distance_within_a_prompt():
    x_0 = torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 4.0], [9.0, 8.0], [77.0, 0.0]])
    x_0 = x_0.view(5, 2, 1, 1)
    cat, dog, bee = torch.tensor([1, 2, 3])
    assert ddpo.diversity(x_0, torch.stack([cat, dog, cat, dog, bee])) == pytest.approx((5 + 1) / 2)
    three_and_two = torch.stack([cat, cat, cat, dog, dog])
    mean = (5 + 0 + 5 + 1) / 4
    assert ddpo.diversity(x_0[[0, 2, 0, 1, 3]], three_and_two) == pytest.approx(mean)
    assert ddpo.diversity(x_0[[0, 0, 1, 1]], torch.stack([cat, cat, dog, dog])) == 0
    assert ddpo.diversity(x_0, torch.arange(5)) is None


def test_diversity_is_that_of_the_samples(tiniest_model, tmp_path):
    expected = []

    def update(run, samples, generator):
        x, _, cond, _ = samples
        expected.append(ddpo.diversity(x[:, -1], cond))
        return ddpo.update(run, samples, generator)

    rows = launch(tiniest_model, tmp_path / "run", update=update, samples_per_prompt=2)
    values = [float(row["diversity"]) for row in rows[1:]]
    assert values == pytest.approx(expected, rel=1e-4) and min(values) > 0


def test_diversity_is_blank_where_no_prompt_comes_twice(tiniest_model, tmp_path):
    rows = launch(tiniest_model, tmp_path / "run", images_per_epoch=2, prompts="imagenet", epochs=1)
    assert rows[1]["diversity"] == ""


def test_diversity_is_0_once_all_images_of_a_prompt_are_the_same(
    tiniest_model, tmp_path, monkeypatch
):
    """From the second epoch on the sampler gives the images of a prompt the same noise."""
    rollout = ddpo.rollout
    calls = []

    def collapsed(policy, prompts, x_T, generator):
        calls.append(prompts)
        x, logp = rollout(policy, prompts, x_T, generator)
        if len(calls) <= 2:  # the first evaluation, the first epoch
            return x, logp
        first = [prompts.index(prompt) for prompt in prompts]
        return x[first], logp[first]

    monkeypatch.setattr(ddpo, "rollout", collapsed)
    rows = launch(tiniest_model, tmp_path / "run", samples_per_prompt=4)
    first, second = [float(row["diversity"]) for row in rows[1:]]
    assert first > 0 == second


# ---------------------------------------------------- groups


def test_a_group_shares_its_prompt_and_first_noise_and_is_its_own_baseline(tiny_model, tmp_path):
    """Groups of 4 in batches of 3."""
    batches = []
    learned = []

    def watch(images, prompts):
        scores = [len(p) + b for p, b in zip(prompts, images.mean((1, 2, 3)).tolist())]
        batches.append(list(zip(prompts, scores)))
        return scores

    def update(run, samples, generator):
        learned.append(samples)
        return ddpo.update(run, samples, generator)

    given = {"images_per_epoch": 12, "sample_batch": 3, "epochs": 1, "samples_per_prompt": 4}
    launch(tiny_model, tmp_path / "run", reward=watch, update=update, **given)
    drawn = [pair for batch in batches[1:5] for pair in batch]  # after the first evaluation
    groups = [drawn[:4], drawn[4:8], drawn[8:]]
    assert [len({prompt for prompt, _ in group}) for group in groups] == [1, 1, 1]
    reward = torch.tensor([[r for _, r in group] for group in groups], dtype=torch.float64)
    centred = (reward - reward.mean(1, keepdim=True)).flatten()
    x, _, _, adv = learned[0]
    expected = centred / centred.square().mean().sqrt()
    torch.testing.assert_close(adv, expected.float(), rtol=1e-2, atol=1e-3)
    for group in x.split(4):
        assert (group[:, 0] == group[:1, 0]).all()
        assert not (group[:, 1] == group[:1, 1]).all()
    assert not torch.equal(x[0, 0], x[4, 0])


def test_groups_that_do_not_fill_an_epoch_are_refused(tiniest_model, tmp_path, capsys):
    message = failure(capsys, *flags(tiniest_model, out=tmp_path / "run", samples_per_prompt=3))
    assert "images_per_epoch must be a multiple of 3" in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------- monitors


def test_monitors_are_logged_and_never_optimised(tiniest_model, tmp_path, monkeypatch):
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
    code = "def dark(images, prompts):\n    return -1000 * images.mean((1, 2, 3))\n"
    code += "def length(images, prompts):\n    return [len(p) for p in prompts]\n"
    own = write(tmp_path / "own.py", code)
    monitor = f"incompressibility, pair(one, three),{own}:dark, {own}:length"
    labels = ["incompressibility", "pair(one, three)", "dark", "length"]
    plain = launch(tiniest_model, tmp_path / "plain")
    watched = launch(tiniest_model, tmp_path / "watched", monitor=monitor)
    assert asked == [1, 8, 8]  # tried on loading; then epochs, but no evaluations
    other = launch(tiniest_model, tmp_path / "other", reward=bright, epochs=1)
    assert lora(tmp_path / "watched") == lora(tmp_path / "plain")
    for row, before in zip(watched, plain, strict=True):
        values = {label: row.pop(label) for label in ["compressibility", *labels]}
        assert row == before
        if row["epoch"] == "0":  # it is an evaluation alone
            assert set(values.values()) == {""}
            continue
        assert values["compressibility"] == row["reward_mean"]
        assert float(values["incompressibility"]) == -float(row["reward_mean"])
        assert values["pair(one, three)"] == "8" and 3 <= float(values["length"]) <= 9
        if row["epoch"] == "1":  # before the first update the images are the same
            dark = -float(other[1]["reward_mean"])
            assert float(values["dark"]) == pytest.approx(dark, rel=1e-4)


@pytest.mark.parametrize(
    "monitor, message",
    [
        ("beauty", "beauty: unknown"),
        ("incompressibility,beauty", "beauty: unknown"),
        ("compressibility", "compressibility: two terms have this name"),
        ("incompressibility,incompressibility", "incompressibility: two terms have this name"),
    ],
)
def test_a_mistake_in_a_monitor_costs_nothing(
    monitor, message, tiniest_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ddpo, "rollout", lambda *args: pytest.fail("sampled before it was found"))
    assert message in failure(capsys, *flags(tiniest_model, out=tmp_path / "run", monitor=monitor))
    assert not (tmp_path / "run").exists()


def test_a_monitor_that_breaks_its_contract_stops_the_run(tiniest_model, tmp_path, capsys):
    code = "def broken(images, prompts):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    own = write(tmp_path / "own.py", code)
    argv = flags(tiniest_model, out=tmp_path / "run", monitor=f"{own}:broken")
    assert "reward broken is not finite" in failure(capsys, *argv)


# ---------------------------------------------------- held-out prompts


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

    files = {
        "prompts": write(tmp_path / "prompts.txt", "cat\ndog\nbee\n"),
        "eval_prompts": write(tmp_path / "eval.txt", "a horse\na bird\n"),
    }
    given = {"lr": 1e-12, "eval_every": 2, "eval_images": 3, "epochs": 3}
    rows = launch(tiniest_model, tmp_path / "run", reward=length, **given, **files)
    mean = f"{(7 + 6 + 7) / 3:.6g}"
    assert [row["eval_reward"] for row in rows] == [mean, "", mean, mean]
    assert [row["reward_mean"] for row in rows[1:]] == ["3", "3", "3"]
    assert trained == {"cat", "dog", "bee"}
    assert [prompts for prompts, _ in evaluations] == [["a horse", "a bird", "a horse"]] * 3
    first = evaluations[0][1]
    for _, images in evaluations[1:]:
        torch.testing.assert_close(images, first, rtol=0, atol=1e-6)
    assert (first[0] - first[2]).abs().max() > 0.01, "the same prompt twice, each its own noise"
    pictures = sorted(p.name for p in (tmp_path / "run/samples").iterdir())
    assert pictures == ["epoch_0000.png", "epoch_0002.png", "epoch_0003.png"]

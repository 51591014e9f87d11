"""Proves that several processes are one run with more hands: the same weights in each, the gradient
of one process that has all images, metrics of all, a gradient that is not finite left out by all,
and a run that ends when one is killed and goes on with another number. CPUs stand for GPUs."""

import math
import os
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import as_flags, flat, make_policy, read_metrics, small_run, update_by_sgd
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import ddpo

sys.path.insert(0, str(ddpo.EXAMPLES))
import multi_gpu

SMALL = {"batch_size": 3, "updates_per_epoch": 1, "eval_images": 2, "eval_every": 2,
         "stats_buffer": 2}  # fmt: skip


def command(*argv):
    """multi_gpu.py as a script, by plain gradient descent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["multi_gpu.py", *map(str, argv)])
        patch.setattr(torch.optim, "AdamW", lambda weights, **how: torch.optim.SGD(weights, lr=0.1))
        patch.setattr(ddpo, "GRAD_CLIP", 1e9)
        runpy.run_path(multi_gpu.__file__, run_name="__main__")


def one_of_two(out, settings):
    """What each of two processes does: multi_gpu.py with a command line that is wrong; then it goes
    on with a run of one epoch, and notes what it has and does. In the third epoch the gradient of
    process 1 is not finite, and in the fourth it is killed."""
    rank = int(os.environ["RANK"])
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    sys.stderr = sys.__stderr__ = open(out / f"said-{rank}", "w", buffering=1)
    plain = ddpo.update

    def update(run, samples, generator):
        epoch = len(run.log)
        weights = run.policy.weights
        if rank == 1 and epoch == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        before = flat(weights)
        spoilt = math.nan if rank == 1 and epoch == 3 else 1
        hook = weights[0].register_hook(lambda gradient: spoilt * gradient)
        row = plain(run, samples, generator)
        hook.remove()
        found = {**vars(samples), "before": before, "after": flat(weights)}
        torch.save(found, out / f"{epoch}-{rank}.pt")
        return row

    ddpo.update = update
    try:
        command(*as_flags({**settings, "out": out / "wrong", "images_per_epoch": 9}))
    except SystemExit as end:
        (out / f"status-{rank}").write_text(str(end.code))
    torch.distributed.init_process_group = lambda: None  # they have met
    command("--resume", out / "run", "--epochs", "30")


@pytest.fixture(scope="module")
def watched(tiniest_model, tmp_path_factory):
    """The folder in which two processes noted all that: what torchrun calls, but with forks, which
    need not import torch anew."""
    out = tmp_path_factory.mktemp("watched")
    (out / "prompts.txt").write_text("cat\nbee\nant\n")
    settings = small_run(tiniest_model, **SMALL, prompts=out / "prompts.txt", epochs=1)
    command(*as_flags({**settings, "out": out / "run"}))  # without torchrun: one process
    shutil.copy(out / "run/state.pt", out / "1.pt")
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(run_id="test", monitor_interval=0.05, **nodes, **how)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(ChildFailedError):
        elastic_launch(config, one_of_two)(out, settings)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out


@pytest.fixture(scope="module")
def epochs(watched):
    """What each process had and did: {epoch: [..., ...]}."""
    return {e: [torch.load(watched / f"{e}-{rank}.pt") for rank in (0, 1)] for e in (2, 3)}


def test_all_processes_have_the_same_weights_and_other_images(epochs):
    for one, other in epochs.values():
        assert torch.equal(one["before"], other["before"])
        assert torch.equal(one["after"], other["after"])
        assert (one["x"] - other["x"]).abs().min(0).values.max() > 0.1
    assert not torch.equal(epochs[2][0]["before"], epochs[2][0]["after"])


def test_the_gradient_is_that_of_one_process_with_all_images(epochs, tiniest_model):
    one, other = epochs[2]
    policy, settings = make_policy(tiniest_model, **{**SMALL, "steps": 2, "images_per_epoch": 8})
    torch.nn.utils.vector_to_parameters(one["before"].clone(), policy.weights)
    both = {k: torch.cat([one[k], other[k]]) for k in ("x", "logp", "scores", "adv")}
    prompts = one["prompts"] + other["prompts"]
    samples = ddpo.Samples(prompts, policy.encode(prompts), **both)
    _, alone = update_by_sgd(policy, settings, samples, lr=0.1)
    shared = one["before"] - one["after"]
    assert (alone - shared).norm() < 1e-6 * alone.norm() + 1e-7 * samples.adv.norm()
    assert alone.norm() > 1e-4


def test_advantages_are_of_all_rewards(watched, epochs):
    """Each process has its part of what one would make of the prompts and rewards of both."""
    memory = torch.load(watched / "1.pt")["stats"]
    for one, other in epochs.values():
        rewards = torch.cat([one["scores"], other["scores"]])[:, 0]
        adv = ddpo.prompt_advantages(memory, one["prompts"] + other["prompts"], rewards, 2)
        torch.testing.assert_close(torch.cat([one["adv"], other["adv"]]), adv.clamp(-5, 5))


def test_metrics_are_of_all_images_and_what_is_not_finite_in_one_is_left_out_by_all(
    watched, epochs
):
    run = watched / "run"
    rows = read_metrics(run)
    assert [row["queries"] for row in rows] == ["0", "8", "16", "24"]
    for epoch, parts in epochs.items():
        rewards = torch.cat([part["scores"] for part in parts])[:, 0]
        assert len(rewards) == 8
        assert float(rows[epoch]["reward_mean"]) == pytest.approx(rewards.mean().item(), rel=1e-4)
        assert float(rows[epoch]["reward_std"]) == pytest.approx(rewards.std().item(), rel=1e-4)
        assert float(rows[epoch]["ratio_error"]) < 1e-5
    assert [row["eval_reward"] != "" for row in rows] == [True, True, True, False]
    assert (run / "samples/epoch_0002.png").is_file()
    assert [row["skipped"] for row in rows] == ["", "0", "0", "1"]
    assert all(torch.equal(part["before"], part["after"]) for part in epochs[3])


def test_a_killed_run_ends_in_all_and_goes_on_with_another_number(watched, epochs, tmp_path):
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((watched / f"pid-{rank}").read_text()), 0)
    run = shutil.copytree(watched / "run", tmp_path / "run")
    command("--resume", run, "--epochs", 4)
    rows = read_metrics(run)
    assert rows[:4] == read_metrics(watched / "run")
    assert [int(row["queries"]) for row in rows] == [0, 8, 16, 24, 32]


def test_uneven_shares_are_one_line_once(watched):
    assert [(watched / f"status-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    (line,) = [line for line in (watched / "said-0").read_text().splitlines() if "error" in line]
    assert line == "multi_gpu.py: error: images_per_epoch must be a multiple of 2"
    assert "error" not in (watched / "said-1").read_text()
    assert not (watched / "wrong").exists()

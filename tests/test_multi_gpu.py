"""Proves that several processes are one run with more hands: the same weights in each, the gradient
of one process that has all images, metrics of all, a gradient that is not finite left out by all,
and a run that ends when one is killed and goes on with another number. CPUs stand for GPUs."""

import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import as_flags, make_policy, read_metrics
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import ddpo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import multi_gpu

SMALL = {"steps": 2, "images_per_epoch": 8, "sample_batch": 2, "micro_batch": 3,
         "updates_per_epoch": 1, "eval_images": 2, "eval_every": 2, "grad_clip": 1e9,
         "device": "cpu", "precision": "fp32", "stats_min_count": 2}  # fmt: skip

def command(*argv):
    """multi_gpu.py as a script."""
    sys.argv = ["multi_gpu.py", *argv]
    runpy.run_path(multi_gpu.__file__, run_name="__main__")


def one_of_two(out, model):
    """What each of two processes does: multi_gpu.py with a command line that is wrong; then it goes
    on with a run of one epoch, and notes what it has and does. In the fourth epoch the gradient of
    process 1 is not finite, and in the sixth it is killed."""
    rank = int(os.environ["RANK"])
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    plain = ddpo.update

    class Watched(ddpo.Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.optimizer = torch.optim.SGD(self.policy.weights, lr=0.1)

        def describe(self, terms, prompts, x, cond, scores, generator):
            self.seen = {"prompts": prompts, "reward": scores[:, 0]}
            return super().describe(terms, prompts, x, cond, scores, generator)

    def update(run, samples, generator):
        epoch = len(run.log)
        weights = run.policy.weights
        if rank == 1 and epoch == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        before = [w.detach().clone() for w in weights]
        spoilt = math.nan if rank == 1 and epoch == 4 else 1
        hook = weights[0].register_hook(lambda gradient: spoilt * gradient)
        row = plain(run, samples, generator)
        hook.remove()
        after = [w.detach().clone() for w in weights]
        found = {**run.seen, "samples": samples, "before": before, "after": after}
        torch.save(found, out / f"{epoch}-{rank}.pt")
        return row

    ddpo.Run, ddpo.update = Watched, update
    wrong = {**SMALL, "model": model, "out": str(out / "wrong"), "images_per_epoch": 9}
    try:
        command(*as_flags(wrong))
    except SystemExit as end:
        (out / f"status-{rank}").write_text(str(end.code))
    dist.init_process_group = lambda: None  # they have met
    command("--resume", str(out / "run"), "--epochs", "30")


if __name__ == "__main__":  # what torchrun calls, but with forks, which need not import torch anew
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(run_id="test", monitor_interval=0.1, **nodes, **how)
    elastic_launch(config, one_of_two)(Path(sys.argv[1]), sys.argv[2])


def alone(*argv):
    """multi_gpu.py with one process, which is this one."""
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**env, "MASTER_PORT": 0}.items():
            patch.setenv(name, str(value))
        try:
            ddpo.main([str(part) for part in argv], multi_gpu.launch)
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def watched(tiniest_model, tmp_path_factory):
    """The folder in which two processes noted all that, and how that ended."""
    out = tmp_path_factory.mktemp("watched")
    alone(*as_flags({**SMALL, "model": tiniest_model, "out": out / "run", "epochs": 1}))
    shutil.copy(out / "run/state.pt", out / "1.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    how = {"env": env, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, __file__, out, tiniest_model], check=False, **how)
    assert (out / "5-0.pt").is_file(), done.stderr[-3000:]
    return out, done


@pytest.fixture(scope="module")
def epochs(watched):
    """What each process had and did: {epoch: [..., ...]}."""
    out, _ = watched
    return {e: [torch.load(out / f"{e}-{rank}.pt") for rank in (0, 1)] for e in (2, 3, 4, 5)}


def test_all_processes_have_the_same_weights_and_other_images(epochs):
    for parts in epochs.values():
        for key in ("before", "after"):
            assert all(map(torch.equal, parts[0][key], parts[1][key]))
        assert (parts[0]["samples"][0] - parts[1]["samples"][0]).abs().min(0).values.max() > 0.1
    assert not all(map(torch.equal, epochs[3][0]["before"], epochs[3][0]["after"]))


def test_the_gradient_is_that_of_one_process_with_all_images(epochs, tiniest_model):
    parts = epochs[3]
    policy, settings = make_policy(tiniest_model, **SMALL)
    run = ddpo.Run(settings, policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr=0.1)
    for weight, value in zip(policy.weights, parts[0]["before"]):
        weight.data.copy_(value)
    x, logp, _, adv = (torch.cat(both) for both in zip(*(part["samples"] for part in parts)))
    cond = policy.encode(parts[0]["prompts"] + parts[1]["prompts"])
    ddpo.update(run, (x, logp, cond, adv), torch.Generator().manual_seed(0))
    alone = torch.cat([(w - v).flatten() for w, v in zip(policy.weights, parts[0]["before"])])
    shared = [after - before for after, before in zip(parts[0]["after"], parts[0]["before"])]
    shared = torch.cat([moved.flatten() for moved in shared])
    assert (alone - shared).norm() < 1e-6 * alone.norm() + 1e-7 * adv.norm()
    assert alone.norm() > 1e-4


def test_advantages_are_of_all_rewards(watched, epochs):
    """Each process has its part of what one would make of the prompts and rewards of both."""
    memory = torch.load(watched[0] / "1.pt")["stats"]
    counts = ddpo.Settings.stats_buffer, SMALL["stats_min_count"]
    for epoch in (2, 3):
        parts = epochs[epoch]
        prompts = parts[0]["prompts"] + parts[1]["prompts"]
        rewards = torch.cat([part["reward"] for part in parts])
        adv = ddpo.prompt_advantages(memory, prompts, rewards, *counts)
        ours = torch.cat([part["samples"][3] for part in parts])
        torch.testing.assert_close(ours, adv.clamp(-5, 5))


def test_metrics_are_of_all_images(watched, epochs):
    run = watched[0] / "run"
    rows = read_metrics(run)
    assert [row["queries"] for row in rows] == ["0", "8", "16", "24", "32", "40"]
    for epoch in (2, 3):
        rewards = torch.cat([part["reward"] for part in epochs[epoch]])
        assert len(rewards) == 8
        assert float(rows[epoch]["reward_mean"]) == pytest.approx(rewards.mean().item(), rel=1e-4)
        assert float(rows[epoch]["reward_std"]) == pytest.approx(rewards.std().item(), rel=1e-4)
        assert float(rows[epoch]["ratio_error"]) < 1e-5
    assert [row["eval_reward"] != "" for row in rows] == [True, True, True, False, True, False]
    assert (run / "samples/epoch_0004.png").is_file()


def test_a_gradient_that_is_not_finite_in_one_is_left_out_by_all(watched, epochs):
    rows = read_metrics(watched[0] / "run")
    assert [row["skipped"] for row in rows] == ["", "0", "0", "0", "1", "0"]
    for part in epochs[4]:
        assert all(map(torch.equal, part["before"], part["after"]))


def test_a_killed_run_ends_in_all_and_goes_on_with_another_number(watched, tmp_path):
    out, done = watched
    assert done.returncode != 0
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((out / f"pid-{rank}").read_text()), 0)
    run = shutil.copytree(out / "run", tmp_path / "run")
    alone("--resume", run, "--epochs", 6)
    rows = read_metrics(run)
    assert rows[:6] == read_metrics(out / "run")
    assert [int(row["queries"]) for row in rows] == [0, 8, 16, 24, 32, 40, 48]


def test_uneven_shares_are_one_line_once(watched):
    out, done = watched
    assert [(out / f"status-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert done.stderr.count("ddpo.py: error: ") == 1
    assert "images_per_epoch must be a multiple of 2" in done.stderr
    assert not (out / "wrong").exists()

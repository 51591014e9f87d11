"""Proves that several processes are one run with more hands: the same weights in each, the gradient
of one process that has all images, metrics of all, a gradient that is not finite left out by all,
and a run that ends when one is killed and goes on with another number. CPUs stand for GPUs."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import as_flags, make_policy

import ddpo

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 2, "steps": 2, "images_per_epoch": 8, "sample_batch": 2, "micro_batch": 3,
         "updates_per_epoch": 1, "eval_images": 2, "grad_clip": 1e9, "device": "cpu",
         "precision": "fp32", "stats_min_count": 2}  # fmt: skip
WATCHED = """import os, sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/examples"]
import ddpo, multi_gpu
rank = int(os.environ["RANK"])
open({out!r} + f"/pid-{{rank}}", "w").write(str(os.getpid()))
plain = multi_gpu.update

class Watched(multi_gpu.SharedRun):
    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer = torch.optim.SGD(self.policy.weights, lr=0.1)

    def step(self):
        if rank == 1 and len(self.log) == 3:
            self.policy.weights[0].grad[:] = float("nan")
        return super().step()

    def describe(self, terms, prompts, x, cond, scores, generator):
        self.seen = prompts, scores[:, 0]
        return super().describe(terms, prompts, x, cond, scores, generator)

def update(run, samples, generator):
    found = dict(zip(("prompts", "reward"), run.seen), samples=samples)
    found["before"] = [w.detach().clone() for w in run.policy.weights]
    row = plain(run, samples, generator)
    found["after"] = [w.detach().clone() for w in run.policy.weights]
    torch.save(found, {out!r} + f"/{{len(run.log)}}-{{rank}}.pt")
    return row

multi_gpu.SharedRun, multi_gpu.update = Watched, update
ddpo.main(launch=multi_gpu.launch)
"""


def torchrun(count, *argv, script=ROOT / "examples/multi_gpu.py"):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}",
               "--standalone", str(script), *map(str, argv)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out


def read_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def write_script(folder):
    """A script that notes in the folder what each process has and does; in the third epoch the
    gradient of one is not finite."""
    path = folder / "watched.py"
    path.write_text(WATCHED.format(root=str(ROOT), out=str(folder)))
    return path


@pytest.fixture(scope="module")
def watched(tiny_model, tmp_path_factory):
    """The folder of a run on two processes, and what each had and did: {epoch: [..., ...]}."""
    folder = tmp_path_factory.mktemp("watched")
    flags = as_flags({**SMALL, "model": tiny_model, "out": folder / "run", "epochs": 3})
    finished(torchrun(2, *flags, script=write_script(folder)))
    epochs = {e: [torch.load(folder / f"{e}-{rank}.pt") for rank in (0, 1)] for e in (1, 2, 3)}
    return folder / "run", epochs


def test_all_processes_have_the_same_weights_and_other_images(watched):
    _, found = watched
    for parts in found.values():
        for key in ("before", "after"):
            assert all(map(torch.equal, parts[0][key], parts[1][key]))
        assert (parts[0]["samples"][0] - parts[1]["samples"][0]).abs().min(0).values.max() > 0.1
    assert not all(map(torch.equal, found[2][0]["before"], found[2][0]["after"]))


def test_the_gradient_is_that_of_one_process_with_all_images(watched, tiny_model):
    parts = watched[1][2]
    policy, settings = make_policy(tiny_model, **SMALL)
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


def test_advantages_are_of_all_rewards(watched):
    """Each process has its part of what one would make of the prompts and rewards of both."""
    _, found = watched
    stats = ddpo.PromptStats(ddpo.Settings.stats_buffer, SMALL["stats_min_count"])
    for epoch in (1, 2):
        parts = found[epoch]
        prompts = parts[0]["prompts"] + parts[1]["prompts"]
        adv = stats.advantages(prompts, torch.cat([part["reward"] for part in parts]))
        ours = torch.cat([part["samples"][3] for part in parts])
        torch.testing.assert_close(ours, adv.clamp(-5, 5))


def test_metrics_are_of_all_images(watched):
    run, found = watched
    rows = read_metrics(run)
    assert [row["queries"] for row in rows] == ["0", "8", "16", "24"]
    for epoch in (1, 2):
        rewards = torch.cat([part["reward"] for part in found[epoch]])
        assert len(rewards) == 8
        assert float(rows[epoch]["reward_mean"]) == pytest.approx(rewards.mean().item(), rel=1e-4)
        assert float(rows[epoch]["reward_std"]) == pytest.approx(rewards.std().item(), rel=1e-4)
        assert float(rows[epoch]["ratio_error"]) < 1e-5
    assert (run / "samples/epoch_0003.png").is_file()


def test_a_gradient_that_is_not_finite_in_one_is_left_out_by_all(watched):
    run, found = watched
    assert [row["skipped"] for row in read_metrics(run)] == ["", "0", "0", "1"]
    for part in found[3]:
        assert all(map(torch.equal, part["before"], part["after"]))


def test_a_killed_run_ends_in_all_and_goes_on_with_another_number(tiny_model, tmp_path):
    run = tmp_path / "run"
    flags = as_flags({**SMALL, "model": tiny_model, "out": run, "epochs": 1000})
    process = torchrun(2, *flags, script=write_script(tmp_path))
    deadline = time.time() + 60
    while not (run / "state.pt").is_file() and time.time() < deadline:
        time.sleep(0.1)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    done = torch.load(run / "state.pt", weights_only=True)["log"][-1]["epoch"]
    more = ["--resume", run, "--epochs", done + 1]
    finished(torchrun(1, *more, script=tmp_path / "watched.py"))
    rows = read_metrics(run)
    assert [int(row["epoch"]) for row in rows] == list(range(done + 2))
    assert int(rows[-1]["queries"]) == 8 * (done + 1)


def test_uneven_shares_are_one_line_once(tiny_model, tmp_path):
    flags = {**SMALL, "model": tiny_model, "out": tmp_path / "run", "images_per_epoch": 9}
    process = torchrun(2, *as_flags(flags))
    _, err = process.communicate(timeout=60)
    assert err.count("ddpo.py: error: ") == 1 and process.returncode != 0
    assert "images_per_epoch must be a multiple of 2" in err and not (tmp_path / "run").exists()

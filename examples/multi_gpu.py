"""DDPO on several GPUs: a process for each, all with the same weights, each with its own images.

    torchrun --nproc-per-node=8 examples/multi_gpu.py --reward aesthetic --images-per-epoch 256

Takes every flag of ddpo.py. --images-per-epoch counts the images of all processes together,
--batch-size those of one. All keep the statistics of all rewards. Gradients are averaged before
they are clipped or found not to be finite, so all processes take the same step. Process 0
evaluates, writes and prints; from its folder all resume, however many they are. Without torchrun
there is one process.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo


def gather(value):  # of all processes, in the order of their ranks
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean(row):  # over all processes, of each number in it
    rows = gather({name: float(value) for name, value in row.items()})
    return {name: sum(other[name] for other in rows) / len(rows) for name in row}


class SharedRun(ddpo.Run):
    begun = False  # what goes wrong before goes wrong in all processes

    def __init__(self, settings, policy, folder):
        images, rest = divmod(settings.images_per_epoch, dist.get_world_size())
        if rest:
            raise ddpo.UserError(f"images_per_epoch must be a multiple of {dist.get_world_size()}")
        seed = settings.seed + 101 * dist.get_rank()  # each has prompts and noise of its own
        super().__init__(replace(settings, images_per_epoch=images, seed=seed), policy, folder)
        policy.batch_size = min(policy.batch_size, images // settings.updates_per_epoch)
        SharedRun.begun = True

    def advantages(self, prompts, rewards):  # of this process's images, among the rewards of all
        adv = super().advantages(sum(gather(prompts), []), torch.cat(gather(rewards)))
        return adv.split(len(prompts))[dist.get_rank()]

    def step(self):
        for weight in self.policy.weights:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        return super().step()

    def describe(self, terms, samples):
        row = mean(super().describe(terms, samples))
        if "kl_error" in row:  # that of a mean of so many estimates
            row["kl_error"] /= dist.get_world_size() ** 0.5
        rewards = torch.cat(gather(samples.scores[:, 0]))
        return {**row, "queries": self.log[-1]["queries"] + len(rewards),
                "reward_std": rewards.std()}

    def evaluate(self, terms, prompts, epoch):
        return 0.0 if dist.get_rank() else super().evaluate(terms, prompts, epoch)

    def record(self, row):
        if not dist.get_rank():
            super().record(row)

    def save(self):
        if not dist.get_rank():
            super().save()


def update(run, samples, generator):
    row = ddpo.update(run, samples, generator)
    worst = max(gather(float(row["ratio_error"])))
    return {**mean(row), "ratio_error": worst, "skipped": row["skipped"]}


def launch(settings, resume):  # all but process 0 have a folder of their own, of no use afterwards
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**alone)  # NCCL between GPUs, gloo between CPUs
    with tempfile.TemporaryDirectory() as scratch:
        if dist.get_rank() and resume:
            unused = shutil.ignore_patterns("samples", "pipeline")
            resume = shutil.copytree(resume, f"{scratch}/run", ignore=unused)
        elif dist.get_rank():
            settings = replace(settings, out=f"{scratch}/run")
        try:
            ddpo.launch(settings, resume, None, update, SharedRun)
        except Exception as error:
            if SharedRun.begun or not isinstance(error, ddpo.UserError):
                sys.stderr = sys.__stderr__
            raise
    dist.destroy_process_group()


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    ddpo.main(launch=launch, name="multi_gpu.py", about=__doc__)

"""DDPO on several GPUs: a process for each, all with the same weights, each with its own images.

    torchrun --nproc-per-node=8 examples/multi_gpu.py --reward aesthetic --images-per-epoch 256

Takes every flag of ddpo.py. --images-per-epoch counts the images of all processes together,
--sample-batch and --micro-batch those of one. All keep the statistics of all rewards. Gradients are
averaged before they are clipped or found not to be finite, so all processes take the same step.
Process 0 evaluates, writes and prints; from its state all resume, however many they are.
"""

import os
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


def mean(row):  # over all processes, of each number in it; None where one of them has none
    columns = zip(*(other.values() for other in gather(row)))
    return {k: None if None in v else sum(v) / len(v) for k, v in zip(row, columns)}


class SharedRun(ddpo.Run):
    def __init__(self, settings, policy):
        images, rest = divmod(settings.images_per_epoch, dist.get_world_size())
        if rest:
            raise ddpo.UserError(f"images_per_epoch must be a multiple of {dist.get_world_size()}")
        seed = settings.seed + 101 * dist.get_rank()  # each has prompts and noise of its own
        rarely = {"eval_every": 10**9, "save_every": 10**9} if dist.get_rank() else {}
        super().__init__(replace(settings, images_per_epoch=images, seed=seed, **rarely), policy)

    def advantages(self, prompts, rewards):  # of this process's images, among the rewards of all
        adv = super().advantages(sum(gather(prompts), []), torch.cat(gather(rewards)))
        return adv.split(len(prompts))[dist.get_rank()]

    def step(self):
        for weight in self.policy.weights:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        return super().step()

    def describe(self, terms, prompts, x, cond, scores, generator):
        row = mean(super().describe(terms, prompts, x, cond, scores, generator))
        row["queries"] = self.log[-1]["queries"] + sum(gather(len(prompts)))
        row["reward_std"] = torch.cat(gather(scores))[:, 0].std().item()
        return row


def update(run, samples, generator):
    row = ddpo.update(run, samples, generator)
    return {**mean(row), "ratio_error": max(gather(row["ratio_error"])), "skipped": row["skipped"]}


def launch(settings, folder):  # what all but the first process write goes to a folder of no use
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # NCCL between GPUs, gloo between CPUs
    state = Path(folder or "", "state.pt")
    saved = gather(state.read_bytes() if folder and state.is_file() else None)[0]
    with tempfile.TemporaryDirectory() as scratch:
        if dist.get_rank() and saved:
            Path(scratch, "state.pt").write_bytes(saved)
        try:
            ddpo.launch(settings, scratch if dist.get_rank() else folder, None, update, SharedRun)
        except ddpo.UserError:
            if Path(scratch, "config.json").exists():  # before that all fail alike
                sys.stderr = sys.__stderr__
            raise


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    ddpo.main(launch=launch)

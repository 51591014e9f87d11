"""A mix of two rewards: is it better to add them up before images are compared, or after?

    python examples/experiments/mixes.py           # an hour on one core
    python examples/experiments/mixes.py --table   # of the runs that there are

"sum" is ddpo.py's: the advantages of a weighted sum. "each" compares images by each reward alone,
adds up these advantages with weights, and divides by their spread in the epoch (GDPO, arXiv
2601.05242). The same command goes on with what was stopped.
"""

import csv
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpo
import rewards

CLIP = "clipscore(examples/models/emoji-clip)"
SIZES = ("compressibility", "incompressibility")
WEIGHTS = {"sum": (0.05, 0.15, 0.5), "each": (0.3, 1.0, 3.0)}  # of the size; of CLIP's score 1
SEEDS = (0, 1, 2)
RUNS = Path("runs/mixes")


class Mix:
    """A reward that remembers its terms."""

    def __init__(self, size, weight):
        self.terms = rewards.load_rewards(f"{CLIP} + {weight}*{size}")
        self.weights = torch.tensor([1.0, weight])
        self.seen = []

    def __call__(self, images, prompts):
        scores = ddpo.score(self.terms, images, prompts)
        self.seen.append(scores[:, 1:])
        return scores[:, 0]


class EachRun(ddpo.Run):
    mix = None

    def advantages(self, prompts, rewards):
        seen = torch.cat(self.mix.seen)[-len(prompts) :]  # the first were an evaluation's
        self.mix.seen.clear()
        group = self.settings.samples_per_prompt
        adv = torch.stack([ddpo.group_advantages(reward, group) for reward in seen.T], 1)
        adv = adv @ self.mix.weights
        limit = self.settings.adv_clip
        return (adv / adv.std()).clamp(-limit, limit)


def run_one(size, kind, weight, seed):
    """Eight epochs, from the bundled model."""
    out = RUNS / f"{size} {kind} {weight} {seed}"
    if (out / "samples/epoch_0008.png").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    mix = Mix(size, weight)
    settings = ddpo.Settings(seed=seed, epochs=8, kl_stop=0.0, eval_every=8, out=str(out),
                             monitor=f"{CLIP},{size}")  # fmt: skip
    kind = type("EachRun", (EachRun,), {"mix": mix}) if kind == "each" else ddpo.Run
    ddpo.launch(settings, reward=mix, run_class=kind)


def tabulate():
    """Both rewards in the first epoch and in the last two, means of the runs that have ended."""
    print("| | weight | clipscore | kB | seeds |\n|---|---|---|---|---|")
    for size, kind in itertools.product(SIZES, WEIGHTS):
        for weight in WEIGHTS[kind]:
            ends = []
            for path in RUNS.glob(f"{size} {kind} {weight} */samples/epoch_0008.png"):
                metrics = path.parents[1] / "metrics.csv"
                rows = list(csv.DictReader(metrics.read_text().splitlines()))[1:]
                both = [[float(row[CLIP]), abs(float(row[size]))] for row in rows]
                ends.append([np.mean(both[:1], 0), np.mean(both[-2:], 0)])
            if ends:
                (clip_0, kB_0), (clip, kB) = np.mean(ends, 0)
                print(f"| {size}, {kind} | {weight} | {clip_0:.3f} to {clip:.3f} |"
                      f" {kB_0:.2f} to {kB:.2f} | {len(ends)} |")  # fmt: skip


if __name__ == "__main__":
    if "--table" not in sys.argv:
        torch.set_num_threads(1)
        for seed, size, n in itertools.product(SEEDS, SIZES, range(3)):
            for kind in WEIGHTS:
                run_one(size, kind, WEIGHTS[kind][n], seed)
    tabulate()

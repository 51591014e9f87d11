"""A mix of two rewards: is it better to add them up before images are compared, or after?

    pip install matplotlib
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


def read(size, kind, weight):
    """Clipscore and kB, (seeds, epochs, 2), of the runs that have ended."""
    runs = []
    for path in RUNS.glob(f"{size} {kind} {weight} */samples/epoch_0008.png"):
        metrics = path.parents[1] / "metrics.csv"
        rows = list(csv.DictReader(metrics.read_text().splitlines()))[1:]
        runs.append([[float(row[CLIP]), abs(float(row[size]))] for row in rows])
    return np.array(runs)


def tabulate():
    """Both rewards in the first epoch and in the last two, means of the runs that have ended."""
    print("| | weight | clipscore | kB | seeds |\n|---|---|---|---|---|")
    for size, kind in itertools.product(SIZES, WEIGHTS):
        for weight in WEIGHTS[kind]:
            runs = read(size, kind, weight)
            if len(runs):
                clip_0, kB_0 = runs[:, 0].mean(0)
                clip, kB = runs[:, -2:].mean((0, 1))
                print(f"| {size}, {kind} | {weight} | {clip_0:.3f} to {clip:.3f} |"
                      f" {kB_0:.2f} to {kB:.2f} | {len(runs)} |")  # fmt: skip


def draw(path):
    """Both rewards against epochs, means of the runs that have ended."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for column, size in zip(axes.T, SIZES):
        for kind, color in zip(WEIGHTS, ("C0", "C1")):
            for weight, style in zip(WEIGHTS[kind], (":", "--", "-")):
                runs = read(size, kind, weight)
                for n in range(2 if len(runs) else 0):
                    curve = runs[..., n].mean(0)
                    label = f"{kind} {weight}"
                    column[n].plot(range(1, 9), curve, style, color=color, label=label)
        column[0].set(title=f"clipscore + weight * {size}", ylabel="clipscore")
        column[1].set(xlabel="epoch", ylabel="kB")
    axes[0, 0].legend(ncols=2)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    if "--table" not in sys.argv:
        torch.set_num_threads(1)
        for seed, size, n in itertools.product(SEEDS, SIZES, range(3)):
            for kind in WEIGHTS:
                run_one(size, kind, WEIGHTS[kind][n], seed)
    tabulate()
    draw(RUNS / "mixes.png")

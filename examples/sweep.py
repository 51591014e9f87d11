"""The sweep behind the bundled model's ddpo.json: what makes the smallest JPEGs in 5 minutes on two CPU cores, animals intact?

    python examples/sweep.py --share 0.5                                    # every variant, half of the time, seed 0
    python examples/sweep.py --only base "lr 0.02" --seeds 0 1 2            # finalists, all of the time, three seeds

Each variant differs from BASE in what its name says, and makes as many denoising steps as BASE does in 5 minutes. A command
that is repeated goes on with what is there; with a larger --share it goes on with the runs of the smaller one. The monitor is
the share of an epoch's pictures that examples/emoji-clip can name among its 45 animals. A run counts with the smallest mean
JPEG of three successive epochs in which that is at least 0.9: so many kB after so many of the 5 minutes. The table of all runs
is sweep.md in their folder; that of the runs which ddpo.json was chosen from is examples/sweep.md.
"""

import argparse
import csv
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BASE = {"images_per_epoch": 64, "steps": 10, "guidance_scale": 3.0, "samples_per_prompt": 1, "updates_per_epoch": 4, "lr": 0.01,
        "clip_range": 0.002, "min_std": 0.1, "lora_rank": 4}  # fmt: skip
VARIANTS = ["lr 0.005", "lr 0.02", "clip_range 0.001", "clip_range 0.004", "updates_per_epoch 2", "updates_per_epoch 8",
            "steps 6", "steps 15", "guidance_scale 2", "guidance_scale 5", "images_per_epoch 32", "images_per_epoch 128",
            "samples_per_prompt 2", "samples_per_prompt 4", "min_std 0"]  # fmt: skip
WORK = 40 * 64 * 10  # denoising steps, each with its share of the learning, in 5 minutes on two cores
NAMEABLE = 0.9


@functools.cache
def judge():
    """emoji-clip's eye, and what it reads in the names of the animals."""
    from rewards import load_clip

    see, read, _ = load_clip(HERE / "emoji-clip", HERE / "emoji-clip", "cpu")
    animals = [line for line in (HERE / "prompts/animals.txt").read_text().splitlines() if not line.startswith("#")]
    return see, animals, read(animals)


@torch.no_grad()
def named(images, prompts):
    """A monitor: 1 where emoji-clip takes the picture (B, 3, H, W) for the animal of its prompt, else 0."""
    from rewards import to_pil

    see, animals, words = judge()
    return [float(animals[i] == prompt) for i, prompt in zip((see(to_pil(images)) @ words.T).argmax(1), prompts)]


def settings(variant):
    """BASE with the changes that a name such as "lr 0.005, steps 15" calls for."""
    changes = dict(part.split() for part in variant.split(", ")) if variant != "base" else {}
    if unknown := changes.keys() - BASE.keys():
        sys.exit(f"sweep.py: error: {variant}: no setting named {', '.join(unknown)}; there are {', '.join(BASE)}")
    return {**BASE, **changes}


def train(variant, seed, share, folder):
    """Run a variant to its share of WORK, or go on with it, on one core."""
    s, run = settings(variant), folder / f"{variant} seed {seed}"
    epochs = round(share * WORK / (int(s["images_per_epoch"]) * int(s["steps"])))
    if (run / f"state_{epochs:05d}.pt").is_file():
        return
    own = {**s, "reward": "compressibility", "monitor": "examples/sweep.py:named", "seed": seed, "eval_every": 1000, "out": run}
    flags = {"resume": run} if (run / "config.json").is_file() else own
    command = [sys.executable, "ddpo.py", *(f"--{k.replace('_', '-')}={v}" for k, v in {**flags, "epochs": epochs}.items())]
    with open(folder / f"{run.name}.log", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=HERE.parent, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def result(run):
    """The last of the best three epochs of a run, how many it has, and the means of those three: JPEG, share named, nats. None
    if no three were nameable."""
    from compare import best_window

    with open(run / "metrics.csv") as file:
        rows = [[float(row[c] or 0) for c in ("reward_mean", "named", "kl")] for row in list(csv.DictReader(file))[1:]]
    if not (found := best_window(rows, NAMEABLE)):
        return None
    (reward, named, nats), last = found
    return last + 1, len(rows), -reward, named, nats


def report(folder):
    """sweep.md, from all runs in the folder, the best first."""
    found = []
    for run in folder.glob("*/state_*.pt"):
        variant, seed = run.parent.name.split(" seed ")
        if not (best := result(run.parent)):
            continue
        epoch, ran, size, named, nats = best
        minutes = 5 * epoch * int(settings(variant)["images_per_epoch"]) * int(settings(variant)["steps"]) / WORK
        found.append((size, f"| {variant} | {seed} | {ran} | {epoch} | {minutes:.1f} | {size:.2f} | {named:.2f} | {nats:.0f} |"))
    lines = ["| variant | seed | epochs run | best end at | minutes | kB | named | nats |", "|---|---|---|---|---|---|---|---|"]
    lines += [line for _, line in sorted(set(found))]
    (folder / "sweep.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=["base", *VARIANTS], help="some variants, or others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the 5 minutes on two cores")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep").absolute(), help="folder of the runs")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(*run, args.share, args.runs), [(v, seed) for v in args.only for seed in args.seeds]))
    report(args.runs)


if __name__ == "__main__":
    main()

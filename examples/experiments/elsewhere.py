"""Does what a run has learned last where a LoRA is used: with another sampler, other steps, other
guidance than it was trained with?

    pip install peft
    python examples/experiments/elsewhere.py runs/seed-0 runs/seed-1 runs/seed-2

Runs of one reward on the bundled model; each is drawn in plain diffusers, without and with its
LoRA, every third animal once. The reward and the share of pictures that emoji-clip can name, means
of the runs, go to --csv row by row: the same command goes on with what was stopped.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import generate
import race

import ddpo
import rewards

SAMPLERS = ["DDIM", "DDIM, eta 0", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete",
            "PNDM", "UniPCMultistep", "HeunDiscrete"]  # fmt: skip
WAYS = [("DDIM", 7, 3.0), ("DDIM", 7, 1.0)]  # as in training; sampler, steps, guidance
for how in ((5, 3.0), (10, 3.0), (20, 3.0), (10, 1.0), (10, 7.5)):
    WAYS += [(sampler, *how) for sampler in SAMPLERS]
WAYS += [("DDIM", 50, 3.0), ("PNDM", 50, 3.0), ("PNDM", 50, 7.5)]  # as Stable Diffusion's pipeline
COLUMNS = ["run", "sampler", "steps", "guidance", "reward", "named"]


def judged(pipe, reward, sampler, steps, guidance):
    """The mean reward of the pictures drawn so, and the share named."""
    prompts = ddpo.load_prompts("animals")[::3]
    kind, _, eta_0 = sampler.partition(", ")
    generate.set_scheduler(pipe, kind + "Scheduler")
    how = {"steps": steps, "guidance_scale": guidance, "eta": 0.0 if eta_0 else 1.0}
    pictures = generate.draw(pipe, prompts, 0, how)
    images = torch.stack([torch.from_numpy(np.array(p)).movedim(2, 0) / 255 for p in pictures])
    return float(reward(images, prompts).mean()), np.mean(race.named(images, prompts))


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("elsewhere.py", description=__doc__, formatter_class=style)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--csv", type=Path, default=Path("elsewhere.csv"))
    parser.add_argument("--steps", type=int, help="only drawn with so many")
    args = parser.parse_args()
    ways = [way for way in WAYS if args.steps in (None, way[1])]
    name = json.loads((args.runs[0] / "config.json").read_text())["reward"]
    ((_, _, reward),) = rewards.load_rewards(name)
    done = list(csv.DictReader(args.csv.open())) if args.csv.is_file() else []
    done = {tuple(row[k] for k in COLUMNS[:4]): (row["reward"], row["named"]) for row in done}
    torch.set_num_threads(1)
    for run in ["before", *args.runs]:
        pipe = generate.load(ddpo.EXAMPLES / "models" / "emoji-diffusion")
        if run != "before":
            pipe.load_lora_weights(run, weight_name=generate.LORA)
        for way in ways:
            row = tuple(map(str, (run, *way)))
            if row not in done:
                done[row] = judged(pipe, reward, *way)
                with args.csv.open("w", newline="") as file:
                    csv.writer(file).writerows([COLUMNS, *((*k, *v) for k, v in done.items())])
    print(f"| {name}: sampler | steps | guidance | reward before, after | named before, after |")
    print("|---|---|---|---|---|")
    for way in ways:
        before = np.array(done[tuple(map(str, ("before", *way)))], float)
        after = [done[tuple(map(str, (run, *way)))] for run in args.runs]
        after = np.array(after, float).mean(0)
        print(f"| {' | '.join(map(str, way))} | {before[0]:.3f}, {after[0]:.3f} |"
              f" {before[1]:.0%}, {after[1]:.0%} |")


if __name__ == "__main__":
    main()

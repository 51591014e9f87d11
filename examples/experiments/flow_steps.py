"""What do the steps of flow.py cost? The bundled model as a flow, by three steps that add noise.

    python examples/experiments/flow_steps.py           # two hours on one core
    python examples/experiments/flow_steps.py --table   # of the runs that there are

Each run takes the same calls of the network, 3,200 with 7 steps and 3,328 with 10, from the bundled
model, without a limit. Before and after, every animal is drawn from the same noise, by the policy
and by the ODE: the mean reward, and the share that emoji-clip can name. They go to --csv row by
row: the same command goes on with what was stopped.
"""

import argparse
import csv
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import flow
import race

import ddpo
import rewards

REWARDS = ["compressibility", "incompressibility", race.CLIP]
TERMS = rewards.load_rewards(" + ".join(REWARDS), race.MONITOR)
NOISES = {"ddim": (1.0,), "grpo": (0.7, 0.35), "cps": (0.7, 0.35)}  # the papers', and half of it
EPOCHS = {7: 5, 10: 4}  # by the number of steps
WAYS = [(step, noise, steps) for steps in EPOCHS for step in NOISES for noise in NOISES[step]]
COLUMNS = ["learned", "step", "noise", "steps", "seed"]
COLUMNS += [f"{column} by {way}" for way in ("policy", "ode") for column in [*REWARDS, "named"]]
RUNS = Path("runs/flow_steps")


def look(policy):
    """The scores in TERMS of all animals, from the same noise every time: by the policy, then by
    the ODE."""
    animals = ddpo.load_prompts("animals")
    own = policy.noise
    found = []
    for noise in (own, 0.0):
        policy.noise = noise
        samples = ddpo.sample(policy, TERMS, animals, torch.Generator().manual_seed(12345))
        found += samples.scores.mean(0)[1:].tolist()
    policy.noise = own
    return found


class JudgedRun(flow.FlowRun):
    def end(self):
        super().end()
        JudgedRun.found = look(self.policy)


def settings_of(reward, step, noise, steps, seed):
    return flow.FlowSettings(
        reward=reward, step=step, noise_level=noise, steps=steps, seed=seed, epochs=EPOCHS[steps],
        batch_size=32, kl_stop=0.0, eval_every=99, eval_images=1, out=str(RUNS / "run"),
    )  # fmt: skip


def run_one(reward, *way):
    """The scores of the pretrained model (reward "none"), or of one that was trained."""
    if reward == "none":
        return look(flow.policy_of(settings_of("compressibility", *way), torch.device("cpu")))
    shutil.rmtree(RUNS / "run", ignore_errors=True)
    settings = settings_of(reward, *way)
    ddpo.launch(settings, run_class=JudgedRun, policy_class=flow.policy_of)
    return JudgedRun.found


def tabulate(done):
    """Means of the seeds that there are: by the policy / by the ODE, before and after."""
    print("| step, noise, steps |", *(f"{reward}: before | after |" for reward in REWARDS))
    print("|---" * (1 + 2 * len(REWARDS)) + "|")
    for way in WAYS:
        cells = []
        for n, reward in enumerate(REWARDS):
            for learned in ("none", reward):
                key = (learned, *map(str, way))
                rows = [value for k, value in done.items() if k[:4] == key]
                if rows:
                    mean = np.array(rows, float).mean(0)
                    cells.append(f"{mean[n]:.3f} ({mean[3]:.0%}) / {mean[4 + n]:.3f}"
                                 f" ({mean[7]:.0%})")  # fmt: skip
                else:
                    cells.append("")
        print(f"| {' '.join(map(str, way))} | {' | '.join(cells)} |")
    print("seeds:", *sorted({k[4] for k in done}))


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("flow_steps.py", description=__doc__, formatter_class=style)
    parser.add_argument("--csv", type=Path, default=Path("flow_steps.csv"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    done = list(csv.DictReader(args.csv.open())) if args.csv.is_file() else []
    done = {tuple(row[k] for k in COLUMNS[:5]): [row[k] for k in COLUMNS[5:]] for row in done}
    torch.set_num_threads(1)
    todo = [("none", *way, 0) for way in WAYS]
    for seed, way, reward in itertools.product((0, 1, 2), WAYS, REWARDS):
        todo.append((reward, *way, seed))
    for row in [] if args.table else todo:
        key = tuple(map(str, row))
        if key not in done:
            done[key] = run_one(*row)
            with args.csv.open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *((*k, *v) for k, v in done.items())])
    tabulate(done)


if __name__ == "__main__":
    main()

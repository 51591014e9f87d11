"""Proof that a run survives being killed: trains the bundled model once undisturbed, then again
and again, each time with SIGKILL at random moments and `--resume` after each, and compares what
they leave, bit for bit: weights, optimizer, statistics, metrics.csv (but for the seconds),
settings and pictures.

    python examples/experiments/kill_resume.py   # 20 kills; six minutes on one CPU core
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

DDPO = Path(__file__).resolve().parents[2] / "ddpo.py"
FLAGS = """--device cpu --epochs 6 --images-per-epoch 16 --batch-size 8 --steps 5
           --samples-per-prompt 1 --stats-buffer 2 --kl-stop 0 --eval-every 2
           --eval-images 4""".split()


def plain(value):
    """A saved state with bytes in place of tensors, so that == compares it, and without the
    seconds of its log."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def contents(run):
    """{name: content} of all files in a run folder, without what may differ between equal runs:
    seconds, and the folder."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".csv":
            found[name] = plain(list(csv.DictReader(path.read_text().splitlines())))
        elif path.suffix == ".json":
            found[name] = {**json.loads(path.read_text()), "out": ""}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def ddpo(flags, seconds=None):
    """Run ddpo.py, with SIGKILL after so many seconds; True if that killed it, False if it had
    ended. Its errors end all."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # two are hardly faster on so small a model
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, DDPO, *flags]
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            sys.exit(f"ddpo.py {' '.join(flags)} failed:\n{said.read()[-2000:]}")
    return process.returncode != 0


def train_and_kill(run, draw_moment):
    """Train to the end, killed after each of the seconds that `draw_moment` gives: None ends that.
    Returns the run's folder and how often it was killed."""
    kills = 0
    while True:
        if (run / "state.pt").is_file():
            flags = ["--resume", str(run)]
        else:
            if run.exists():
                print(f"{run.name}: killed before there was anything to resume; another folder")
                run = run.with_name(run.name + "-again")
            flags = [*FLAGS, "--out", str(run)]
        if not ddpo(flags, draw_moment(kills)):
            return run, kills  # no more were due, or the moment would have come too late
        kills += 1


def main():
    about = "Kill runs at random moments, resume them, compare their ends."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    kills = 0
    identical = 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        whole = Path(folder, "undisturbed")
        ddpo([*FLAGS, "--out", str(whole)])
        duration = time.time() - start
        expected = contents(whole)
        print(f"undisturbed: {duration:.0f} s, {len(expected)} files", flush=True)

        def draw_moment(more):
            return moments.uniform(0, duration) if kills + more < args.kills else None

        number = 0
        while kills < args.kills:
            number += 1
            run, more = train_and_kill(Path(folder, f"run-{number}"), draw_moment)
            kills += more
            found = contents(run)
            names = sorted(expected.keys() | found.keys())
            differ = [name for name in names if expected.get(name) != found.get(name)]
            if differ:
                verdict = "differs in " + ", ".join(differ)
            else:
                verdict = "identical"
                identical += more
            spent = time.time() - start
            print(f"run {number}: killed {more} times, {verdict}; {kills} kills, {spent:.0f} s",
                  flush=True)  # fmt: skip
    print(f"{identical} of {kills} identical")
    sys.exit(identical < kills)


if __name__ == "__main__":
    main()

"""Proof that a run survives being killed: trains the bundled model once undisturbed, then again and again, each time with
SIGKILL at random moments and `--resume` after each, and compares what they leave, byte for byte: weights, optimizer,
statistics, metrics.csv (but for the seconds), settings and pictures.

    python examples/kill_resume.py                # 20 kills; six minutes on one CPU core
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

DDPO = Path(__file__).resolve().parent.parent / "ddpo.py"
FLAGS = "--device cpu --epochs 6 --images-per-epoch 16 --sample-batch 8 --steps 5 --updates-per-epoch 2 --micro-batch 20"
FLAGS += " --stats-min-count 2 --eval-every 2 --eval-images 4 --save-every 2"


def plain(value):
    """A saved state with bytes in place of tensors, so that == compares it, and without the seconds of its log."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "seconds"}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def contents(run):
    """{name: content} of all files in a run folder, without what may differ between equal runs: seconds, and the folder."""
    found = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    for name, path in found.items():
        if path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".csv":
            found[name] = [{**row, "seconds": ""} for row in csv.DictReader(path.read_text().splitlines())]
        else:
            found[name] = {**json.loads(path.read_text()), "out": ""} if path.suffix == ".json" else path.read_bytes()
    return found


def ddpo(flags, seconds=None):
    """Run ddpo.py, with SIGKILL after so many seconds; True if that killed it, False if it had ended. Its errors end all."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # two threads are hardly faster on so small a model
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, DDPO, *flags], env=env, stdout=said, stderr=said)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            sys.exit(f"ddpo.py {' '.join(flags)} failed:\n{said.read()[-2000:]}")
    return process.returncode != 0


def main():
    parser = argparse.ArgumentParser(description="Kill runs at random moments, resume them, compare their ends.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        start, whole = time.time(), Path(folder, "undisturbed")
        ddpo([*FLAGS.split(), "--out", str(whole)])
        duration, expected = time.time() - start, contents(whole)
        print(f"undisturbed: {duration:.0f} s, {len(expected)} files", flush=True)
        kills, identical, number = 0, 0, 0
        while kills < args.kills:
            number, mine, killed = number + 1, 0, True
            run = Path(folder, f"run-{number}")
            while killed:  # else it ended by itself: no more kills were due, or the moment would have come too late
                began = (run / "config.json").is_file()
                if not began and run.exists():
                    print(f"run {number}: killed before there was anything to resume; starts again in another folder")
                    run = run.with_name(run.name + "-again")
                moment = moments.uniform(0, duration) if kills + mine < args.kills else None
                killed = ddpo(["--resume", str(run)] if began else [*FLAGS.split(), "--out", str(run)], moment)
                mine += killed
            found = contents(run)
            differ = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
            kills, identical = kills + mine, identical + mine * (not differ)
            verdict = "differs in " + ", ".join(differ) if differ else "identical"
            print(f"run {number}: killed {mine} times, {verdict}; {kills} kills, {time.time() - start:.0f} s", flush=True)
    print(f"{identical} of {kills} identical")
    sys.exit(identical < kills)


if __name__ == "__main__":
    main()

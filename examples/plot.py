"""Plot runs: reward and KL, or other columns of metrics.csv, against reward queries.

    pip install matplotlib
    python examples/plot.py runs/compressibility   # one curve
    python examples/plot.py runs/is-0 runs/is-1 runs/sf-0 runs/sf-1   # two, each of two seeds
    python examples/plot.py --gif runs/compressibility   # its pictures, moving; no matplotlib

Runs whose config.json differs only in the seed (and the folder) share a curve: their mean, and a
band from the lowest to the highest. The code counts, too: another update, or an edited ddpo.py, is
another curve. Of runs with the same seed each has a curve of its own.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLUMNS = ["reward_mean", "kl", "diversity"]  # those that any of the runs has
TITLES = {"reward_mean": "reward", "kl": "KL to the pretrained model, nats"}  # else the name


def read(run):
    """{column: (queries, values)} of a run's metrics.csv, for those that have values."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    curves = {}
    for column in rows[0].keys() - {"changed"}:  # which is a text
        points = [(int(row["queries"]), float(row[column])) for row in rows if row[column]]
        if points:
            curves[column] = np.array(points).T
    return curves


def read_config(run):
    """What a run was made with: its settings, and each part of the code."""
    config = json.loads((run / "config.json").read_text())
    made_with = config.pop("made_with", {})
    return config | made_with


def groups(runs):
    """Runs by what they have in common; the label is what sets a group apart from the others."""
    configs = {run: read_config(run) for run in runs}
    names = dict.fromkeys(name for config in configs.values() for name in config)
    names = [name for name in names if name not in ("seed", "out", "place")]
    varied = [k for k in names if len({str(config.get(k)) for config in configs.values()}) > 1]
    by_label = {}
    for run, config in configs.items():
        label = ", ".join(f"{name} {config[name]}" for name in varied if name in config)
        by_label.setdefault(label or runs[0].name, []).append(run)
    for label, alike in list(by_label.items()):
        if len({configs[run].get("seed") for run in alike}) < len(alike):
            del by_label[label]
            by_label |= {str(run): [run] for run in alike}
    return by_label


def pictures(run):
    """Those of a run's evaluations, always the same prompts and noise, as frames of a GIF."""
    frames = []
    height = 0
    for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()):
        path = run / "samples" / f"epoch_{int(row['epoch']):04d}.png"
        if path.is_file() and row.get("eval_reward"):
            picture = Image.open(path)
            height = height or picture.height  # later ones repeat the first above
            tiles = range(0, picture.width, 144)
            columns = (len(tiles) + 1) // 2
            frame = Image.new("RGB", (144 * columns, 20 + 2 * height), "white")
            for n, x in enumerate(tiles):  # in two rows
                tile = picture.crop((x, picture.height - height, x + 144, picture.height))
                frame.paste(tile, (n % columns * 144, 20 + n // columns * height))
            text = f"epoch {row['epoch']}, mean reward {float(row['eval_reward']):.2f}"
            ImageDraw.Draw(frame).text((2, 4), text, fill="black", font_size=14)
            frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    return frames


def draw(curves, columns, out):
    """Plot these columns of the runs' curves, a panel each."""
    import matplotlib.pyplot as plt  # here, since a GIF needs none

    heights = [2, *[1] * (len(columns) - 1)]
    size = {"figsize": (7, 2 * sum(heights)), "height_ratios": heights}
    figure, axes = plt.subplots(len(heights), 1, sharex=True, squeeze=False, **size)
    for label, group in groups(list(curves)).items():
        for axis, column in zip(axes[:, 0], columns):
            found = [curves[run][column] for run in group if column in curves[run]]
            if found:
                queries = max((x for x, _ in found), key=len)  # past its end a run has no value
                values = np.array([np.interp(queries, x, y, right=np.nan) for x, y in found])
                seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
                axis.plot(queries, np.nanmean(values, 0), label=label + seeds)
                axis.fill_between(queries, np.nanmin(values, 0), np.nanmax(values, 0), alpha=0.2)
                axis.set_ylabel(TITLES.get(column, column))
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("reward queries")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main():
    parser = argparse.ArgumentParser("plot.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="of metrics.csv")
    parser.add_argument("--gif", action="store_true", help="the pictures of one run, moving")
    parser.add_argument("--out", help="the picture; default: plot.png, or run.gif in the run")
    parser.error = lambda message: parser.exit(2, f"plot.py: error: {message}\n")
    args = parser.parse_args()
    if args.gif and len(args.runs) > 1:
        parser.error("--gif takes one run")
    for run in args.runs:
        for name in ("metrics.csv", "config.json"):
            if not (run / name).is_file():
                parser.error(f"{run} has no {name}: name the folder of a run")
    out = args.out or (args.runs[0] / "run.gif" if args.gif else "plot.png")
    if args.gif:
        frames = pictures(args.runs[0])
        if not frames:
            parser.error(f"{args.runs[0]} has no pictures of evaluations")
        hold = [600] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=hold, loop=0)
    else:
        curves = {run: read(run) for run in args.runs}
        there = set().union(*curves.values())
        columns = args.columns or [name for name in COLUMNS if name in there] or COLUMNS[:1]
        for column in columns:
            if column not in there:
                parser.error(f"no run has numbers in a column {column}")
        draw(curves, columns, out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()

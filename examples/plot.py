"""Plot runs: reward and KL, or other columns of metrics.csv, against reward queries.

    pip install matplotlib
    python examples/plot.py runs/compressibility   # one curve
    python examples/plot.py runs/is-0 runs/is-1 runs/sf-0 runs/sf-1   # two, each of two seeds
    python examples/plot.py --gif runs/compressibility   # its pictures, moving; no matplotlib
    python examples/plot.py runs/compressibility --strip 2   # its second prompt, epoch by epoch

Runs whose config.json differs only in the seed (and the folder) share a curve: their mean, and a
band from the lowest to the highest. The code counts, too: another update, or an edited ddpo.py, is
another curve. Of runs with the same seed each has a curve of its own.
"""

import argparse
import csv
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLUMNS = ["reward_mean", "eval_reward", "kl", "diversity"]  # those that any of the runs has
TITLES = {"reward_mean": "reward of an epoch's images", "eval_reward": "reward of fixed images",
          "kl": "KL to the pretrained model, nats"}  # else the name


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


def evaluations(run):
    """The rows of metrics.csv that have pictures, each with these, of always the same prompts and
    noise."""
    height = 0
    for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()):
        path = run / "samples" / f"epoch_{int(row['epoch']):04d}.png"
        if path.is_file() and row.get("eval_reward"):
            picture = Image.open(path)
            height = height or picture.height  # later ones repeat the first above
            top = picture.height - height
            lefts = range(0, picture.width, 144)
            yield row, [picture.crop((x, top, x + 144, picture.height)) for x in lefts]


def moving(run):
    """The frames of a GIF, of a run's evaluations."""
    frames = []
    for row, tiles in evaluations(run):
        columns = (len(tiles) + 1) // 2
        height = tiles[0].height
        frame = Image.new("RGB", (144 * columns, 20 + 2 * height), "white")
        for n, tile in enumerate(tiles):  # in two rows
            frame.paste(tile, (n % columns * 144, 20 + n // columns * height))
        text = f"epoch {row['epoch']}, mean reward {float(row['eval_reward']):.2f}"
        ImageDraw.Draw(frame).text((2, 4), text, fill="black", font_size=14)
        frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    return frames


def strips(run, numbers):
    """A picture: a row for each of these prompts, counted from 1; a column for each evaluation."""
    columns = list(evaluations(run))
    if not columns or not all(0 < n <= len(columns[0][1]) for n in numbers):
        return None
    height = columns[0][1][0].height
    picture = Image.new("RGB", (144 * len(columns), 20 + height * len(numbers)), "white")
    for x, (row, tiles) in enumerate(columns):
        ImageDraw.Draw(picture).text((144 * x + 2, 4), f"epoch {row['epoch']}", fill="black")
        for y, n in enumerate(numbers):
            picture.paste(tiles[n - 1], (144 * x, 20 + height * y))
    return picture


def draw(curves, columns, out):
    """Plot these columns of the runs' curves, a panel each."""
    import matplotlib.pyplot as plt  # here, since a GIF needs none

    heights = [2, *[1] * (len(columns) - 1)]
    by_label = groups(list(curves))
    size = {"figsize": (7, 2 * sum(heights) + 0.25 * len(by_label)), "height_ratios": heights}
    how = {"sharex": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(heights), 1, **how, **size)
    lines = {}
    for n, (label, group) in enumerate(by_label.items()):
        for axis, column in zip(axes[:, 0], columns):
            found = [curves[run][column] for run in group if column in curves[run]]
            if found:
                queries = max((x for x, _ in found), key=len)  # past its end a run has no value
                values = np.array([np.interp(queries, x, y, right=np.nan) for x, y in found])
                seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
                how = {"color": f"C{n}", "label": label + seeds}
                (lines[label + seeds],) = axis.plot(queries, np.nanmean(values, 0), **how)
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axis.fill_between(queries, low, high, color=f"C{n}", alpha=0.2)
                axis.set_title(TITLES.get(column, column), loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("reward queries")
    labels = [textwrap.fill(label, 85) for label in lines]
    figure.legend(lines.values(), labels, loc="outside lower left", fontsize=9)
    figure.savefig(out, dpi=130)


def main():
    parser = argparse.ArgumentParser("plot.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="of metrics.csv")
    parser.add_argument("--gif", action="store_true", help="the pictures of a run, moving")
    parser.add_argument("--strip", type=int, nargs="+", metavar="N", help="its Nth prompts alone")
    parser.add_argument("--out", help="default: plot.png, or run.gif or strip.png in the run")
    parser.error = lambda message: parser.exit(2, f"plot.py: error: {message}\n")
    args = parser.parse_args()
    if (args.gif or args.strip) and len(args.runs) > 1 or args.gif and args.strip:
        parser.error("--gif and --strip take one run, and one of them is enough")
    for run in args.runs:
        for name in ("metrics.csv", "config.json"):
            if not (run / name).is_file():
                parser.error(f"{run} has no {name}: name the folder of a run")
    out = args.out or (args.runs[0] / "run.gif" if args.gif else "plot.png")
    if args.gif:
        frames = moving(args.runs[0])
        if not frames:
            parser.error(f"{args.runs[0]} has no pictures of evaluations")
        hold = [600] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=hold, loop=0)
    elif args.strip:
        out = args.out or args.runs[0] / "strip.png"
        picture = strips(args.runs[0], args.strip)
        if not picture:
            parser.error(f"{args.runs[0]} has no such pictures of evaluations")
        picture.save(out)
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

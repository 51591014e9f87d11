"""Proves that the two notebooks of exercises are one but for the answers, that each exercise is
short, that its check fails without an answer and for wrong ones, and passes for ours; and where CI
is set, that both run."""

import json
import os
import re
import sys

import pytest
import torch

import ddpo
import rewards

CELLS, SOLVED = [
    json.loads((ddpo.EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    for name in ("exercises", "exercises_solutions")
]
SOURCES, SOLUTIONS = [{cell["id"]: "".join(cell["source"]) for cell in cells}
                      for cells in (CELLS, SOLVED)]
NUMBERS = [name[-2:] for name in SOURCES if name.startswith("answer")]
TRAINED = ["09", "10"]  # those whose checks train the bundled model


def test_the_notebooks_are_one_but_for_the_answers():
    assert list(SOURCES) == list(SOLUTIONS) and len(SOURCES) == len(CELLS)
    differ = [name for name in SOURCES if SOURCES[name] != SOLUTIONS[name]]
    assert differ == [f"answer-{number}" for number in NUMBERS]
    for cell, solved in zip(CELLS, SOLVED):
        assert {**cell, "source": 0} == {**solved, "source": 0}
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_exercises_are_few_and_short_and_begin_alike():
    assert NUMBERS == [f"{i:02}" for i in range(1, len(NUMBERS) + 1)] and len(NUMBERS) <= 12
    order = [name for name in SOURCES if name[-1].isdigit()]
    kinds = ("task", "answer", "check")
    assert order == [f"{kind}-{number}" for number in NUMBERS for kind in kinds]
    for number in NUMBERS:
        head, empty = SOURCES[f"answer-{number}"].rsplit("\n", 1)
        assert empty == f'    raise NotImplementedError("exercise {int(number)}")'
        solution = SOLUTIONS[f"answer-{number}"]
        assert solution.startswith(head)
        assert 5 <= len(solution[len(head):].strip().splitlines()) <= 20


def test_it_calls_what_is_there():
    code = "\n".join(SOLUTIONS.values())
    for module in (ddpo, rewards):
        names = set(re.findall(rf"\b{module.__name__}\.([A-Za-z_]\w*)", code)) - {"py"}
        assert names and [name for name in names if not hasattr(module, name)] == []


def test_elsewhere_the_first_cell_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="git clone"):
        exec(SOURCES["setup-place"], {})


@pytest.fixture(scope="module")
def ready():
    """The names that the first cells define."""
    space = {"display": print}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ddpo.EXAMPLES)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("DDPO_SHORT", "1")
        for name in ("setup-place", "setup-policy"):
            exec(SOURCES[name], space)
    return space


def check(ready, number, answer):
    space = dict(ready)
    exec(answer, space)
    exec(SOURCES[f"check-{number}"], space)


@pytest.mark.parametrize("number", [n for n in NUMBERS if n not in TRAINED])
def test_our_answer_passes_and_none_fails(ready, number, capsys):
    with pytest.raises(NotImplementedError):
        check(ready, number, SOURCES[f"answer-{number}"])
    check(ready, number, SOLUTIONS[f"answer-{number}"])
    assert "right" in capsys.readouterr().out


WRONG = [  # exercise, what our answer says, what a wrong one says
    ("01", ".mean((1, 2, 3))", ".sum((1, 2, 3))"),
    ("01", "-(z**2) / 2", "-(z**2)"),
    ("01", "    std = torch.where(noisy, std, 1.0)", "    pass"),
    ("02", ".detach()", ""),
    ("02", "std * noise", "noise"),
    ("03", "r - baseline(r)", "r"),
    ("03", "/ std**2", "* 0"),
    ("04", "torch.maximum", "torch.minimum"),
    ("04", "-adv * limited", "-adv * ratio"),
    ("04", "~enough", "(ratio - 1).abs() < clip_range"),
    ("05", "dtype=torch.float32", "dtype=torch.int64"),
    ("05", "r.mean()", "rewards.mean()"),
    ("05", "adv[same] =", "adv[:len(r)] ="),
    ("06", "    policy.guidance_scale = before", "    pass"),
    ("06", "policy.guidance_scale = guidance_scale", "pass"),
    ("06", "samples.x[:, j + 1]", "samples.x[:, j]"),
    ("07", ".sum((1, 2, 3))", ".mean((1, 2, 3))"),
    ("07", "/ (2 * std**2)", "/ std**2"),
    ("07", "return exact, estimate", "return exact, exact"),
    ("08", "adv = (r - r.mean())", "adv = -(r - r.mean())"),
    ("08", "/ (r.std() + 1e-6)", "/ r.std()"),
    ("08", "range(epochs)", "range(epochs // 4)"),
    ("08", "mean.clone()", "mean"),
    ("10", "    return -difference - empty", "    return -(difference + empty).mean()"),
    ("10", "    return -difference - empty", "    return images.mean((1, 2, 3))"),
    ("10", "    return -difference - empty", "    return 0 * empty"),
    ("10", "images.flip(3)", "images.sub_(0.1)"),
    ("10", "- empty", "- difference.mean()"),
]


@pytest.mark.parametrize("number, ours, wrong", WRONG)
def test_wrong_answers_fail(ready, number, ours, wrong):
    solution = SOLUTIONS[f"answer-{number}"]
    assert ours in solution
    scale = ready["policy"].guidance_scale
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            check(ready, number, solution.replace(ours, wrong))
    finally:
        ready["policy"].guidance_scale = scale


def test_the_smallest_ddpo_learns_whatever_is_drawn(ready):
    space = dict(ready)
    exec(SOLUTIONS["answer-08"], space)
    target = torch.tensor([2.0, -1.0])

    def steps(x):
        return -((x - target).norm(dim=1) * 4).round() / 4
    for seed in range(20):
        end = space["train"](torch.zeros(2), steps, 60, torch.Generator().manual_seed(seed))
        assert (end - target).norm() < 0.4


@pytest.mark.skipif(not os.environ.get("CI"), reason="a minute: only where CI is set")
@pytest.mark.parametrize("name", ["exercises", "exercises_solutions"])
def test_both_run(name, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("DDPO_SHORT", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its runs go
    notebook = nbformat.read(ddpo.EXAMPLES / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ddpo.EXAMPLES)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=resources, allow_errors=True)
    client.execute()
    failed = {cell["id"]: output["ename"] for cell in notebook.cells
              for output in cell.get("outputs", []) if output["output_type"] == "error"}
    empty = {f"check-{number}": "NotImplementedError" for number in NUMBERS}
    assert failed == (empty if name == "exercises" else {})

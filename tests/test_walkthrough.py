"""Proves that the notebook is short, was stored as it ran from start to end, shows no path of the
machine that ran it, and calls only what ddpo.py has; that its derivation holds, and that its first
cell says what to do outside of a clone; and where CI is set, that it runs."""

import json
import os
import re
import sys

import pytest
import torch

import ddpo
import rewards

NOTEBOOK = ddpo.EXAMPLES / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def test_it_is_short_with_a_text_before_every_code_cell():
    assert 0 < len(CODE) <= 16 and max(len(text.splitlines()) for text in SOURCES) <= 15
    assert NOTEBOOK.stat().st_size < 1_500_000
    kinds = "".join(cell["cell_type"][0] for cell in CELLS)
    assert kinds[0] == "m" and "cc" not in kinds


def test_it_was_run_once_from_start_to_end_without_errors_or_paths():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert {output["output_type"] for output in OUTPUTS} == {"display_data", "stream"}
    assert {output["name"] for output in OUTPUTS if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) >= 9
    for output in OUTPUTS:
        texts = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        shown = json.dumps([output.get("text"), texts])
        assert not re.search(r"/(root|home|tmp|work|Users)\b", shown)
    texts = ["".join(output.get("text", "")) for output in OUTPUTS]
    assert any("ratios: [1.0]\n" in text for text in texts)


def test_it_copies_nothing_and_calls_what_is_there():
    code = "\n".join(SOURCES)
    own = set(re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE))
    for module in (ddpo, rewards):
        names = set(re.findall(rf"\b{module.__name__}\.([A-Za-z_]+)", code)) - {"py"}
        assert names and [name for name in names if not hasattr(module, name)] == []
        assert [name for name in own if hasattr(module, name)] == []


def test_elsewhere_its_first_cell_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Clone the repository(.|\n)*git clone"):
        exec(SOURCES[0], {})
    assert "OWNER" not in "".join(SOURCES)  # no address that is not one
    for place in (ddpo.EXAMPLES, ddpo.EXAMPLES.parent):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "path", [*sys.path])
        exec(SOURCES[0], {})
        assert os.getcwd() == str(ddpo.EXAMPLES.parent) == sys.path[0]


def test_the_derivation_holds_in_its_cell_and_in_its_stored_output(capsys):
    (cell,) = [cell for cell in CODE if "toy_logp" in "".join(cell["source"])]
    exec("".join(cell["source"]), {"torch": torch, "ddpo": ddpo})
    for text in (capsys.readouterr().out, "".join(cell["outputs"][0]["text"])):
        exact = float(re.search(r"exact gradient +([\d.]+)\n", text)[1])
        found = [[*map(float, pair)] for pair in re.findall(r"([\d.]+) \+- ([\d.]+)", text)]
        assert exact == 9 and len(found) == 3
        assert all(abs(value - exact) < 4 * error < 1 for value, error in found)
        (_, noise), (baseline, less), (line, _) = found
        assert less < noise / 2 and line == baseline


@pytest.mark.skipif(not os.environ.get("CI"), reason="half a minute: only where CI is set")
def test_it_runs_in_short(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("DDPO_SHORT", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its runs go
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(ddpo.EXAMPLES.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert len(list(tmp_path.glob("*/*/metrics.csv"))) == 3

"""Proves that the notebook is short, was stored as it ran from start to end, shows no path of the
machine that ran it, and calls only what ddpo.py has; and where CI is set, that it runs."""

import json
import os
import re
from pathlib import Path

import pytest

import ddpo
import rewards

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def source(cell):
    return "".join(cell["source"])


def test_it_is_short():
    assert 0 < len(CODE) <= 14
    assert max(len(source(cell).splitlines()) for cell in CODE) <= 15
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_a_text_comes_before_every_code_cell():
    kinds = [cell["cell_type"] for cell in CELLS]
    before_code = [kinds[i - 1] for i in range(len(kinds)) if kinds[i] == "code"]
    assert kinds[0] == "markdown" and set(before_code) == {"markdown"}


def test_it_was_run_once_from_start_to_end():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]


def test_its_outputs_are_pictures_and_lines_without_errors_or_paths():
    assert {output["output_type"] for output in OUTPUTS} == {"display_data", "stream"}
    assert {output["name"] for output in OUTPUTS if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) >= 9
    for output in OUTPUTS:
        texts = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        shown = json.dumps([output.get("text"), texts])
        assert not re.search(r"/(root|home|tmp|work|Users)\b", shown)


def test_the_stored_ratios_are_exactly_1():
    texts = ["".join(output["text"]) for output in OUTPUTS if "text" in output]
    assert [text for text in texts if "ratios: [1.0]\n" in text]


def test_it_copies_nothing_and_calls_what_is_there():
    code = "\n".join(map(source, CODE))
    for module in (ddpo, rewards):
        names = set(re.findall(rf"\b{module.__name__}\.([A-Za-z_]+)", code)) - {"py"}
        assert names and [name for name in names if not hasattr(module, name)] == []
        own = set(re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE))
        assert [name for name in own if hasattr(module, name)] == []


@pytest.mark.skipif(not os.environ.get("CI"), reason="half a minute: only where CI is set")
def test_it_runs_in_short(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("DDPO_SHORT", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its runs go
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert len(list(tmp_path.glob("*/*/metrics.csv"))) == 2

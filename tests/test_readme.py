"""Proves that the README's links into ddpo.py lead to what they name."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_the_functions_they_name():
    code = (ROOT / "ddpo.py").read_text(encoding="utf-8").splitlines()
    links = re.findall(r"\[`(\w+)`\]\(ddpo\.py#L(\d+)\)", README)
    assert {"ddim_step", "rollout", "PromptStats", "clipped_loss", "update", "train"} <= {name for name, _ in links}
    wrong = [name for name, line in links if not re.match(rf"(def|class) {name}\b", code[int(line) - 1])]
    assert not wrong, f"update the line numbers of {wrong}"


def test_every_file_it_names_is_there():
    paths = re.findall(r"\]\(((?!http)[\w./-]+)(?:#L\d+)?\)", README)
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths), [p for p in paths if not (ROOT / p).exists()]

"""Proves that what the README names is there: files, sections, names in the code, commands, rewards
and columns."""

import dataclasses
import re
import shlex
from pathlib import Path

import ddpo
import rewards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/**/*.py")])


def test_files_and_sections_that_it_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    gone = [link for link in links if link[0] == "#" and link[1:] not in anchors]
    gone += [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert len(links) > 5 and gone == []
    paths = set(re.findall(r"\b(?:examples|tests)/[\w./-]*\w", README))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_names_in_it_are_in_the_code():
    names = set(re.findall(r"`([A-Za-z]\w*_\w+)[`(]", README))
    assert len(names) > 10 and names - set(re.findall(r"\w+", CODE)) == set()


def test_flags_and_commands_in_it_work(monkeypatch):
    """As far as they can be tried without training; a script of the examples has flags of its own,
    and those that name a run are for one that is not here."""
    monkeypatch.chdir(ROOT)
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(ddpo.Settings)}
    known |= {"--no-save-memory", "--step"}  # a file of flags may set the one; of examples/flow.py
    known |= {"--resume", "--help", "--nproc-per-node", *re.findall(r'"(--[a-z][a-z-]+)"', CODE)}
    assert set(re.findall(r"--[a-z][a-z-]*[a-z]", README)) - known == set()
    commands = re.findall(r"python ddpo\.py([^`\n#;|]*)", README)
    tried = [argv for argv in commands if "--resume" not in argv and "--help" not in argv]
    assert len(tried) > 1 and all(ddpo.parse(shlex.split(argv)) for argv in tried)


def test_it_names_every_reward_and_column():
    names = [*rewards.REWARDS, *rewards.MODEL_REWARDS, *ddpo.COLUMNS]
    assert [name for name in names if f"`{name}`" not in README] == []

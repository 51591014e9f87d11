"""Proves that what the README names is there (files, functions, settings, columns), and that it
stays short."""

import dataclasses
import re
from pathlib import Path

import ddpo
import rewards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_that_it_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_sections_that_it_links_to_are_there():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_functions_that_it_names_are_in_the_file():
    """In its account of how the method works, every name in code is a function or class."""
    story = README.split("## How it works")[1].split("From Python")[0]
    names = set(re.findall(r"`([A-Za-z_]+)`", story)) - {"eta"}
    assert len(names) > 10 and [name for name in names if not hasattr(ddpo, name)] == []


def test_flags_that_it_names_exist():
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(ddpo.Settings)}
    of_scripts = {"--resume", "--help", "--arch", "--repeats", "--nproc-per-node", "--gif"}
    of_scripts |= {"--method", "--jobs"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= flags | of_scripts


def test_tables_name_every_reward_and_column():
    for name in {**rewards.REWARDS, **rewards.MODEL_REWARDS}:
        assert f"| `{name}` |" in README
    columns = README.split("The columns of `metrics.csv`")[1]
    assert [column for column in ddpo.COLUMNS if f"`{column}`" not in columns] == []


def test_it_is_read_in_ten_minutes():
    assert len(README.split()) <= 2200

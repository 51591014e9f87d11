"""Files of prompts as other programs have them: refused in one line, not trained on line by line;
and prompts that only look like those. Prompts that a text encoder cannot read whole are counted."""

import io
import json
import zipfile

import pytest
from conftest import launch, make_policy, save_tiny_pixels

import ddpo

ROWS = [{"prompt": "cat", "tag": 1}, {"prompt": "dog", "tag": 2}]


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("prompts.txt", "cat\ndog\n")
    return file.getvalue()


@pytest.mark.parametrize("content", [
    json.dumps(["cat", "dog"]),
    json.dumps(["cat", "dog"], indent=2),
    json.dumps(ROWS),
    json.dumps(ROWS, indent=2),
    json.dumps({"prompts": ["cat", "dog"]}, indent=2),
    "\n".join(map(json.dumps, ROWS)),
    '{ "prompt": "cat" }\n',
    str(["cat", "dog"]),
    "prompt,tag\ncat,1\n",
    "Prompt,Tag\ncat,1\n",
    '"prompt","tag"\n"cat",1\n',
    "prompt\ttag\ncat\t1\n",
    zipped(),
], ids=repr)  # fmt: skip
def test_other_formats_are_refused(content, tmp_path):
    """Whatever the file's name is."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ddpo.UserError, match=rf"prompts {path}: .*text file|{path}: .*plain text"):
        ddpo.load_prompts(str(path))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "A.JSON", "A.CSV"])
def test_other_formats_by_name(name, tmp_path):
    (tmp_path / name).write_text("cat\n")
    with pytest.raises(ddpo.UserError, match="it must be plain text"):
        ddpo.load_prompts(str(tmp_path / name))


@pytest.mark.parametrize("prompt", [
    "[V] dog",
    "[cat:dog:0.5] in a hat",
    "[[blurry]] cat",
    "{red|blue} cat",
    "{{cat}} in a hat",
    '"STOP" on a sign',
    "text, logo, minimal",
    "prompt, of sorts",
    "PKs of the world",
    "cat, dog; bee",
])  # fmt: skip
def test_what_is_a_prompt_stays_one(prompt, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{prompt}\ncat\n")
    assert ddpo.load_prompts(str(tmp_path / "prompts.txt")) == [prompt, "cat"]


LETTERS = "a b c d e f g h i j"  # all that fits between the tokens of begin and end


def test_prompts_that_are_too_long_are_counted_once(tiniest_model, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text(f"cat\n{LETTERS}\n{LETTERS} k\n{LETTERS} l m\n")
    launch(tiniest_model, tmp_path / "run", epochs=1, prompts=path)
    said = capsys.readouterr().out
    line = f"2 prompts are too long and lose their end, the first: {LETTERS + ' k'!r}\n"
    assert said.count("too long") == 1 and line in said


def test_all_that_fits_is_not_counted(tiniest_model, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{LETTERS}\n")
    launch(tiniest_model, tmp_path / "run", epochs=1, prompts=path)
    model = save_tiny_pixels(tmp_path / "pixels")  # reads no prompts
    path.write_text(f"{LETTERS} k\n")
    launch(model, tmp_path / "other", epochs=1, prompts=path, guidance_scale=3.0)
    assert "too long" not in capsys.readouterr().out


def test_words_that_the_bundled_model_cannot_know_are_told(tiniest_model, capsys):
    """If all of them are such. Another model may know anything."""
    policy, _ = make_policy(tiniest_model)
    other = ddpo.Settings(model=str(tiniest_model), steps=2)
    ddpo.check_prompts(policy, ddpo.Settings(), ["a red house", "a blue dog"])
    ddpo.check_prompts(policy, other, ["a house"])
    assert capsys.readouterr().out == ""
    ddpo.check_prompts(policy, ddpo.Settings(), ["a house", "a moon"])
    said = capsys.readouterr().out
    assert said == "the bundled model knows the words of examples/prompts/animals.txt alone\n"

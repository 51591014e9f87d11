"""Proves that each reward is what it says: the JPEG's size is the file's, CLIP scores are CLIP's logits, the aesthetic head is
the network it was trained as, BERTScore is the bert-score package's, a judge's Yes and No are the tokens that its template
asks for. All of them, loaded from tiny checkpoints, give an image the same score alone and in any batch. And that a mix is
read as written, or refused in one line that says where and why."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPModel

import rewards

PROMPTS = ["cat", "a big dog playing chess", "zebra", "a cat", "a very long story about a fox"]  # the last exceeds 12 tokens


def some_images():
    """Flat, a ramp, noise: ever harder to compress."""
    flat, ramp = torch.full((3, 32, 32), 0.5), torch.linspace(0, 1, 32).expand(3, 32, 32)
    return torch.stack([flat, ramp, torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))])


def noisy_images():
    return torch.rand(len(PROMPTS), 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder of tiny checkpoints."""
    hub = tmp_path_factory.mktemp("hub")
    tiny_models.save_clip(hub / "clip")
    tiny_models.save_laion_head(hub / "head" / "model.safetensors")
    tiny_models.save_laion_head(hub / "old-head" / "aesthetic-model.pth")
    tiny_models.save_llava(hub / "llava")
    tiny_models.save_llava(hub / "lined-llava", chat=tiny_models.LINED)
    tiny_models.save_idefics3(hub / "idefics3")
    tiny_models.save_deberta(hub / "deberta")
    return hub


def load(text, **options):
    """The function of a mix that is one term."""
    ((_, _, function),) = rewards.load_rewards(text, **options)
    return function


def refusal(text, **options):
    """The message with which load_rewards refuses a mix; it is one line and says which flag it is about."""
    with pytest.raises(rewards.UserError) as error:
        rewards.load_rewards(text, **options)
    assert str(error.value).startswith("--reward ") and "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- the size of a file


def test_size_is_that_of_the_file_in_kilobytes_of_1000(tmp_path):
    images, sizes = some_images(), []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    got = rewards.incompressibility(images, ["cat"] * 3)
    assert got.tolist() == pytest.approx(sizes, abs=1e-6)
    assert torch.equal(rewards.compressibility(images, ["cat"] * 3), -got)
    assert got[0] < got[1] < got[2]


@pytest.mark.parametrize("off", [-1e-3, 0.0, 1e-3])
def test_pixels_are_rounded_not_cut_off(off):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (image,) = rewards.to_pil(levels / 255 + off)  # 0.999 is white; below 0 and above 1 stay black and white
    assert [p[0] for p in zip(*[iter(image.tobytes())] * 3)] == list(range(256))


def test_colours_and_sides_are_not_swapped():
    image = torch.zeros(1, 3, 4, 6)  # 4 high, 6 wide
    image[0, 0, 1, 5] = 1.0
    (pil,) = rewards.to_pil(image)
    assert pil.size == (6, 4) and pil.getpixel((5, 1)) == (255, 0, 0) and pil.getpixel((1, 1)) == (0, 0, 0)


# ---------------------------------------------------------------- every reward


@pytest.mark.parametrize("mix", [
    "compressibility", "incompressibility", "clipscore(HUB/clip)", "pickscore(HUB/clip, HUB/clip)",
    "aesthetic(HUB/clip, HUB/head)", "vqa(HUB/llava)", "vqa(HUB/idefics3)", "alignment(HUB/llava, HUB/deberta, 2)",
])  # fmt: skip
def test_an_image_scores_the_same_alone_and_in_any_batch(hub, mix):
    mix, images, order = mix.replace("HUB", str(hub)), noisy_images(), [2, 0, 4, 1, 3]
    ((label, weight, reward),) = rewards.load_rewards(mix, batch_size=8)
    together = reward(images, PROMPTS)
    assert (label, weight) == (mix, 1.0)
    assert together.shape == (5,) and together.dtype == torch.float32 and not together.requires_grad
    assert together.std() > 1e-3  # else the rest would prove nothing
    assert torch.allclose(reward(images[order], [PROMPTS[i] for i in order]), together[order], atol=1e-5)
    in_twos = load(mix, batch_size=2)
    assert torch.allclose(in_twos(images, PROMPTS), together, atol=1e-5)
    assert torch.allclose(torch.cat([in_twos(i[None], [p]) for i, p in zip(images, PROMPTS)]), together, atol=1e-5)


def test_models_are_frozen_and_in_float32_on_the_cpu(hub, tmp_path):
    CLIPModel.from_pretrained(hub / "clip").half().save_pretrained(tmp_path)
    net = rewards.load_model(AutoModel, tmp_path, "cpu")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("saved, used", [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_models_are_in_half_precision_on_cuda(hub, tmp_path, saved, used):
    CLIPModel.from_pretrained(hub / "clip").to(getattr(torch, saved)).save_pretrained(tmp_path)
    assert rewards.load_model(AutoModel, tmp_path, "cuda").dtype == getattr(torch, used)
    on_cpu, on_cuda = (load(f"clipscore({hub / 'clip'})", device=device)(noisy_images(), PROMPTS) for device in ("cpu", "cuda"))
    assert on_cuda.device.type == "cpu" and torch.allclose(on_cpu, on_cuda, atol=0.02)


# ---------------------------------------------------------------- CLIP and the aesthetic head


def clip_reference(hub, images, prompts):
    """What CLIPModel itself makes of images and prompts."""
    prepare = AutoProcessor.from_pretrained(hub / "clip")
    texts = {"text": prompts, "padding": True, "truncation": True, "max_length": 12}
    with torch.no_grad():
        net = CLIPModel.from_pretrained(hub / "clip").eval()
        return net(**prepare(images=rewards.to_pil(images), return_tensors="pt", **texts))


def test_clip_rewards_are_the_models_own_logits(hub):
    images = noisy_images()
    logits = clip_reference(hub, images, PROMPTS).logits_per_image.diag()
    assert torch.allclose(load(f"pickscore({hub / 'clip'}, {hub / 'clip'})")(images, PROMPTS), logits, atol=1e-5)
    assert torch.allclose(load(f"clipscore({hub / 'clip'})")(images, PROMPTS), logits / torch.tensor(2.0).exp(), atol=1e-6)


@pytest.mark.parametrize("head", ["head", "head/model.safetensors", "old-head", "old-head/aesthetic-model.pth"])
def test_aesthetic_head_is_the_network_that_was_trained(hub, head):
    sizes = [(8, 12), (12, 10), (10, 6), (6, 4), (4, 1)]
    linear = [nn.Linear(*size) for size in sizes]
    trained = nn.Sequential(linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), *linear[3:])
    trained.load_state_dict({key.removeprefix("layers."): value for key, value in tiny_models.laion_layers().items()})
    images = noisy_images()
    embeds = clip_reference(hub, images, PROMPTS).image_embeds  # CLIPModel returns them at unit length
    with torch.no_grad():
        expected = trained.eval()(embeds).flatten()
    got = load(f"aesthetic({hub / 'clip'}, {hub / head})")(images, ["any"] * 5)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_safetensors_are_preferred_to_a_pickle_and_no_pickle_runs_code(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "a.pth")
    message = refusal(f"aesthetic({hub / 'clip'}, {tmp_path})")
    assert f"cannot load {tmp_path / 'a.pth'}" in message and not (tmp_path / "executed").exists()
    tiny_models.save_laion_head(tmp_path / "b.safetensors")
    assert load(f"aesthetic({hub / 'clip'}, {tmp_path})")(noisy_images(), PROMPTS).shape == (5,)


# ---------------------------------------------------------------- vision-language models


def question(chat, text):
    """The question as the template lays it out, written by hand."""
    return f"USER:<image> {text}\nASSISTANT:" if chat == "spaced" else f"<s>user\n<image>{text}</s>\nassistant\n"


def open_vlm(path):
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@pytest.mark.parametrize("name, chat, yes, no", [("llava", "spaced", "ĠYes", "ĠNo"), ("idefics3", "spaced", "ĠYes", "ĠNo"),
                                                 ("lined-llava", "lined", "Yes", "No")])  # fmt: skip
def test_judge_gives_the_probability_of_yes_against_no(hub, name, chat, yes, no):
    net, prepare = open_vlm(hub / name)
    yes, no, expected = prepare.tokenizer.get_vocab()[yes], prepare.tokenizer.get_vocab()[no], []
    for image, prompt in zip(rewards.to_pil(noisy_images()), PROMPTS):
        text = question(chat, f'Does this figure show "{prompt}"? Please answer Yes or No.').removeprefix("<s>")
        inputs = prepare(images=[image], text=[text], return_tensors="pt")
        assert inputs["input_ids"][0].tolist().count(1) == 1  # <s>
        with torch.no_grad():
            p = net(**inputs).logits[0, -1].softmax(-1)
        expected.append(p[yes] / (p[yes] + p[no]))
    got = load(f"vqa({hub / name})")(noisy_images(), PROMPTS)
    assert torch.allclose(got, torch.stack(expected), atol=1e-5)


def greedy_answer(net, prepare, image, text):
    """An answer of at most 64 tokens, one forward pass over everything for each."""
    inputs = prepare(images=[image], text=[text], return_tensors="pt")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    start = ids.shape[1]
    while ids.shape[1] < start + 64 and ids[0, -1] != 2:  # </s>
        with torch.no_grad():
            logits = net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return prepare.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_alignment_recalls_the_prompt_in_the_greedy_answer(hub):
    net, prepare = open_vlm(hub / "llava")
    text = question("spaced", "Answer concisely: what is going on in this image?")
    answers = [greedy_answer(net, prepare, image, text) for image in rewards.to_pil(noisy_images())]
    assert len(set(answers)) == 5
    recall = rewards.load_bertscore(hub / "deberta", 2, "cpu")
    with torch.no_grad():
        expected = recall(answers, [f"The image contains {prompt}" for prompt in PROMPTS])
    got = load(f"alignment({hub / 'llava'}, {hub / 'deberta'}, 2)")(noisy_images(), PROMPTS)
    assert torch.allclose(got, expected, atol=1e-5)


ANSWERS = ["a dog on a mat", "The image contains a dog", "x", " The [SEP] image, twice: [SEP] image\n", "long " * 60, "une télé"]
REFERENCES = [f"The image contains {p}" for p in ("a dog", "a dog", "a zebra", "a [SEP] b", "a long bike ride", "é")]


@pytest.mark.parametrize("layer", [1, 3])
def test_recall_is_that_of_the_bert_score_package(hub, layer):
    package = pytest.importorskip("bert_score")
    # One pair at a time: where the package pads, the zeros in the padding take part in the matching and beat what is negative.
    options = {"model_type": str(hub / "deberta"), "num_layers": layer, "device": "cpu", "batch_size": 1}
    expected = package.score(ANSWERS, REFERENCES, **options)[1]
    recall = rewards.load_bertscore(hub / "deberta", layer, "cpu")
    with torch.no_grad():
        assert torch.allclose(recall(ANSWERS, REFERENCES), expected, atol=1e-5)
        alone = torch.cat([recall([answer], [reference]) for answer, reference in zip(ANSWERS, REFERENCES)])
    assert torch.allclose(alone, expected, atol=1e-5)
    assert expected[1] > 0.999 and expected.std() > 1e-3


def test_an_empty_answer_recalls_nothing(hub):
    with torch.no_grad():
        got = rewards.load_bertscore(hub / "deberta", 2, "cpu")(["", " \n", "The"], REFERENCES[:3])
    assert got[:2].tolist() == [0, 0] and got[2] > 0


def test_a_judge_that_cannot_tell_yes_from_no_is_refused(tmp_path):
    letters = {"words": ("figure",), "special": ["Ġ"]}  # so that " Yes" and " No" both begin with a bare space
    assert "begins Yes and No with the same token" in refusal(f"vqa({tiny_models.save_llava(tmp_path / 'letters', **letters)})")
    forgetful = "{% for turn in messages %}{{ turn.role }}<image>{% endfor %}{{ 'say:' if add_generation_prompt }}"
    assert "chat template that does not" in refusal(f"vqa({tiny_models.save_llava(tmp_path / 'forgetful', chat=forgetful)})")


# ---------------------------------------------------------------- what does not load


def test_missing_files_are_named_with_the_way_to_name_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True, raising=False)  # transformers 4 keeps its own
    message = refusal("aesthetic")
    assert message.startswith("--reward aesthetic: cannot load openai/clip-vit-large-patch14 (")
    assert message.endswith('other models or local folders: "aesthetic(CLIP, HEAD)"')
    assert "cannot load ttj/sac-logos-ava1-l14-linearMSE (" in refusal(f"aesthetic({hub / 'clip'})")
    assert f"cannot load {tmp_path} (no .safetensors, .pth" in refusal(f"aesthetic({hub / 'clip'}, {tmp_path})")
    assert f"cannot load {tmp_path} (" in refusal(f"vqa({tmp_path})")


def test_missing_weights_are_not_made_up(hub, tmp_path):
    shutil.copytree(hub / "clip", tmp_path / "clip")
    weights = load_file(hub / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are not in it, such as visual_projection.weight" in refusal(f"clipscore({tmp_path / 'clip'})")
    layers = tiny_models.laion_layers()
    del layers["layers.4.weight"]
    save_file(layers, tmp_path / "head.safetensors")
    assert "as LAION's head ('layers.4.weight')" in refusal(f"aesthetic({hub / 'clip'}, {tmp_path / 'head.safetensors'})")


def test_a_librarys_own_explanation_is_kept():
    """transformers explains what an HTTP error means; torch.save hides that the disk is full."""
    for cause, error, reason in [(OSError("404"), OSError("no such model"), "no such model"),
                                 (OSError("disk full"), RuntimeError("pos 0"), "disk full"),
                                 (KeyError("x"), RuntimeError("y"), "y")]:  # fmt: skip
        with pytest.raises(rewards.UserError, match=f"^mistake \\({reason}\\)$"), rewards.explained("mistake"):
            try:
                raise cause
            except Exception:
                raise error


def test_models_that_do_not_fit_are_refused_before_sampling(hub, tmp_path):
    head = tiny_models.save_laion_head(tmp_path / "wide.safetensors", dim=9)
    assert "RuntimeError" in refusal(f"aesthetic({hub / 'clip'}, {head})")
    assert "has hidden layers 0 to 3, not 40" in refusal(f"alignment({hub / 'llava'}, {hub / 'deberta'})")
    assert "AttributeError" in refusal(f"clipscore({hub / 'deberta'})")
    weights = load_file(hub / "head" / "model.safetensors")
    weights["layers.7.bias"][:] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    assert "gives a grey image nan" in refusal(f"aesthetic({hub / 'clip'}, {tmp_path / 'nan.safetensors'})")


# ---------------------------------------------------------------- mixes


@pytest.mark.parametrize("text, terms", [
    ("pickscore", [(1.0, "pickscore", ())]),
    ("pickscore + 0.1*compressibility", [(1.0, "pickscore", ()), (0.1, "compressibility", ())]),
    (" -2 * a - .5*b+1e-3*c ", [(-2.0, "a", ()), (-0.5, "b", ()), (0.001, "c", ())]),
    ("a-b - c-2.py:d_e", [(1.0, "a-b", ()), (-1.0, "c-2.py:d_e", ())]),
    ("f(./x-y/z.pt, hub/name-1.5)-g", [(1.0, "f", ("./x-y/z.pt", "hub/name-1.5")), (-1.0, "g", ())]),
    ("+ 1.E+1*~/my.py:f + 2*p.q:f(a b)", [(10.0, "~/my.py:f", ()), (2.0, "p.q:f", ("a b",))]),
])  # fmt: skip
def test_a_mix_is_read_as_written(text, terms):
    assert rewards.parse_mix(text) == terms


@pytest.mark.parametrize("text, rest", [
    ("", ""), ("a +", "+"), ("a + + b", "+ + b"), ("2", "2"), ("a + 2* ", "+ 2*"), ("1_0*a", "1_0*a"), ("a  b", "a  b"),
    ("b - a*2", "- a*2"), ("nan*a", "nan*a"), ("a(b) c", "a(b) c"), ("a()", "a()"), ("a(b, )", "a(b, )"), ("a(b(c))", "a(b(c))"),
    ("a + b(c", "+ b(c"), ("1e999*a", "1e999*a"), ("a,b", "a,b"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_place(text, rest):
    message = f"cannot read {rest!r}; write NAME, 0.1*NAME or NAME(FOLDER, FILE), with + or - between them"
    assert refusal(text) == f"--reward {text!r}: {message}"
    if text and "," not in text:
        with pytest.raises(rewards.UserError, match=re.escape(f"--monitor {text!r}: cannot read {rest!r}")):
            rewards.load_rewards("compressibility", text)


def test_names_and_arguments_are_checked_before_any_model_is_loaded(monkeypatch):
    loaded = []

    def slow(model="a/b", *, device, batch_size):
        loaded.append((model, device, batch_size))
        return lambda images, prompts: images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.MODEL_REWARDS, "slow", slow)
    assert re.search("^--reward beauty: .*compressibility, incompressibility, .*slow.*file.py:function", refusal("slow + beauty"))
    assert refusal("slow + slow(a, b)") == "--reward slow(a, b): too many arguments; what works is slow(MODEL)"
    assert refusal("slow - compressibility(x)").endswith("too many arguments; what works is compressibility")
    assert "no file nowhere.py" in refusal("slow + nowhere.py:f")
    assert refusal("slow + 2*slow").startswith("--reward slow: two terms have this name")
    assert refusal("slow", monitors="slow").startswith("--reward slow: two terms have this name")
    assert not loaded
    mix = rewards.load_rewards("slow + 0.5*slow( c/d )-compressibility", device="cpu", batch_size=3)
    assert [(label, weight) for label, weight, _ in mix] == [("slow", 1.0), ("slow(c/d)", 0.5), ("compressibility", -1.0)]
    assert loaded == [("a/b", "cpu", 3), ("c/d", "cpu", 3)] and mix[2][2] is rewards.compressibility
    logged = rewards.load_rewards("slow", "2*slow(c/d), compressibility")  # monitors weigh nothing
    assert [(label, weight) for label, weight, _ in logged] == [("slow", 1.0), ("slow(c/d)", 0.0), ("compressibility", 0.0)]


# ---------------------------------------------------------------- a reward of one's own

MINE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass  # needs its module in sys.modules
class Box:
    size: int

def redness(images, prompts):
    return images[:, 0].mean((1, 2)) * Box(2).size

constant = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """my-own.py in the working directory, and the same as the module package.mine."""
    (tmp_path / "my-own.py").write_text(MINE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_function_of_a_file_or_a_module_is_a_reward(mine):
    for name in ("my-own.py:redness", f"{mine}/my-own.py:redness", "package.mine:redness"):
        ((label, weight, reward),) = rewards.load_rewards(f"-0.5*{name}")
        assert (label, weight) == ("redness", -0.5)
        assert torch.allclose(reward(some_images(), ["a"] * 3), 2 * some_images()[:, 0].mean((1, 2)))
    assert "two terms have this name" in refusal("my-own.py:redness + package.mine:redness")


def test_the_example_scores_red_as_it_says():
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 8, 8)  # red, green, blue
    redness = load(f"{Path(rewards.__file__).parent / 'examples' / 'my_reward.py'}:redness")
    assert redness(colours, ["any"] * 3).tolist() == [1.0, -0.5, -0.5]


def test_mistakes_in_a_file_of_ones_own_are_named_with_their_line(mine):
    assert refusal("gone.py:f") == "--reward gone.py:f: there is no file gone.py"
    assert refusal("package.gone:f").endswith("package.gone: ModuleNotFoundError: No module named 'package.gone'")
    assert refusal("my-own.py:blueness").endswith("my-own.py has no function 'blueness'; it has redness")
    assert refusal("package.mine:constant").endswith("package.mine has no function 'constant'; it has redness")
    assert refusal("my-own.py:redness(3)").endswith("too many arguments; what works is my-own.py:redness")
    (mine / "broken.py").write_text("import json\n\ndef f():\n    json.loads('{')\n\nf()\n")
    assert "broken.py, line 4: JSONDecodeError: " in refusal("broken.py:f")
    (mine / "package" / "broken.py").write_text("import nowhere_to_be_found\n")
    assert refusal("package.broken:f").endswith("line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'")
    (mine / "quits.py").write_text("raise SystemExit('usage: ...')\n")
    assert refusal("quits.py:f").endswith("quits.py, line 1: SystemExit: usage: ...")
    (mine / "unclosed.py").write_text("x = 1\ny = (\n")
    assert re.search("unclosed.py: SyntaxError: .*line 2", refusal("unclosed.py:f"))

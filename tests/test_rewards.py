"""Proves that each reward is what it says: the JPEG's size is the file's, CLIP scores are CLIP's
logits, the aesthetic head is the network it was trained as, BERTScore is the bert-score package's,
a judge's Yes and No are the tokens that its template asks for. All of them, loaded from tiny
checkpoints, give an image the same score alone and in any batch. And that a mix is read as written,
or refused in one line that says where and why."""

import functools
import operator
import re
import shutil
import traceback
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

# The last one exceeds the 12 tokens that the tiny CLIP reads.
PROMPTS = ["cat", "a big dog playing chess", "zebra", "a cat", "a very long story about a fox"]


IMAGES = torch.rand(len(PROMPTS), 3, 24, 24, generator=torch.Generator().manual_seed(1))


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


def load(mix, **options):
    """The function of a mix that is one term."""
    ((_, _, function),) = rewards.load_rewards(mix, **options)
    return function


def refusal(mix, monitors="", flag="--reward"):
    """The message with which load_rewards refuses; it is one line that begins with the flag."""
    with pytest.raises(rewards.UserError) as error:
        rewards.load_rewards(mix, monitors)
    message = str(error.value)
    assert message.startswith(f"{flag} ") and "\n" not in message and not error.value.__cause__
    return message


# ------------------------------------------------ the size of a file


def test_size_is_that_of_the_file_in_kilobytes_of_1000(tmp_path):
    flat = torch.full((3, 32, 32), 0.5)
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.stack([flat, ramp, noise])
    sizes = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    got = rewards.incompressibility(images, ["cat"] * 3)
    assert got.tolist() == pytest.approx(sizes, abs=1e-6)
    assert torch.equal(rewards.compressibility(images, ["cat"] * 3), -got)
    assert got[0] < got[1] < got[2]


def test_pixels_are_rounded_not_cut_off_and_colours_and_sides_are_not_swapped():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for off in (-1e-3, 0.0, 1e-3):  # 0.999 is white; below 0 and above 1 stay black and white
        (image,) = rewards.to_pil(levels / 255 + off)
        assert [p[0] for p in zip(*[iter(image.tobytes())] * 3)] == list(range(256))
    half = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    for image, again in zip(rewards.to_pil(half), rewards.to_pil(half.float())):
        assert image.tobytes() == again.tobytes()

    image = torch.zeros(1, 3, 4, 6)  # 4 high, 6 wide
    image[0, 0, 1, 5] = 1.0
    (pil,) = rewards.to_pil(image)
    assert pil.size == (6, 4)
    assert pil.getpixel((5, 1)) == (255, 0, 0) and pil.getpixel((1, 1)) == (0, 0, 0)


# ------------------------------------------------ every reward

MIXES = ["compressibility", "incompressibility", "clipscore(HUB/clip)",
         "pickscore(HUB/clip, HUB/clip)", "aesthetic(HUB/clip, HUB/head)", "vqa(HUB/llava)",
         "vqa(HUB/idefics3)", "alignment(HUB/llava, HUB/deberta, 2)"]


@pytest.mark.parametrize("mix", MIXES)
def test_an_image_scores_the_same_alone_and_in_any_batch(hub, mix):
    mix = mix.replace("HUB", str(hub))
    order = [2, 0, 4, 1, 3]
    alone = 2 if mix.startswith("alignment") else 5  # as its answers are long
    ((label, weight, reward),) = rewards.load_rewards(mix)
    together = reward(IMAGES, PROMPTS)
    assert (label, weight) == (mix, 1.0)
    assert together.shape == (5,) and together.dtype == torch.float32
    assert not together.requires_grad
    assert together.std() > 1e-3  # else the rest would prove nothing
    shuffled = reward(IMAGES[order], [PROMPTS[i] for i in order])
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    for i in range(alone):
        assert torch.allclose(reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]), together[i], atol=1e-5)


def test_models_are_in_float32_on_the_cpu_and_without_dropout(hub, tmp_path):
    CLIPModel.from_pretrained(hub / "clip").half().save_pretrained(tmp_path)
    net = rewards.load_model(AutoModel, tmp_path, "cpu")
    assert {p.dtype for p in net.parameters()} == {torch.float32} and not net.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "saved, used", [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_models_are_in_half_precision_on_cuda(hub, tmp_path, saved, used):
    CLIPModel.from_pretrained(hub / "clip").to(getattr(torch, saved)).save_pretrained(tmp_path)
    net = rewards.load_model(AutoModel, tmp_path, "cuda")
    assert net.dtype == getattr(torch, used) and net.device.type == "cuda"
    mix = f"clipscore({hub / 'clip'})"
    on_cpu = load(mix)(IMAGES, PROMPTS)
    on_cuda = load(mix, device="cuda")(IMAGES.cuda(), PROMPTS).cpu()
    assert torch.allclose(on_cpu, on_cuda, atol=0.02)


def test_libraries_are_silent_but_for_downloads(monkeypatch):
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity_info()
    huggingface_hub.utils.logging.set_verbosity_info()
    rewards.load_rewards("compressibility")
    silent = transformers.logging.ERROR
    assert transformers.utils.logging.get_verbosity() == silent
    assert huggingface_hub.utils.logging.get_verbosity() == silent
    assert not transformers.utils.logging.is_progress_bar_enabled()
    assert not huggingface_hub.utils.are_progress_bars_disabled()


# ------------------------------------------------ CLIP and the aesthetic head


def clip_reference(hub):
    """What CLIPModel itself makes of images and prompts; its embeddings have unit length."""
    prepare = AutoProcessor.from_pretrained(hub / "clip")
    texts = {"text": PROMPTS, "padding": True, "truncation": True, "max_length": 12}
    with torch.no_grad():
        net = CLIPModel.from_pretrained(hub / "clip").eval()
        return net(**prepare(images=rewards.to_pil(IMAGES), return_tensors="pt", **texts))


def test_clip_rewards_are_the_models_own_logits(hub):
    reference = clip_reference(hub)
    logits = reference.logits_per_image.diag()
    picked = load(f"pickscore({hub / 'clip'}, {hub / 'clip'})")(IMAGES, PROMPTS)
    assert torch.allclose(picked, logits, atol=1e-5)
    cosine = load(f"clipscore({hub / 'clip'})")(IMAGES, PROMPTS)
    assert torch.allclose(cosine, logits / torch.tensor(2.0).exp(), atol=1e-6)
    see, read, scale = rewards.load_clip(hub / "clip", hub / "clip", "cpu")  # for one's own
    with torch.no_grad():
        assert torch.allclose(see(rewards.to_pil(IMAGES)), reference.image_embeds, atol=1e-6)
        assert torch.allclose(read(PROMPTS), reference.text_embeds, atol=1e-6)
    assert scale.item() == pytest.approx(torch.tensor(2.0).exp().item())


def trained_head():
    """The aesthetic head as it was trained: with dropout between its linear layers."""
    linear = [nn.Linear(*size) for size in [(8, 12), (12, 10), (10, 6), (6, 4), (4, 1)]]
    dropout = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
    net = nn.Sequential(*[layer for pair in zip(linear, dropout) for layer in pair], *linear[3:])
    layers = tiny_models.laion_layers()
    net.load_state_dict({key.removeprefix("layers."): value for key, value in layers.items()})
    return net.eval()


@pytest.mark.parametrize("head", ["head", "head/model.safetensors", "old-head"])
def test_aesthetic_head_is_the_network_that_was_trained(hub, head):
    with torch.no_grad():
        expected = trained_head()(clip_reference(hub).image_embeds).flatten()
    got = load(f"aesthetic({hub / 'clip'}, {hub / head})")(IMAGES, ["any"] * 5)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_no_file_comes_from_the_hub(hub, monkeypatch):
    fetched = []

    def download(name):
        fetched.append(name)
        return str(hub / "head")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = load(f"aesthetic({hub / 'clip'}, some/head)")(IMAGES, PROMPTS)
    local = load(f"aesthetic({hub / 'clip'}, {hub / 'head'})")(IMAGES, PROMPTS)
    assert torch.equal(got, local) and fetched == ["some/head"]


def test_safetensors_are_preferred_to_a_pickle_and_no_pickle_runs_code(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "a.pth")
    mix = f"aesthetic({hub / 'clip'}, {tmp_path})"
    assert "Weights only load failed" in refusal(mix) and not (tmp_path / "executed").exists()
    tiny_models.save_laion_head(tmp_path / "b.safetensors")
    assert load(mix)(IMAGES, PROMPTS).shape == (5,)


# ------------------------------------------------ vision-language models


def question(chat, text):
    """The question as the template lays it out, written by hand."""
    if chat == "spaced":
        return f"USER:<image> {text}\nASSISTANT:"
    return f"<s>user\n<image>{text}</s>\nassistant\n"


def open_vlm(path):
    net = AutoModelForImageTextToText.from_pretrained(path).eval()
    return net, AutoProcessor.from_pretrained(path)


JUDGES = [
    ("llava", "spaced", "ĠYes", "ĠNo"),
    ("idefics3", "spaced", "ĠYes", "ĠNo"),
    ("lined-llava", "lined", "Yes", "No"),
]


@pytest.mark.parametrize("name, chat, yes, no", JUDGES)
def test_judge_gives_the_probability_of_yes_against_no(hub, name, chat, yes, no):
    net, prepare = open_vlm(hub / name)
    vocab = prepare.tokenizer.get_vocab()
    expected = []
    for image, prompt in zip(rewards.to_pil(IMAGES), PROMPTS):
        text = question(chat, f'Does this figure show "{prompt}"? Please answer Yes or No.')
        inputs = prepare(images=[image], text=[text.removeprefix("<s>")], return_tensors="pt")
        assert inputs["input_ids"][0].tolist().count(1) == 1  # <s>
        with torch.no_grad():
            p = net(**inputs).logits[0, -1].softmax(-1)
        expected.append(p[vocab[yes]] / (p[vocab[yes]] + p[vocab[no]]))
    got = load(f"vqa({hub / name})")(IMAGES, PROMPTS)
    assert torch.allclose(got, torch.stack(expected), atol=1e-5)


def recall(hub, monkeypatch, answers, prompts, layer):
    """The reward `alignment` of prompts whose images a model describes by these answers."""

    def ask(images, questions, most):
        assert set(questions) == {"Answer concisely: what is going on in this image?"}
        assert most == 64
        return answers[: len(questions)], None

    monkeypatch.setattr(rewards, "load_vlm", lambda vlm, device: (ask, None))
    reward = load(f"alignment(any, {hub / 'deberta'}, {layer})")
    return reward(torch.zeros(len(prompts), 3, 8, 8), prompts)


def test_alignment_recalls_the_prompt_in_the_greedy_answer(hub, monkeypatch):
    net, prepare = open_vlm(hub / "llava")
    text = question("spaced", "Answer concisely: what is going on in this image?")
    answers = []
    for image in rewards.to_pil(IMAGES[:3]):
        inputs = prepare(images=[image], text=[text], return_tensors="pt")
        ids = net.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
        answer = ids[inputs["input_ids"].shape[1] :]
        answers.append(prepare.tokenizer.decode(answer, skip_special_tokens=True))
    assert len(set(answers)) == 3
    got = load(f"alignment({hub / 'llava'}, {hub / 'deberta'}, 2)")(IMAGES[:3], PROMPTS[:3])
    expected = recall(hub, monkeypatch, answers, PROMPTS[:3], layer=2)
    assert torch.allclose(got, expected, atol=1e-5)


ANSWERS = ["a dog on a mat", "The image contains a dog", "x",
           " The [SEP] image, twice: [SEP] image\n", "long " * 60, "une télé"]
DESCRIBED = ["a dog", "a dog", "a zebra", "a small b", "a long bike ride", "é"]


@pytest.mark.parametrize("layer", [1, 3])
def test_recall_is_that_of_the_bert_score_package(hub, monkeypatch, layer):
    package = pytest.importorskip("bert_score")
    # One pair at a time: where the package pads, the zeros in the padding take part in the matching
    # and beat what is negative.
    options = {"num_layers": layer, "device": "cpu", "batch_size": 1}
    references = [f"The image contains {prompt}" for prompt in DESCRIBED]
    scores = package.score(ANSWERS, references, model_type=str(hub / "deberta"), **options)
    expected = scores[1]
    got = recall(hub, monkeypatch, ANSWERS, DESCRIBED, layer)
    assert torch.allclose(got, expected, atol=1e-5)
    assert expected[1] > 0.999 and expected.std() > 1e-3


def test_an_empty_answer_recalls_nothing(hub, monkeypatch):
    got = recall(hub, monkeypatch, ["", " \n", "The"], DESCRIBED[:3], layer=2)
    assert got[:2].tolist() == [0, 0] and got[2] > 0


def test_a_judge_that_cannot_tell_yes_from_no_is_refused(tmp_path):
    # Of these letters, " Yes" and " No" both begin with a bare space.
    letters = {"words": ("figure",), "special": ["Ġ"]}
    path = tiny_models.save_llava(tmp_path / "letters", **letters)
    assert f"{path} begins Yes and No with the same token" in refusal(f"vqa({path})")
    # This template leaves the answer out.
    forgetful = "{% for m in messages %}<image>{% endfor %}{{ 'say' if add_generation_prompt }}"
    path = tiny_models.save_llava(tmp_path / "forgetful", chat=forgetful)
    assert refusal(f"vqa({path})").startswith(f"--reward vqa({path}) does not load")


# ------------------------------------------------ what does not load


def test_what_cannot_be_fetched_is_named_with_the_way_to_name_others(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # transformers 4 keeps its own
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True, raising=False)
    hint = "does not load; other models or local folders: "
    message = refusal("0.5*aesthetic")
    assert re.search("outgoing traffic has been disabled|couldn't connect", message)
    clip = hub / "clip"
    for term in ("0.5*aesthetic", f"aesthetic({clip})", f"aesthetic({clip}, {tmp_path})"):
        assert refusal(term).startswith(f'--reward {term} {hint}"aesthetic(CLIP, HEAD)" (')
    term = f"vqa({tmp_path})"
    message = refusal("compressibility", term, flag="--monitor")
    assert message.startswith(f'--monitor {term} {hint}"vqa(VLM)" (')


def test_missing_weights_are_not_made_up(hub, tmp_path):
    shutil.copytree(hub / "clip", tmp_path / "clip")
    weights = load_file(hub / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    message = refusal(f"clipscore({tmp_path / 'clip'})")
    assert re.search(r"clip lacks weights: .'visual_projection.weight'", message)


def test_models_that_do_not_fit_are_refused_before_sampling(hub, tmp_path):
    def with_head(layers):
        save_file(layers, tmp_path / "head.safetensors")
        return refusal(f"aesthetic({hub / 'clip'}, {tmp_path / 'head.safetensors'})")

    layers = tiny_models.laion_layers()
    assert "size mismatch" in with_head(tiny_models.laion_layers(dim=9))
    assert "NaN" in with_head({**layers, "layers.7.bias": torch.tensor([torch.nan])})
    del layers["layers.4.weight"]
    assert with_head(layers).endswith("('layers.4.weight')")
    assert "index out of range" in refusal(f"alignment({hub / 'llava'}, {hub / 'deberta'})")
    assert "has no attribute" in refusal(f"clipscore({hub / 'deberta'})")


# ------------------------------------------------ explained


class HubError(OSError):
    """As huggingface_hub's, which have the answer."""

    response = "404"


REASONS = [
    (ValueError("bad value"), None, "bad value"),
    (RuntimeError("unexpected pos"), OSError("disk full"), "disk full"),  # as torch.save
    (OSError("no file named x"), FileNotFoundError("no way\n to y"), "no way to y"),
    (OSError("no such model"), HubError("404 Client Error"), "no such model"),  # as transformers
    (RuntimeError("y"), KeyError("x"), "y"),
    (ValueError("\n first\nsecond"), None, "first second"),
    (ValueError(), None, "ValueError()"),
    (ValueError("a" * 1000), None, "a" * 400),
]


@pytest.mark.parametrize("error, context, reason", REASONS)
def test_the_reason_is_told_in_one_line(error, context, reason):
    """That of an error raised while another one was handled, or of one alone."""
    with pytest.raises(rewards.UserError) as raised, rewards.explained("mistake"):
        try:
            raise context or error
        except Exception:
            raise error
    assert str(raised.value) == f"mistake ({reason})"
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_a_user_error_and_an_exit_are_passed_on_as_they_are():
    for error in (rewards.UserError("mine"), SystemExit(1), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, rewards.explained("mistake"):
            raise error from OSError("why")
        assert raised.value is error and isinstance(error.__cause__, OSError)


# ------------------------------------------------ mixes


@pytest.fixture
def letters(monkeypatch):
    """Rewards with short names that give every image a number."""
    for value, name in enumerate(("a", "b", "c-d")):
        monkeypatch.setitem(rewards.REWARDS, name, lambda images, prompts, v=value: [v])
    return rewards.REWARDS


READABLE = [
    ("a", [("a", 1.0)]),
    ("a + 0.5*b - c-d", [("a", 1.0), ("b", 0.5), ("c-d", -1.0)]),
    ("-a + b", [("a", -1.0), ("b", 1.0)]),
    (" - a - .5 * b", [("a", -1.0), ("b", -0.5)]),
    ("-0.1*a  +\t1e-3*b", [("a", -0.1), ("b", 0.001)]),
    (" 2E+1*c-d - 3*a ", [("c-d", 20.0), ("a", -3.0)]),
]


@pytest.mark.parametrize("mix, terms", READABLE)
def test_a_mix_is_read_as_written(letters, mix, terms):
    found = rewards.load_rewards(mix)
    assert [(label, weight) for label, weight, _ in found] == terms
    assert all(function is letters[label] for label, _, function in found)


UNREADABLE = ["", "a +", "+ a", "a - ", "2", "2*", "a b", "x*a", "a*2", "1_0*a", "nan*a", "inf*a",
              "1e999*a", "a + + b", "a++b", "a,b", "a(", "a)", "a()", "a(b) c", "a(b(c))", "(a)",
              "beauty", "a(x)", "b + a(x)"]


@pytest.mark.parametrize("mix", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_way_to_write_it(letters, mix):
    message = refusal(mix)
    assert "write A, 0.1*A + B - C, A(FOLDER, FILE) or FILE.py:NAME;" in message
    assert "compressibility, incompressibility, a, b, c-d, aesthetic, " in message
    if mix and "," not in mix:
        monitor = refusal("c-d", mix, flag="--monitor")
        assert monitor.startswith(f"--monitor {mix}: unknown; write A, ")


def test_names_are_looked_up_before_any_model_is_loaded(monkeypatch):
    loaded = []

    def slow(model="a/b", second="c", *, device):
        loaded.append((model, second, device, torch.is_grad_enabled()))
        return lambda images, prompts: images.mean((1, 2, 3)) + torch.is_grad_enabled()

    monkeypatch.setitem(rewards.MODEL_REWARDS, "slow", slow)
    for mix in ("slow + beauty", "slow - compressibility(x)", "slow + nowhere.py:f"):
        name = mix.split()[-1]
        known = rf"--reward (- )?{re.escape(name)}: (unknown|there is no file)"
        assert re.match(known, refusal(mix))
    assert refusal("slow + 2*slow").startswith("--reward slow: another term")
    twice = refusal("slow", "compressibility, slow", flag="--monitor")
    assert twice.startswith("--monitor slow: another term")
    with pytest.raises(rewards.UserError, match="--reward slow: .* or a column of metrics.csv"):
        rewards.load_rewards("slow", taken=["loss", "slow"])
    assert not loaded
    message = refusal("slow(a, b, c)")
    assert '"slow(MODEL, SECOND)" (' in message and "positional arguments" in message

    loaded.clear()
    mix = rewards.load_rewards("slow + 0.5*slow(c/d) - compressibility", device="there")
    labels = [(label, weight) for label, weight, _ in mix]
    assert labels == [("slow", 1.0), ("slow(c/d)", 0.5), ("compressibility", -1.0)]
    assert loaded == [("a/b", "c", "there", True), ("c/d", "c", "there", True)]
    assert mix[2][2] is rewards.compressibility
    assert mix[0][2](torch.ones(2, 3, 4, 4), ["x", "y"]).tolist() == [1, 1], "without gradients"

    loaded.clear()
    logged = rewards.load_rewards("slow", "2*slow(c/d, e),compressibility, slow( f )")
    labels = [("slow", 1.0), ("slow(c/d, e)", 0.0), ("compressibility", 0.0), ("slow( f )", 0.0)]
    assert [(label, weight) for label, weight, _ in logged] == labels
    assert [models for *models, _, _ in loaded] == [["a/b", "c"], ["c/d", "e"], ["f ", "c"]]


# ------------------------------------------------ a reward of one's own

MINE = """
from __future__ import annotations
import dataclasses
import neighbour

print("imported")

@dataclasses.dataclass  # needs its module in sys.modules
class Box:
    size: int

def redness(images, prompts):
    return images[:, 0].mean((1, 2)) * Box(neighbour.TWO).size

greyness = redness
constant = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """my-own+file.py in the working directory, which imports another file there."""
    (tmp_path / "my-own+file.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("TWO = 2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_of_a_file_is_a_reward(mine, capsys):
    for name in ("my-own+file.py:redness", f"{mine}/my-own+file.py:redness"):
        found = rewards.load_rewards(f"-0.5*{name} + compressibility", "my-own+file.py:greyness")
        labels = [(label, weight) for label, weight, _ in found]
        assert labels == [("redness", -0.5), ("compressibility", 1.0), ("greyness", 0.0)]
        assert torch.allclose(found[0][2](IMAGES, PROMPTS), 2 * IMAGES[:, 0].mean((1, 2)))
    assert capsys.readouterr().out == "imported\n", "once, whatever it is called"
    twice = refusal(f"my-own+file.py:redness + {mine}/my-own+file.py:redness")
    assert twice.startswith("--reward redness: another term")


@pytest.mark.parametrize("function", ["blueness", "constant"])
def test_what_a_file_does_not_have_is_named(mine, function):
    with pytest.raises(rewards.UserError) as error:
        rewards.load_rewards(f"my-own+file.py:{function}")
    assert str(error.value).endswith(f"{mine}/my-own+file.py has no function {function}")
    assert refusal("my-own+file.py:redness(3)").startswith("--reward my-own+file.py:redness(3): un")


@pytest.mark.parametrize("name", ["rewards", "json", "my-own+file"])
def test_a_file_with_the_name_of_another_module_is_refused(mine, name):
    load("my-own+file.py:redness")
    (mine / "below").mkdir()
    (mine / "below" / f"{name}.py").write_text("def f(images, prompts):\n    return 0\n")
    with pytest.raises(rewards.UserError, match=f"{re.escape(name)} cannot be imported from there"):
        rewards.load_rewards(f"below/{name}.py:f")


class Darkness:
    def __call__(self, images, prompts, power=1):
        return -images.mean((1, 2, 3)) ** power


@pytest.mark.parametrize(
    "function, label",
    [
        (lambda images, prompts: 0, "lambda"),
        (Darkness(), "Darkness"),
        (functools.partial(Darkness(), power=2), "Darkness"),
        (rewards.incompressibility, "incompressibility"),
        (operator.attrgetter("real"), "attrgetter"),  # it does not say what it takes
    ],
)
def test_a_python_function_is_a_reward(function, label):
    found = rewards.load_rewards(function, "compressibility")
    assert found == [(label, 1.0, function), ("compressibility", 0.0, rewards.compressibility)]
    twice = refusal(function, "compressibility, compressibility", flag="--monitor")
    assert twice.startswith("--monitor compressibility: another term")


def test_the_examples_score_as_they_say():
    path = Path(rewards.__file__).parent / "examples" / "my_reward.py"
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 8, 8)  # red, green, blue
    assert load(f"{path}:redness")(colours, ["any"] * 3).tolist() == [1.0, -0.5, -0.5]
    greys = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.2, 0.7]).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    distances = load(f"{path}:diversity")(greys, ["a", "a", "a", "b", "b", "c"])
    torch.testing.assert_close(distances, torch.tensor([0.75, 0.5, 0.75, 0.0, 0.0, 0.0]))


BROKEN = [
    ("import json\n\njson.loads('{')\n", ValueError),
    ("import nowhere_to_be_found\n", ModuleNotFoundError),
    ("raise SystemExit('usage: ...')\n", SystemExit),
    ("x = 1\ny = (\n", SyntaxError),
]


@pytest.mark.parametrize("text, kind", BROKEN)
def test_an_error_in_a_file_of_ones_own_is_its_authors_to_see(mine, text, kind):
    (mine / "broken.py").write_text(text)
    with pytest.raises(kind) as error:
        rewards.load_rewards("compressibility + 2*broken.py:f")
    printed = "".join(traceback.format_exception(error.value))
    assert 'broken.py", line ' in printed, "who sees it printed finds the place"
    (mine / "broken.py").write_text("def f(images, prompts):\n    return [7]\n# longer than before")
    assert load("broken.py:f")(None, None) == [7], "half of a module was kept"

"""Rewards: functions of images (B, 3, H, W) in [0, 1] and B prompts that return B numbers, the
higher the better. MODEL_REWARDS are loaders: they take hub ids or folders of models and return the
reward. One of your own: `--reward path/to/file.py:function`, as in examples/my_reward.py.
"""

import importlib
import inspect
import io
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub as hub
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


class UserError(Exception):
    """What the person who started the run can mend, said in one line."""


@contextmanager
def explained(mistake):
    """What fails inside becomes a UserError: the mistake, and the reason, in one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hidden = error.__context__  # a full disk, no network: libraries often rename it
        named = isinstance(hidden, OSError) and not hasattr(hidden, "response")  # no hub's answer
        reason = " ".join(str(hidden if named else error).split()) or repr(error)
        raise UserError(f"{mistake} ({reason[:400]})") from None


def to_pil(images):
    """(B, 3, H, W) in [0, 1] -> B PIL images; levels are rounded, not cut off."""
    levels = (images.float().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(level) for level in levels.movedim(1, -1).cpu().numpy()]


def incompressibility(images, prompts):
    """The size of a JPEG of quality 95, in kB of 1000 bytes (Black et al., 5.1)."""
    sizes = []
    for image in to_pil(images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def compressibility(images, prompts):
    """Minus that size: simple pictures score high."""
    return -incompressibility(images, prompts)


# -------- CLIP and what stands on it
def load_model(kind, name, device):
    """A model in float32; on CUDA in the half precision of its file, else in fp16."""
    cuda = "cuda" in str(device)
    dtype = "auto" if cuda else torch.float32  # what was trained in bf16 can overflow in fp16
    net, report = kind.from_pretrained(name, torch_dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:  # made up now, but they would give scores
        raise ValueError(f"{name} lacks weights: {report['missing_keys']}")
    return (net.half() if cuda and net.dtype == torch.float32 else net).to(device)


def load_clip(model, processor, device):
    """CLIP as see(B PIL images) and read(B prompts), each -> (B, D) unit vectors, and its scale."""
    net = load_model(AutoModel, model, device)
    prepare = AutoProcessor.from_pretrained(processor)
    cut = {"truncation": True, "max_length": net.config.text_config.max_position_embeddings}

    def unit(features):  # a tensor before transformers 5
        return F.normalize(getattr(features, "pooler_output", features).float())

    def see(images):
        pixels = prepare(images=images, return_tensors="pt").pixel_values
        return unit(net.get_image_features(pixel_values=pixels.to(device, net.dtype)))

    def read(prompts):
        tokens = prepare(text=prompts, padding="max_length", return_tensors="pt", **cut)
        return unit(net.get_text_features(**tokens.to(device)))
    return see, read, net.logit_scale.float().exp()


def clipscore(model="openai/clip-vit-large-patch14", *, device):
    """Cosine of the embeddings of image and prompt."""
    see, read, _ = load_clip(model, model, device)
    return lambda images, prompts: (see(to_pil(images)) * read(prompts)).sum(-1)


def pickscore(model="yuvalkirstain/PickScore_v1",
              processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", *, device):
    """The same times the logit scale, of a CLIP trained on which of two images people picked."""
    see, read, scale = load_clip(model, processor, device)
    return lambda images, prompts: scale * (see(to_pil(images)) * read(prompts)).sum(-1)


def aesthetic(clip="openai/clip-vit-large-patch14", head="ttj/sac-logos-ava1-l14-linearMSE",
              *, device):
    """How people would rate an image from 1 to 10, by LAION's head (a file, folder or hub id)."""
    see, _, _ = load_clip(clip, clip, device)
    path = Path(head if Path(head).exists() else hub.snapshot_download(head))
    file = [*path.glob("*.safetensors"), *path.glob("*.pt*"), path][0]
    if file.suffix == ".safetensors":
        layers = safetensors.torch.load_file(file)
    else:  # a pickle, which may hold code to run
        layers = torch.load(file, map_location="cpu", weights_only=True)
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    for i in (7, 6, 4, 2, 0):  # the rest was dropout: one affine map
        bias = bias + weight @ layers[f"layers.{i}.bias"].float()
        weight = weight @ layers[f"layers.{i}.weight"].float()
    return lambda images, prompts: see(to_pil(images)).cpu() @ weight[0] + bias


# -------- vision-language models
def load_vlm(model, device):
    """A vision-language model (VLM) as ask(B PIL images, B questions, most tokens) -> B greedy
    answers, logits (B, V) of their first token, and as first_token(answer) -> its id."""
    net = load_model(AutoModelForImageTextToText, model, device)
    prepare = AutoProcessor.from_pretrained(model)
    prepare.tokenizer.padding_side = "left"  # the answer follows the last token of every row

    def chat(question, *answer):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        said = [{"role": "assistant", "content": [{"type": "text", "text": a}]} for a in answer]
        return prepare.apply_chat_template([user, *said], add_generation_prompt=not answer)

    def ask(images, questions, most):
        texts = list(map(chat, questions))
        special = not texts[0].startswith(prepare.tokenizer.bos_token or ())  # not twice
        rows = dict(text=texts, add_special_tokens=special, padding=True, return_tensors="pt")
        try:  # a flat list would be one row to SmolVLM2
            inputs = prepare(images=[[image] for image in images], **rows)
        except ValueError:  # LLaVA in transformers 4.48 wants it flat
            inputs = prepare(images=images, **rows)
        out = net.generate(**inputs.to(device, net.dtype), max_new_tokens=most, do_sample=False,
                           output_logits=True, return_dict_in_generate=True)
        answers = out.sequences[:, inputs.input_ids.shape[1] :]
        return prepare.batch_decode(answers, skip_special_tokens=True), out.logits[0].float()

    def first_token(answer):  # "Yes" or " Yes": that depends on how the template goes on
        texts = [chat("?"), chat("?", answer)]
        asked, answered = prepare.tokenizer(texts, add_special_tokens=False).input_ids
        return answered[len(asked)]
    return ask, first_token


def vqa(vlm="HuggingFaceTB/SmolVLM-500M-Instruct", *, device):
    """A VLM's probability of Yes against No (after VQAScore, Lin et al. 2024)."""
    ask, first_token = load_vlm(vlm, device)
    yes, no = first_token("Yes"), first_token("No")
    if yes == no:
        raise ValueError(f"{vlm} begins Yes and No with the same token")

    def reward(images, prompts):
        questions = [f'Does this figure show "{p}"? Please answer Yes or No.' for p in prompts]
        _, logits = ask(to_pil(images), questions, 1)
        return torch.sigmoid(logits[:, yes] - logits[:, no])  # P(Yes) / (P(Yes) + P(No))
    return reward


def alignment(vlm="llava-hf/llava-1.5-7b-hf", bert="microsoft/deberta-xlarge-mnli", layer="40",
              *, device):
    """How much of the prompt a description of the image recalls (Black et al., 5.3)."""
    ask, _ = load_vlm(vlm, device)
    net = load_model(AutoModel, bert, device)
    tokenizer = AutoTokenizer.from_pretrained(bert)

    def embed(text):
        tokens = tokenizer(text.strip(), truncation=True, return_tensors="pt").to(device)
        hidden = net(**tokens, output_hidden_states=True).hidden_states[int(layer)]
        return F.normalize(hidden[0].float())  # (L, D): [CLS], the text, [SEP]

    def recall(answer, prompt):  # BERTScore's (Zhang et al. 2020)
        said = embed(answer)
        best = (embed(f"The image contains {prompt}") @ said.T).amax(1)  # match of each token
        return best[1:-1].mean() * (len(said) > 2)  # who says nothing recalls nothing

    def reward(images, prompts):
        question = "Answer concisely: what is going on in this image?"
        answers, _ = ask(to_pil(images), [question] * len(prompts), 64)
        return torch.stack([*map(recall, answers, prompts)])
    return reward


# -------- from the command line
REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility}
MODEL_REWARDS = {f.__name__: f for f in (aesthetic, alignment, clipscore, pickscore, vqa)}
TERM = (r"\s*(-?)\s*(?:(\d*\.?\d+(?:[eE][+-]?\d\d?)?)\s*\*\s*)?"  # -0.1*
        r"(?:([^\s()*,]+):(\w+)|(([\w-]+)(?:\(([^()]+)\))?))\s*")  # file.py:function, A(B, C)


def load_models(place, name, inside, device):
    """A reward whose models have scored a grey image: misfits are told before sampling."""
    usage = f"{name}({', '.join(inspect.getfullargspec(MODEL_REWARDS[name]).args).upper()})"
    with explained(f'{place} does not load; other models or local folders: "{usage}"'):
        args = re.findall(r"\s*([^,]+)", inside)
        reward = torch.no_grad()(MODEL_REWARDS[name](*args, device=device))
        int(reward(torch.full((1, 3, 64, 64), 0.5), ["a cat"]))  # raises unless it is finite
    return reward


def load_function(place, path, name):
    """A function of a file, which is imported once, with its folder's other modules in reach."""
    path = Path(path).resolve()
    sys.path.insert(0, str(path.parent))
    module = "." not in path.stem and importlib.import_module(path.stem)
    if getattr(module, "__file__", "") != str(path):
        raise UserError(f"{place}: {path.stem} cannot be imported from there; rename the file")
    if not callable(getattr(module, name, None)):
        raise UserError(f"{place}: {path} has no function {name}")
    return getattr(module, name)


def name_of(function):
    """What to call it: a function's name, that of a partial's function, of an object's class."""
    if isinstance(function, str):
        return function
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__).strip("<>")  # no <lambda>


def find_reward(place, term):
    """A term such as "0.1*vqa(FOLDER)" -> its label, weight, and load(device) -> its function."""
    if callable(term):
        return name_of(term), 1.0, lambda device: term
    if match := re.fullmatch(TERM, term):
        sign, number, file, function, label, name, inside = match.groups("")
        weight = float(f"{sign}{number or 1}")
        if name in MODEL_REWARDS:
            return label, weight, lambda device: load_models(place, name, inside, device)
        if label in REWARDS:
            return label, weight, lambda device: REWARDS[label]
        if Path(file).is_file():
            reward = load_function(place, file, function)
            return function, weight, lambda device: reward
        if file:
            raise UserError(f"{place}: there is no file {file}")
    raise UserError(f"{place}: unknown; write A, 0.1*A + B - C, A(FOLDER, FILE) or FILE.py:NAME;"
                    f" there are {', '.join([*REWARDS, *MODEL_REWARDS])}")


def load_rewards(reward, monitors="", device="cpu", taken=()):
    """A mix such as "vqa + 0.1*compressibility" or a function, and monitors "A, B", which weigh 0
    -> [(label, weight, function)], with none of the labels taken. All names are looked up before
    any model is loaded."""
    hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hub.utils.enable_progress_bars()  # the line above stops these too
    mix = [reward] if callable(reward) else re.split(r"\s+\+\s+|(?<=\S)\s+(?=-\s)", reward)
    terms = [("--reward", term) for term in mix]
    terms += [("--monitor", m) for m in re.split(r",\s*(?![^()]*\))", monitors) if m]
    found = {}
    for flag, term in terms:
        label, weight, load = find_reward(f"{flag} {term}", term)
        if label in found or label in taken:
            raise UserError(f"{flag} {label}: another term or a column of metrics.csv is called so")
        found[label] = (weight if flag == "--reward" else 0.0, load)
    loaded = [(label, weight, load(device)) for label, (weight, load) in found.items()]
    for label, _, function in loaded:
        with explained(f"reward {label} must take images and prompts"), suppress(ValueError):
            inspect.signature(function).bind("images", "prompts")  # if it says what it takes
    return loaded

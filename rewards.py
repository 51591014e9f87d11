"""Reward functions for DDPO. Each has the same contract:

    reward(images, prompts) -> (B,) float32     images: (B, 3, H, W) float in [0, 1]; prompts: B strings; higher is better

REWARDS holds those that need no model. MODEL_REWARDS holds loaders: a loader takes the ids (or local folders) of its models,
loads them once and returns the reward. To add one of your own, write a function into any file and name it on the command
line, `--reward path/to/file.py:function`; examples/my_reward.py shows it.
"""

import importlib.util
import inspect
import io
import math
import re
import sys
import textwrap
import traceback
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


class UserError(Exception):
    """Something that the person who started the run can mend; the message is one line that says how."""


def first_line(error):
    """What an exception says, in one line."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 250, placeholder=" ...")


@contextmanager
def explained(mistake):
    """Whatever fails inside becomes a UserError: the mistake, and the first line of what the library says about it."""
    try:
        yield
    except Exception as error:
        hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)  # as torch.save hides it
        reason = error.__context__ if hidden else error
        raise error if isinstance(error, UserError) else UserError(f"{mistake} ({first_line(reason)})") from None


def to_pil(images):
    """(B, 3, H, W) float in [0, 1] -> B PIL images; pixels are rounded to the nearest of 256 levels, not cut off."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()  # (B, H, W, 3)
    return [Image.fromarray(p) for p in pixels.numpy()]


# ---------------------------------------------------------------- the size of a file


def incompressibility(images, prompts):
    """The size of a JPEG of quality 95, in kB of 1000 bytes: complex pictures score high (Black et al., section 5.1)."""
    sizes = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def compressibility(images, prompts):
    """Minus the JPEG's size: simple pictures score high."""
    return -incompressibility(images, prompts)


# ---------------------------------------------------------------- loading models


def fetch(load, name, **options):
    """load(name), such as AutoModel.from_pretrained, with the name in the UserError if neither disk nor hub has it."""
    with explained(f"cannot load {name}"):
        return load(name, **options)


def load_model(kind, name, device):
    """A frozen model in float32; on CUDA in half precision: that of the checkpoint (what was trained in bf16 can overflow
    in fp16), else fp16."""
    cuda = torch.device(device).type == "cuda"
    net, report = fetch(kind.from_pretrained, name, torch_dtype="auto" if cuda else torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers would make these up, and a random judge still gives scores
        raise UserError(f"cannot load {name} ({len(missing)} weights are not in it, such as {missing[0]})")
    net = net.half() if cuda and net.dtype == torch.float32 else net
    return net.to(device).eval().requires_grad_(False)


def in_batches(score, batch_size):
    """The reward function of `score`, which maps a list of PIL images and their prompts to (B,), a batch at a time."""

    @torch.no_grad()
    def reward(images, prompts):
        pil, n = to_pil(images), batch_size
        return torch.cat([score(pil[i : i + n], prompts[i : i + n]).float().cpu() for i in range(0, len(pil), n)])

    return reward


# ---------------------------------------------------------------- CLIP and what stands on it


def load_clip(model, processor, device):
    """A CLIP-type model as two functions, of B PIL images and of B prompts, each to (B, D) unit vectors in float32, and its
    logit scale. Prompts are cut off at the model's length, as in its training."""
    net, prepare = load_model(AutoModel, model, device), fetch(AutoProcessor.from_pretrained, processor)
    length = net.config.text_config.max_position_embeddings

    def unit(features):
        features = getattr(features, "pooler_output", features)  # an object since transformers 5, a tensor before
        return F.normalize(features.float(), dim=-1)

    def see(images):
        pixels = prepare(images=images, return_tensors="pt")["pixel_values"]
        return unit(net.get_image_features(pixel_values=pixels.to(device, net.dtype)))

    def read(prompts):
        tokens = prepare(text=prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return unit(net.get_text_features(**tokens.to(device)))

    return see, read, net.logit_scale.float().exp()


def clipscore(model="openai/clip-vit-large-patch14", *, device, batch_size):
    """Cosine of the embeddings of image and prompt."""
    see, read, _ = load_clip(model, model, device)
    return in_batches(lambda images, prompts: (see(images) * read(prompts)).sum(-1), batch_size)


def pickscore(model="yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", *, device, batch_size):
    """The same cosine times the logit scale, of a CLIP trained on which of two images people picked (Kirstain et al. 2023)."""
    see, read, scale = load_clip(model, processor, device)
    return in_batches(lambda images, prompts: scale * (see(images) * read(prompts)).sum(-1), batch_size)


def aesthetic(clip="openai/clip-vit-large-patch14", head="ttj/sac-logos-ava1-l14-linearMSE", *, device, batch_size):
    """How people would rate the looks of the image from 1 to 10, whatever the prompt, by LAION's predictor."""
    see, _, _ = load_clip(clip, clip, device)
    weight, bias = load_laion_head(head)
    return in_batches(lambda images, prompts: see(images).cpu() @ weight + bias, batch_size)


def load_laion_head(name):
    """(D,) weight and bias of LAION's head, from a file, a folder or a hub id. It is five linear layers with only dropout
    between them: at inference, one affine map."""
    path = Path(name)
    if not path.exists():
        path = Path(fetch(huggingface_hub.snapshot_download, name, allow_patterns=["*.safetensors", "*.pth", "*.pt"]))
    files = [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.pt*"))]
    if not files:
        raise UserError(f"cannot load {name} (no .safetensors, .pth or .pt file in it)")
    with explained(f"cannot load {files[0]} as LAION's head"):
        if files[0].suffix == ".safetensors":
            layers = safetensors.torch.load_file(files[0])
        else:
            layers = torch.load(files[0], map_location="cpu", weights_only=True)  # a pickle could run anything otherwise
        weight, bias = torch.ones(1, 1), torch.zeros(1)
        for i in (7, 6, 4, 2, 0):  # the numbers in between were dropout
            bias = bias + weight @ layers[f"layers.{i}.bias"].float()
            weight = weight @ layers[f"layers.{i}.weight"].float()
    return weight[0], bias


# ---------------------------------------------------------------- vision-language models


def load_vlm(model, device):
    """A vision-language model as two functions. ask(B PIL images, B questions, most tokens) -> B greedy answers and the
    logits (B, V) of their first token. first_token(answer) -> id of the token that such an answer would begin with."""
    net, prepare = load_model(AutoModelForImageTextToText, model, device), fetch(AutoProcessor.from_pretrained, model)
    prepare.tokenizer.padding_side = "left"  # the answer follows the last token of every row

    def chat(question, answer=None):
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        if answer:
            turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return prepare.apply_chat_template(turns, add_generation_prompt=not answer)

    def ask(images, questions, most_tokens):
        texts, bos = [chat(question) for question in questions], prepare.tokenizer.bos_token
        special = not (bos and texts[0].startswith(bos))  # some templates begin with the token that the tokenizer adds
        rest = {"text": texts, "add_special_tokens": special, "padding": True, "return_tensors": "pt"}
        try:
            inputs = prepare(images=[[image] for image in images], **rest)  # SmolVLM2 would take a flat list for one row's images
        except ValueError:  # LLaVA in transformers 4.48 takes nothing else
            inputs = prepare(images=images, **rest)
        out = net.generate(**inputs.to(device, net.dtype), max_new_tokens=most_tokens, do_sample=False, num_beams=1,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
        answers = prepare.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers, out.logits[0].float()

    def first_token(answer):
        # "Yes" and " Yes" are two tokens, and which one a model has learned to say depends on how its template goes on.
        asked, answered = (prepare.tokenizer(chat("?", a), add_special_tokens=False)["input_ids"] for a in (None, answer))
        if answered[: len(asked)] != asked:
            raise UserError(f"{model} has a chat template that does not continue the question with the answer")
        return answered[len(asked)]

    return ask, first_token


def vqa(vlm="HuggingFaceTB/SmolVLM-500M-Instruct", *, device, batch_size):
    """A vision-language model as judge: its probability of Yes against No (after VQAScore, Lin et al. 2024)."""
    ask, first_token = load_vlm(vlm, device)
    yes, no = first_token("Yes"), first_token("No")
    if yes == no:
        raise UserError(f"{vlm} begins Yes and No with the same token")

    def score(images, prompts):
        _, logits = ask(images, [f'Does this figure show "{prompt}"? Please answer Yes or No.' for prompt in prompts], 1)
        return torch.sigmoid(logits[:, yes] - logits[:, no])  # P(Yes) / (P(Yes) + P(No))

    return in_batches(score, batch_size)


def alignment(vlm="llava-hf/llava-1.5-7b-hf", bert="microsoft/deberta-xlarge-mnli", layer="40", *, device, batch_size):
    """How much of the prompt a vision-language model's description of the image recalls (Black et al., section 5.3)."""
    (ask, _), recall = load_vlm(vlm, device), load_bertscore(bert, int(layer), device)

    def score(images, prompts):
        answers, _ = ask(images, ["Answer concisely: what is going on in this image?"] * len(images), 64)
        return recall(answers, [f"The image contains {prompt}" for prompt in prompts])

    return in_batches(score, batch_size)


def load_bertscore(bert, layer, device):
    """BERTScore's recall (Zhang et al. 2020) as a function of B candidates and B references: each token of a reference counts
    as much as the most similar token of its candidate. `layer` is the hidden layer to compare, 40 being right for the
    default model alone. No rescaling, no idf weights."""
    net, tokenizer = load_model(AutoModel, bert, device), fetch(AutoTokenizer.from_pretrained, bert)
    if not 0 <= layer <= net.config.num_hidden_layers:
        raise UserError(f"{bert} has hidden layers 0 to {net.config.num_hidden_layers}, not {layer}")
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=device)

    def embed(texts):
        tokens = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = net(**tokens, output_hidden_states=True).hidden_states[layer]  # (B, L, D)
        return F.normalize(hidden.float(), dim=-1), tokens["attention_mask"].bool(), tokens["input_ids"]

    def recall(candidates, references):
        (cand, cand_real, _), (ref, ref_real, ids) = embed(candidates), embed(references)
        # As in the authors' package, [CLS] and [SEP] of a reference do not count, but those of a candidate may be matched.
        counted = ref_real & ~torch.isin(ids, special)  # (B, R)
        best = (ref @ cand.mT).masked_fill(~cand_real[:, None], -1).amax(-1)  # (B, R, C) -> (B, R)
        said = torch.tensor([bool(text.strip()) for text in candidates], device=device)  # who says nothing recalls nothing
        return said * (best * counted).sum(-1) / counted.sum(-1)

    return recall


REWARDS = {f.__name__: f for f in (compressibility, incompressibility)}
MODEL_REWARDS = {f.__name__: f for f in (aesthetic, alignment, clipscore, pickscore, vqa)}


# ---------------------------------------------------------------- from the command line to functions


TERM = re.compile(r"""
    \s* ([+-]?) \s*
    (?: ((?: \d+\.?\d* | \.\d+ ) (?: [eE][+-]?\d+ )?) \s* \* \s* )?  # 0.1*
    ([^\s\d()*,+-][^\s()*,+]*) \s*                                  # NAME
    (?: \( ([^()]*) \) \s* )?                                       # (FOLDER, FILE)
    (?= [+-] | $ )                                                  # and so the next term, or the end
    """, re.VERBOSE)  # fmt: skip


def parse_mix(text):
    """A mix such as "pickscore + 0.1*aesthetic(CLIP, HEAD)" -> [(weight, name, arguments)]. A "-" at the end of a name is part
    of the name, so a space must part the two."""
    terms, at = [], 0
    while at < len(text) or not terms:
        match = TERM.match(text, at)
        sign, number, name, inside = match.groups() if match else ("", "", "", "")
        weight = float(f"{sign}{number or 1}")
        args = () if inside is None else tuple(arg.strip() for arg in inside.split(","))
        if not (name and all(args) and math.isfinite(weight)):
            how = "write NAME, 0.1*NAME or NAME(FOLDER, FILE), with + or - between them"
            raise UserError(f"cannot read {text[at:].strip()!r}; {how}")
        terms.append((weight, name, args))
        at = match.end()
    return terms


def load_function(name):
    """The function that `path/to/file.py:function` or `package.module:function` names."""
    source, _, function = name.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise UserError(f"there is no file {source}")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(source, source)
            module = sys.modules[source] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except (Exception, SystemExit) as error:
        stem = re.split(r"[./\\]", source.removesuffix(".py"))[-1]  # tells the lines of the user's file from a library's
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).stem == stem]
        where = f"{source}, line {lines[-1]}" if lines else source
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}") from None
    if not callable(getattr(module, function, None)):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise UserError(f"{source} has no function {function!r}; it has {', '.join(own) or 'none'}")
    return getattr(module, function)


def write(name, args):
    """A term as on the command line."""
    return f"{name}({', '.join(args)})" if args else name


def options(name):
    """The arguments that a reward takes on the command line, which are its models: those with a default."""
    parameters = inspect.signature(MODEL_REWARDS[name]).parameters.values() if name in MODEL_REWARDS else []
    return [p.name.upper() for p in parameters if p.default is not p.empty]


def find_reward(name, args):
    """The reward of that name, or its loader if it needs a model; UserError if there is none that takes these arguments."""
    known = {**REWARDS, **MODEL_REWARDS}
    if ":" not in name and name not in known:
        raise UserError(f"unknown; choose from {', '.join(known)}, or a function of your own as path/to/file.py:function")
    if len(args) > len(options(name)):
        raise UserError(f"too many arguments; what works is {write(name, options(name))}")
    return load_function(name) if ":" in name else known[name]


def load_model_reward(name, args, device, batch_size):
    """Load a reward's models and score a grey image: what is missing or does not fit is said now, not after sampling."""
    reward = MODEL_REWARDS[name](*args, device=device, batch_size=batch_size)
    score = reward(torch.full((1, 3, 64, 64), 0.5), ["a cat"])
    if not score.isfinite().all():
        raise UserError(f"gives a grey image {score.item()}, which is no score")
    return reward


@contextmanager
def about(what, hint=""):
    """Whatever goes wrong inside is about this part of the command line."""
    try:
        yield
    except Exception as error:
        why = error if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what}: {why}{hint}") from None


def load_rewards(text, monitors="", device="cpu", batch_size=8):
    """A mix such as "pickscore + 0.1*compressibility" -> [(label, weight, function)], followed by the monitors, which are
    parted by commas and weigh 0. The label is the term without its weight, for a function of one's own its bare name. Every
    name is looked up before any model is loaded."""
    for library in (huggingface_hub.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of gigabytes that are fetched; the line above has switched them off too
    with about(f"--reward {text!r}"):
        terms = [("--reward", *term) for term in parse_mix(text)]
    for monitor in filter(None, re.split(r",\s*(?![^()]*\))", monitors)):  # at the commas outside parentheses
        with about(f"--monitor {monitor!r}"):
            terms += [("--monitor", 0.0, name, args) for _, name, args in parse_mix(monitor)]
    labels, found = [write(name.rpartition(":")[2], args) for *_, name, args in terms], []
    if twice := [label for label in labels if labels.count(label) > 1]:
        hint = "add up their weights, rename one function, or leave it out of --monitor: it is logged in any case"
        raise UserError(f"--reward {twice[0]}: two terms have this name; {hint}")
    for flag, _, name, args in terms:
        with about(f"{flag} {write(name, args)}"):
            found.append(find_reward(name, args))
    for i, (flag, _, name, args) in enumerate(terms):
        if name in MODEL_REWARDS:
            with about(f"{flag} {write(name, args)}", f'; other models or local folders: "{write(name, options(name))}"'):
                found[i] = load_model_reward(name, args, device, batch_size)
    return [(label, weight, function) for label, (_, weight, *_), function in zip(labels, terms, found)]

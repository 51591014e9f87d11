"""Make examples/models/emoji-diffusion, a tiny latent text-to-image model that draws the paper's
45 animals, and examples/models/emoji-clip, a tiny CLIP that says whether a picture shows its
animal.

    cd examples/experiments
    python pretrain_emoji.py --minutes 100   # CPU or CUDA; run it again to resume
    python pretrain_emoji.py --sheet         # only draw the sheet of 45 again
    python pretrain_emoji.py --clip --minutes 20   # the CLIP; needs emoji-diffusion

Images are rendered while training: a glyph of Noto Color Emoji, flipped, turned, scaled and placed
at random on a random background. Three phases: an autoencoder learns 64 x 64 pixels <-> 16 x 16 x 4
latents; a text encoder and a UNet learn to denoise those latents (Stable Diffusion in small); and
since a `StableDiffusionPipeline` wants an AutoencoderKL, one is taught the first autoencoder's
latents. The result is a pipeline folder like any other. The CLIP learns from the same renderer,
with the faults added that a diffusion model's pictures have, to tell the 45 animals and pictures
without an animal apart. Needs the font: Debian and Ubuntu package `fonts-noto-color-emoji`.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

GLYPHS = {  # the 45 animals of the paper, each with the emoji that shows it best at 64 pixels
    "cat": "🐱", "dog": "🐶", "horse": "🐴", "monkey": "🐵", "rabbit": "🐰", "zebra": "🦓",
    "spider": "🕷", "bird": "🐦", "sheep": "🐑", "deer": "🦌", "cow": "🐮", "goat": "🐐",
    "lion": "🦁", "tiger": "🐯", "bear": "🐻", "raccoon": "🦝", "fox": "🦊", "wolf": "🐺",
    "lizard": "🦎", "beetle": "🪲", "ant": "🐜", "butterfly": "🦋", "fish": "🐠", "shark": "🦈",
    "whale": "🐳", "dolphin": "🐬", "squirrel": "🐿", "mouse": "🐭", "rat": "🐀", "snake": "🐍",
    "turtle": "🐢", "frog": "🐸", "chicken": "🐔", "duck": "🦆", "goose": "🪿", "bee": "🐝",
    "pig": "🐷", "turkey": "🦃", "fly": "🪰", "llama": "🦙", "camel": "🐫", "bat": "🦇",
    "gorilla": "🦍", "hedgehog": "🦔", "kangaroo": "🦘",
}  # fmt: skip
ANIMALS = list(GLYPHS)
FONTS = [
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
]
EXAMPLES = Path(__file__).resolve().parent.parent
MODELS = EXAMPLES / "models"


# ---------------------------------------------------- images


def load_glyphs(font_path):
    """Every animal as premultiplied RGBA, (45, 4, 128, 128) in [0, 1]."""
    path = next((p for p in [font_path, *FONTS] if p and os.path.exists(p)), None)
    if path is None:
        how = "install fonts-noto-color-emoji, or name the file with --font"
        raise SystemExit(f"NotoColorEmoji.ttf not found: {how}")
    font = ImageFont.truetype(path, 109)  # the one size that this bitmap font has
    glyphs = []
    for char in GLYPHS.values():
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((80, 80), char, font=font, embedded_color=True, anchor="mm")
        x0, y0, x1, y1 = canvas.getbbox()
        half = 68
        cx = (x0 + x1) // 2
        cy = (y0 + y1) // 2
        square = canvas.crop((cx - half, cy - half, cx + half, cy + half)).resize((128, 128))
        rgba = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        rgba = rgba.view(128, 128, 4).permute(2, 0, 1) / 255
        glyphs.append(torch.cat([rgba[:3] * rgba[3:], rgba[3:]]))
    return torch.stack(glyphs)


def backgrounds(n, size, device):
    """n random backgrounds, (n, 3, size, size): plain, gradient, stripes, checks, soft noise or
    grain."""

    def rand(*shape):
        return torch.rand(*shape, device=device)

    a = 0.2 + 0.8 * rand(n, 3, 1, 1)
    b = a + 0.6 * (rand(n, 3, 1, 1) - a)  # not so far apart that the animal is lost on it
    grid = torch.linspace(0, 1, size, device=device)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    angle = math.pi * rand(n, 1, 1)
    frequency = 2 + 4 * rand(n, 1, 1)
    phase = rand(n, 1, 1)
    along = x * angle.cos() + y * angle.sin()  # (n, size, size)
    across = -x * angle.sin() + y * angle.cos()
    wave_u = torch.sin(2 * math.pi * (frequency * along + phase))
    wave_v = torch.sin(2 * math.pi * (frequency * across + phase))
    hard = 8.0  # how sharp the edges of stripes and checks are
    least = along.amin((1, 2), True)
    most = along.amax((1, 2), True)
    ramp = ((along - least) / (most - least))[:, None]
    stripes = (0.5 + 0.5 * torch.tanh(hard * wave_u))[:, None]
    checks = (0.5 + 0.5 * torch.tanh(hard * wave_u * wave_v))[:, None]
    soft = F.interpolate(rand(n, 1, 6, 6), size, mode="bicubic", align_corners=False).clamp(0, 1)
    grain = torch.randn(n, 3, size // 2, size // 2, device=device)
    grain = F.interpolate(grain, size, mode="bilinear")
    kinds = torch.stack([
        a.expand(n, 3, size, size), a + (b - a) * ramp, a + (b - a) * stripes, a + (b - a) * checks,
        a + (b - a) * soft, a + 0.1 * grain,
    ])  # (6, n, 3, size, size)  # fmt: skip
    return one_of(kinds).clamp(0, 1)


def one_of(kinds):
    """For each of n pictures one of its kinds, at random: (kinds, n, ...) -> (n, ...)."""
    n, device = kinds.shape[1], kinds.device
    return kinds[torch.randint(len(kinds), (n,), device=device), torch.arange(n, device=device)]


def render(glyphs, labels, least=0.66):
    """Draw each label's glyph on a fresh background: (n, 3, 64, 64) in [-1, 1]."""
    n, device = len(labels), glyphs.device
    angle = (torch.rand(n, device=device) * 2 - 1) * math.radians(15)
    scale = least + (0.96 - least) * torch.rand(n, device=device)  # of the picture's side
    # To flip half of them would teach a small model two-headed birds.
    flip = 1 - 2 * (torch.rand(n, device=device) < 0.15).float()
    shift = (torch.rand(n, 2, device=device) * 2 - 1) * (1 - scale)[:, None]
    cos = angle.cos() / scale
    sin = angle.sin() / scale
    rows = [torch.stack([cos * flip, sin * flip], 1), torch.stack([-sin, cos], 1)]
    rows = torch.stack(rows, 1)  # from the picture to the glyph
    theta = torch.cat([rows, -(rows @ shift[:, :, None])], 2)
    where = F.affine_grid(theta, (n, 4, 128, 128), align_corners=False)
    rgba = F.grid_sample(glyphs[labels], where, align_corners=False)
    rgba = F.avg_pool2d(rgba, 2)  # drawn at twice the size against aliasing
    return (rgba[:, :3] + (1 - rgba[:, 3:]) * backgrounds(n, 64, device)) * 2 - 1


def draw_batch(glyphs, n, least=0.66):
    labels = torch.randint(len(glyphs), (n,), device=glyphs.device)
    return render(glyphs, labels, least), labels


# ---------------------------------------------------- the model


def make_tokenizer(folder):
    """A CLIP tokenizer (vocab.json and merges.txt) with one token for each animal and each word of
    the paper's activities. One that is there is kept: training breaks ties at random, and the
    weights know these ids."""
    vocab_file = folder / "vocab.json"
    merges_file = folder / "merges.txt"
    if not vocab_file.exists():
        words = [*ANIMALS, *"a an riding bike playing chess washing the dishes photo of".split()]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        how = {"vocab_size": 4096, "end_of_word_suffix": "</w>", "show_progress": False}
        bpe.train_from_iterator(words, trainers.BpeTrainer(**how))
        merges = json.loads(bpe.to_str())["model"]["merges"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
        tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        folder.mkdir(parents=True, exist_ok=True)
        vocab_file.write_text(json.dumps(vocab, ensure_ascii=False))
        lines = "".join(f"{a} {b}\n" for a, b in merges)
        merges_file.write_text("#version: 0.2\n" + lines)
    return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=16)


def special_tokens(tokenizer):
    """The ids that a CLIP's configuration wants to know."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def make_pipeline(folder):
    """The untrained pipeline; one UNet call for one latent costs 0.65 GFLOP."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, hidden_size=128,
        intermediate_size=256, projection_dim=128, num_hidden_layers=2, num_attention_heads=4,
        **special_tokens(tokenizer),
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=16,
        cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 48, 64), layers_per_block=1, latent_channels=4, sample_size=64,
        norm_num_groups=1,  # it keeps the colours, which statistics of many groups would erase
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    parts = (vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def make_teacher():
    """The autoencoder that makes the latents: 0.3 M parameters and no normalisation layers, so it
    learns within minutes."""
    width = (32, 32, 32)
    return AutoencoderTiny(
        encoder_block_out_channels=width, decoder_block_out_channels=width, latent_channels=4,
        num_encoder_blocks=(1, 1, 2), num_decoder_blocks=(2, 2, 1),
    )  # fmt: skip


# ---------------------------------------------------- training


class Run:
    """A training phase whose clock survives a restart: `state` holds modules, optimizers, seconds
    used and step."""

    def __init__(self, path, budget, lr, modules):
        self.path = path
        self.budget = budget
        self.lr = lr
        self.modules = modules
        self.weights = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr, (0.9, 0.99), weight_decay=1e-3)
        self.used = 0.0
        self.step = 0
        self.saved = time.time()
        self.loss = None
        if path.exists():
            state = torch.load(path, weights_only=True)
            for module, weights in zip(modules, state["modules"]):
                module.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.used = state["used"]
            self.step = state["step"]
            self.loss = state["loss"]
        self.before = self.used  # seconds used by earlier processes

    def steps(self, name):
        """Yield the progress in [0, 1) until the budget of seconds is used; saves every two minutes
        and at the end."""
        start = self.saved = time.time()
        done = round(min(self.used, self.budget))
        bar = tqdm(total=round(self.budget), initial=done, desc=name, unit="s")
        while self.used < self.budget:
            progress = self.used / self.budget
            warm = min(1, (self.step + 1) / 200)
            lr = self.lr * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
            self.optimizer.param_groups[0]["lr"] = lr
            yield progress
            self.step += 1
            self.used = self.before + time.time() - start
            bar.update(round(min(self.used, self.budget)) - bar.n)
            bar.set_postfix(step=self.step, loss=f"{self.loss:.4f}")
            if time.time() - self.saved > 120:
                self.save()
        self.save()

    def learn(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        loss = loss.item()
        self.loss = loss if self.loss is None else 0.99 * self.loss + 0.01 * loss

    def save(self):
        state = {"modules": [m.state_dict() for m in self.modules], "step": self.step,
                 "optimizer": self.optimizer.state_dict(), "used": self.used,
                 "loss": self.loss}  # fmt: skip
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        self.saved = time.time()


def train_teacher(vae, glyphs, work, seconds, autocast, batch=32):
    """Pixels -> latents -> pixels; the latents get zero mean and unit variance per channel, as the
    UNet wants them."""
    run = Run(work / "autoencoder.pt", seconds, 2e-3, [vae])
    for _ in run.steps("autoencoder"):
        x = draw_batch(glyphs, batch)[0].contiguous(memory_format=torch.channels_last)
        with autocast():
            z = vae.encode(x).latents.float()
            near = z + 0.1 * torch.randn_like(z)  # neighbouring latents are to look alike
            y = vae.decode(near).sample.float()
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        run.learn(F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.05 * moments)


def train_student(vae, teacher, glyphs, work, seconds, autocast, batch=32):
    """Teach the pipeline's own autoencoder to encode like the teacher and to decode the teacher's
    latents."""
    run = Run(work / "student.pt", seconds, 2e-3, [vae])
    for _ in run.steps("student"):
        x = draw_batch(glyphs, batch)[0].contiguous(memory_format=torch.channels_last)
        with autocast():
            with torch.no_grad():
                z = teacher.encode(x).latents.float()
            posterior = vae.encode(x).latent_dist.parameters.float()
            y = vae.decode(z + 0.1 * torch.randn_like(z)).sample.float()
        mean, logvar = posterior.chunk(2, 1)
        pixels = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x)
        run.learn(pixels + 0.1 * F.mse_loss(mean, z) + 0.01 * (logvar + 6).square().mean())


@torch.no_grad()
def fresh_latents(vae, glyphs, n, autocast):
    images, labels = draw_batch(glyphs, n)
    with autocast():
        return vae.encode(images).latents.float(), labels


class Pool:
    """Training data, made by make(n) and renewed piece by piece: to render and encode costs as much
    as to learn."""

    def __init__(self, make, size, batch):
        self.make = make
        self.batch = batch
        pieces = [make(batch) for _ in tqdm(range(size // batch), desc="pool")]
        self.x, self.labels = (torch.cat(part) for part in zip(*pieces))

    def renew(self, number):
        at = number * self.batch % len(self.x)
        piece = slice(at, at + self.batch)
        self.x[piece], self.labels[piece] = self.make(self.batch)

    def draw(self):
        pick = torch.randint(len(self.x), (self.batch,), device=self.x.device)
        return self.x[pick], self.labels[pick]


def train_unet(pipe, teacher, glyphs, work, seconds, autocast, batch=64, fresh_every=3):
    """Denoising with min-SNR weights (Hang et al. 2023); a tenth of the captions is dropped for
    guidance."""
    unet, text, device = pipe.unet, pipe.text_encoder, glyphs.device
    weights = [*unet.parameters(), *text.parameters()]
    copies = [torch.nn.Parameter(p.detach().clone(), requires_grad=False) for p in weights]
    average = torch.nn.ParameterList(copies)
    run = Run(work / "unet.pt", seconds, 2e-3, [unet, text, average])
    how = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    captions = pipe.tokenizer([*ANIMALS, ""], **how).input_ids.to(device)
    abar = pipe.scheduler.alphas_cumprod.to(device)
    attention = SDPBackend.MATH if device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    pool = Pool(lambda n: fresh_latents(teacher, glyphs, n, autocast), 16384, batch)
    mean = pool.x.mean((0, 2, 3)).tolist()
    print(f"latents: mean {mean}, std {pool.x.std((0, 2, 3)).tolist()}")
    for _ in run.steps("unet"):
        if run.step % fresh_every == 0:
            pool.renew(run.step // fresh_every)
        x0, label = pool.draw()
        label = label.where(torch.rand(batch, device=device) > 0.1, len(ANIMALS))
        t = torch.randint(len(abar), (batch,), device=device)
        a = abar[t][:, None, None, None]
        noise = torch.randn_like(x0)
        with autocast(), sdpa_kernel(attention):
            cond = text(captions).last_hidden_state[label]
            eps = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, cond).sample.float()
        snr = abar[t] / (1 - abar[t])
        run.learn((((eps - noise) ** 2).mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean())
        with torch.no_grad():
            decay = min(0.999, (run.step + 1) / (run.step + 10))
            torch._foreach_lerp_(list(average), weights, 1 - decay)
    with torch.no_grad():
        torch._foreach_copy_(weights, list(average))


# ---------------------------------------------------- the CLIP

NOTHING = len(ANIMALS)  # the label of a picture without an animal; its caption is the empty one
TEMPLATES = [
    "{}",
    "a photo of a {}",
    "a {} riding a bike",
    "a {} playing chess",
    "a {} washing the dishes",
]


def make_clip(tokenizer):
    """The untrained CLIP, 0.7 M parameters; one picture costs 0.07 GFLOP."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "projection_dim": 64, "vocab_size": len(tokenizer),
            "max_position_embeddings": 16, **special_tokens(tokenizer)}  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
              "num_attention_heads": 4, "projection_dim": 64, "image_size": 64,
              "patch_size": 8}  # fmt: skip
    towers = {"text_config": text, "vision_config": vision, "projection_dim": 64}
    clip = CLIPModel(CLIPConfig(**towers, logit_scale_init_value=math.log(10)))
    # It would grow, and cosines of 0.3 would do; at 10 they must come near 1 and 0.
    clip.logit_scale.requires_grad_(False)
    return clip


def without_animal(x):
    """What is left when no animal can be made out: a background, noise, a blur, two animals in one,
    or the parts in disorder."""
    n, device = len(x), x.device
    colour = torch.rand(n, 3, 1, 1, device=device) - 0.5
    strength = 0.3 + torch.rand(n, 1, 1, 1, device=device)
    noise = colour + strength * torch.randn_like(x)
    blur = F.interpolate(F.adaptive_avg_pool2d(x, 4), 64, mode="bicubic")
    parts = x.view(n, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (n, 64, 3, 8, 8)
    order = torch.rand(n, 64, device=device).argsort(1)
    parts = parts[torch.arange(n, device=device)[:, None], order]
    parts = parts.unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    plain = backgrounds(n, 64, device) * 2 - 1
    kinds = [plain, 0.15 * x + noise, blur, (x + x.flip(0)) / 2, parts]
    return one_of(torch.stack(kinds)).clamp(-1, 1)


@torch.no_grad()
def fresh_pictures(vae, glyphs, n, autocast):
    """n pictures and their labels. Half of them pass through the autoencoder with noise in the
    latents, since that is how a diffusion model's pictures come about; where the noise is strong,
    nothing is left to see. There are small animals, too: a model that is paid for simple pictures
    draws them."""
    x, labels = draw_batch(glyphs, n, least=0.4)
    nothing = torch.rand(n, device=x.device) < 0.2
    x = without_animal(x).where(nothing[:, None, None, None], x)
    half = x[: n // 2].contiguous(memory_format=torch.channels_last)
    with autocast():
        z = vae.encode(half).latent_dist.mode().float()
        lost, strength = torch.rand(2, len(z), 1, 1, 1, device=x.device)
        lost = lost < 0.15
        strong = 0.3 * z + (1 + 2 * strength) * torch.randn_like(z)
        weak = z + 0.4 * strength * torch.randn_like(z)
        z = torch.where(lost, strong, weak)
        x[: n // 2] = vae.decode(z).sample.float().clamp(-1, 1)
    nothing[: n // 2] |= lost.flatten()
    return x, labels.where(~nothing, NOTHING)


def spoil(x):
    """Faults that leave the animal what it is: blur, other colours, a patch that covers a part,
    noise."""
    n, device = len(x), x.device

    def rand(*shape):
        return torch.rand(*shape, device=device)

    small = F.adaptive_avg_pool2d(x, int(torch.randint(20, 48, ())))
    blurred = F.interpolate(small, 64, mode="bicubic")
    x = blurred.where(rand(n, 1, 1, 1) < 0.3, x)
    x = (0.6 + 0.5 * rand(n, 1, 1, 1)) * x + 0.4 * (rand(n, 3, 1, 1) - 0.5)
    grid = torch.linspace(0, 1, 64, device=device)
    inside = (grid - rand(n, 2, 1)).abs() < 0.17 * rand(n, 2, 1)  # (n, 2, 64)
    patch = inside[:, 0, :, None] & inside[:, 1, None, :] & (rand(n, 1, 1) < 0.4)
    x = (2 * rand(n, 3, 1, 1) - 1).where(patch[:, None], x)
    return (x + 0.3 * rand(n, 1, 1, 1) ** 2 * torch.randn_like(x)).clamp(-1, 1)


def train_clip(clip, tokenizer, vae, glyphs, work, seconds, autocast, batch=64, fresh_every=3):
    """Pictures against all 46 captions: many pictures share a caption, so CLIP's own loss over a
    batch would be wrong."""
    device = glyphs.device
    run = Run(work / "clip.pt", seconds, 1e-3, [clip])
    captions = [*(t.format(a).replace("a ant", "an ant") for t in TEMPLATES for a in ANIMALS), ""]
    how = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    captions = tokenizer(captions, **how).input_ids.to(device)
    first = torch.arange(NOTHING, device=device)
    pool = Pool(lambda n: fresh_pictures(vae, glyphs, n, autocast), 8192, batch)
    for _ in run.steps("clip"):
        if run.step % fresh_every == 0:
            pool.renew(run.step // fresh_every)
        x, labels = pool.draw()
        template = torch.randint(len(TEMPLATES), (NOTHING,), device=device)
        template *= torch.rand(NOTHING, device=device) < 0.5  # else the name alone
        ids = torch.cat([captions[template * NOTHING + first], captions[-1:]])
        run.learn(F.cross_entropy(clip(ids, spoil(x)).logits_per_image, labels))


def save_clip(clip, folder):
    """Write the model, emoji-diffusion's tokenizer and the images' normalisation, in files that
    transformers 4 opens too."""
    clip.save_pretrained(folder)
    # Not tokenizer.json: it would add padding of its own.
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(MODELS / "emoji-diffusion" / "tokenizer" / name, folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor",
        "do_resize": True, "size": {"shortest_edge": 64}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 64, "width": 64},
        "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


# ---------------------------------------------------- from the command line


def draw_sheet(folder, path, device):
    """All 45 with plain diffusers: 20 steps, eta 1, guidance 3."""
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    how = {"num_inference_steps": 20, "eta": 1.0, "guidance_scale": 3.0}
    images = pipe(ANIMALS, generator=generator, **how).images
    sheet = Image.new("RGB", (9 * 72 + 8, 5 * 84 + 8), "white")
    for i, (name, image) in enumerate(zip(ANIMALS, images)):
        x, y = 8 + i % 9 * 72, 8 + i // 9 * 84
        sheet.paste(image, (x, y))
        ImageDraw.Draw(sheet).text((x, y + 65), name, fill="black")
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.LANCZOS).save(path, quality=90)


def make_emoji_clip(args, glyphs, autocast):
    """Train the CLIP, with the autoencoder and the tokenizer of emoji-diffusion."""
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "emoji-diffusion" / "tokenizer")
    vae = AutoencoderKL.from_pretrained(MODELS / "emoji-diffusion" / "vae").float()
    vae.requires_grad_(False).to(args.device, memory_format=torch.channels_last)
    clip = make_clip(tokenizer).to(args.device)
    train_clip(clip, tokenizer, vae, glyphs, args.work, 60 * args.minutes, autocast)
    save_clip(clip.to("cpu"), args.out)


def make_emoji_diffusion(args, glyphs, autocast):
    """Train the three phases and save the pipeline in half precision."""
    seconds = 60 * args.minutes
    pipe = make_pipeline(args.out).to(args.device)
    teacher = make_teacher().to(args.device)
    for autoencoder in (teacher, pipe.vae):  # a third faster on a CPU; the UNet is not
        autoencoder.to(memory_format=torch.channels_last)
    train_teacher(teacher, glyphs, args.work, 0.07 * seconds, autocast)
    teacher.requires_grad_(False)
    train_unet(pipe, teacher, glyphs, args.work, 0.81 * seconds, autocast)
    train_student(pipe.vae, teacher, glyphs, args.work, 0.12 * seconds, autocast)
    labels = torch.arange(45, device=args.device)
    x = torch.cat([render(glyphs, labels) for _ in range(8)])
    with torch.no_grad():
        for name, model in (("teacher", teacher), ("autoencoder", pipe.vae)):
            error = F.mse_loss(model(x).sample, x)
            print(f"{name}: mean squared error {error:.4f} on [-1, 1]")
    pipe.to("cpu")
    # Not the text encoder: transformers 5 would keep it in half precision when it opens the file,
    # beside diffusers' float32 UNet.
    for module in (pipe.unet, pipe.vae):
        torch.nn.Module.half(module)
    pipe.save_pretrained(args.out)
    # Under the names of the files on the hub: transformers 5 opens both, transformers 4 only these.
    weights = pipe.text_encoder.state_dict()
    names = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
    save_file(names, args.out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--minutes", type=float, default=100, help="training time in all")
    add("--out", type=Path, help="default: in examples/models")
    add("--work", type=Path, default=EXAMPLES.parent / "runs/pretrain_emoji", help="of checkpoints")
    add("--font", help="path of NotoColorEmoji.ttf, if it is not where Debian puts it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--sheet", action="store_true", help="train nothing, draw the folder's sheet again")
    add("--clip", action="store_true", help="train the CLIP alone")
    args = parser.parse_args()
    args.out = args.out or MODELS / ("emoji-clip" if args.clip else "emoji-diffusion")

    def autocast():
        return torch.autocast(torch.device(args.device).type, torch.bfloat16)

    if args.clip or not args.sheet:
        torch.manual_seed(args.seed)
        torch.set_flush_denormal(True)  # denormal numbers make a CPU crawl
        args.work.mkdir(parents=True, exist_ok=True)
        glyphs = load_glyphs(args.font).to(args.device)
    if args.clip:
        make_emoji_clip(args, glyphs, autocast)
    elif not args.sheet:
        make_emoji_diffusion(args, glyphs, autocast)
    if not args.clip:
        draw_sheet(args.out, args.out / "sheet.jpg", args.device)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"done: {args.out}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

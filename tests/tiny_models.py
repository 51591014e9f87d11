"""Tiny random models for the tests of rewards.py, saved in the hub's layout so that the real
loading code runs on them."""

import torch
import transformers
from conftest import TEXT, letters_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}
VISION = {"image_size": 16, "patch_size": 8, **TOWER}
PIXELS = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}

# Chat templates of the two kinds there are: a space before every text, or a new line and the token
# that opens a text.
SPACED = """{% for turn in messages %}{{ turn.role.upper() }}:{% for part in turn.content %}\
{{ "<image>" if part.type == "image" else " " + part.text }}{% endfor %}{{ "\\n" }}{% endfor %}\
{{ "ASSISTANT:" if add_generation_prompt }}"""
LINED = """<s>{% for turn in messages %}{{ turn.role + "\\n" }}{% for part in turn.content %}\
{{ "<image>" if part.type == "image" else part.text }}{% endfor %}{{ "</s>\\n" }}{% endfor %}\
{{ "assistant\\n" if add_generation_prompt }}"""


def roughen(model, scale):
    """As they are drawn, random weights make all images and all texts come out nearly alike; these
    do not."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            gain = "norm" in name.lower() and name.endswith("weight")
            weights.copy_(torch.randn_like(weights) * scale + gain)
    return model


# ------------------------------------------------ CLIP, the aesthetic head


def save_clip(folder):
    """A CLIP that knows the letters a to z and reads at most 12 tokens, which its tokenizer's files
    do not say."""
    letters_tokenizer(folder).save_pretrained(folder)
    transformers.CLIPImageProcessor(**PIXELS).save_pretrained(folder)
    parts = {"text_config": {**TOWER, **TEXT}, "vision_config": VISION, "projection_dim": 8}
    model = roughen(transformers.CLIPModel(transformers.CLIPConfig(**parts)), 0.2)
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(folder)


def laion_layers(dim=8):
    """State dict of an aesthetic head: linear layers, numbered together with the dropout layers
    between them."""
    torch.manual_seed(0)
    sizes = {0: (dim, 12), 2: (12, 10), 4: (10, 6), 6: (6, 4), 7: (4, 1)}
    layers = {}
    for i, (n_in, n_out) in sizes.items():
        layers[f"layers.{i}.weight"] = torch.randn(n_out, n_in)
        layers[f"layers.{i}.bias"] = torch.randn(n_out)
    return layers


def save_laion_head(path, dim=8):
    """As a .safetensors file or as a pickle, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(laion_layers(dim), path)
    return path


# ------------------------------------------------ tokenizers, vision-language models, DeBERTa


def bpe_tokenizer(words, special, ends, **names):
    """A byte-level BPE tokenizer as GPT-2's. Each of `words` is one token, and another with a space
    (a "Ġ") in front; anything else is spelt. `ends` is a text ("$A") with the special tokens that
    the tokenizer puts around it."""
    vocab, merges = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())], []
    for word in words:
        for first, second in [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]:
            if first + second not in vocab:
                vocab.append(first + second)
                merges.append((first, second))
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    around = [(token, i) for i, token in enumerate(special) if token in ends]
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=around)
    names["additional_special_tokens"] = special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def chat_tokenizer(words=("Yes", "No", "figure", "image"), special=()):
    """Begins every text with <s>, as LLaVA's does."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
             "extra_special_tokens": {"image_token": "<image>"},
             "model_input_names": ["input_ids", "attention_mask"]}
    return bpe_tokenizer(words, ["<pad>", "<s>", "</s>", "<image>", *special], "<s> $A", **names)


def language_model(tokenizer):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"max_position_embeddings": 512, "num_key_value_heads": 2, **TOWER}
    return transformers.LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes)


def save_vlm(folder, model, processor):
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    roughen(model, 0.3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llava(folder, chat=SPACED, **tokenizer):
    """A LLaVA; an image of 16 x 16 pixels becomes 4 tokens."""
    tokenizer = chat_tokenizer(**tokenizer)
    parts = {"vision_config": transformers.CLIPVisionConfig(**VISION),
             "text_config": language_model(tokenizer)}
    config = transformers.LlavaConfig(**parts, image_token_index=3, image_seq_length=4)
    pixels = transformers.CLIPImageProcessor(**PIXELS)
    tokens = {"patch_size": 8, "vision_feature_select_strategy": "default",
              "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(pixels, tokenizer, chat_template=chat, **tokens)
    return save_vlm(folder, transformers.LlavaForConditionalGeneration(config), processor)


def save_idefics3(folder, chat=SPACED):
    """An Idefics3, which SmolVLM is; an image becomes one token for each of its four tiles of 16 x
    16 pixels and one for all."""
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer = chat_tokenizer(special=marks)
    parts = {"vision_config": VISION, "text_config": language_model(tokenizer)}
    config = transformers.Idefics3Config(**parts, image_token_id=3, scale_factor=2, pad_token_id=0)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    tokens = {"image_seq_len": 1, "chat_template": chat}
    images = transformers.Idefics3ImageProcessor(**sizes)
    processor = transformers.Idefics3Processor(images, tokenizer, **tokens)
    return save_vlm(folder, transformers.Idefics3ForConditionalGeneration(config), processor)


def save_deberta(folder):
    """A DeBERTa of 3 layers; its tokenizer says how much it can read, without which bert-score does
    not run."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), special))
    names["model_max_length"] = 256
    words = ["The", "image", "contains", "a"]
    tokenizer = bpe_tokenizer(words, special, "[CLS] $A [SEP]", **names)
    tokenizer.save_pretrained(folder)
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pad_token_id": 0}
    sizes = {**TOWER, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    model = transformers.DebertaModel(transformers.DebertaConfig(**sizes, **relative))
    roughen(model, 0.2).save_pretrained(folder)

"""Models that were not made here: what their files ask of a pipeline is honoured or refused in one
line, before there is a run; what cannot be trained is told by a trial; and what has no effect, or
cannot have one, is said. UNKNOWN is what decides for a setting that diffusers adds tomorrow."""

import copy
import inspect
import json
import re
import shutil

import diffusers
import pytest
import torch
from conftest import (
    BETAS,
    TINIEST,
    brightness,
    failure,
    flags,
    launch,
    make_policy,
    make_settings,
    read_metrics,
    save_tiny_pixels,
    tiny_unet,
)
from safetensors.torch import load_file, save_file

import ddpo


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_scheduler(folder, kind, **config):
    getattr(diffusers, kind)(**config).save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", kind])


def with_unet(folder, **config):
    tiny_unet(**{**TINIEST, **config}).save_pretrained(folder / "unet")


@pytest.fixture
def sd(tiniest_model, tmp_path):
    """A copy of a Stable Diffusion, to be changed."""
    return shutil.copytree(tiniest_model, tmp_path / "model")


def refused(model, tmp_path, capsys, **settings):
    """The one line that refuses a model; there is no run then."""
    line = failure(capsys, *flags(model, out=tmp_path / "run", **settings))
    assert f"--model {model}" in line and not (tmp_path / "run").exists()
    return line


# ---------------------------------------------------- what a model's files ask


OTHER_NOISE = [
    ("EDMDPMSolverMultistepScheduler", {}, "EDMDPMSolverMultistepScheduler"),
    ("EDMEulerScheduler", {}, "EDMEulerScheduler"),
    ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler"),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type continuous"),
    ("DDIMScheduler", {"thresholding": True}, "thresholding"),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "sigmoid"),
]


@pytest.mark.parametrize("kind, config, named", OTHER_NOISE)
def test_a_scheduler_of_other_noise_levels_or_steps(kind, config, named, sd, tmp_path, capsys):
    with_scheduler(sd, kind, **config)
    assert named in refused(sd, tmp_path, capsys)


@pytest.mark.parametrize("kind, config", [
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    ("UniPCMultistepScheduler", {"trained_betas": torch.linspace(1e-3, 2e-2, 1000).tolist()}),
])  # fmt: skip
def test_a_scheduler_of_these_noise_levels(kind, config, sd):
    """Whatever steps it would take itself, the network sees the noise that it was trained on."""
    if kind.startswith("LMS"):
        pytest.importorskip("scipy")
    with_scheduler(sd, kind, **{"steps_offset": 1, **BETAS, **config})
    own = getattr(diffusers, kind).from_pretrained(sd, subfolder="scheduler")
    policy, _ = make_policy(sd)
    torch.testing.assert_close(policy.levels[0] ** 2, own.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_a_unet_that_knows_the_guidance(sd, tmp_path, capsys):
    with_unet(sd, time_cond_proj_dim=8)
    assert "unet has time_cond_proj_dim 8" in refused(sd, tmp_path, capsys)


def test_a_vae_with_a_mean(sd, tmp_path, capsys):
    change(sd / "vae/config.json", latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    assert "vae has latents_mean [0.5, " in refused(sd, tmp_path, capsys)


def test_all_that_ddim_knows_is_honoured(tmp_path):
    """Of a pipeline of pixels, whose scheduler diffusers does not change on loading."""
    said = {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04, "steps_offset": 3}
    said |= {"beta_schedule": "scaled_linear", "clip_sample_range": 2.0, "set_alpha_to_one": False}
    said |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    said |= {"rescale_betas_zero_snr": True}
    model = save_tiny_pixels(tmp_path / "model", scheduler=diffusers.DDIMScheduler(**said))
    policy, _ = make_policy(model)
    assert {k: policy.scheduler.config[k] for k in said} == said
    own = diffusers.DDIMScheduler(**said)
    own.set_timesteps(4)
    assert policy.scheduler.timesteps.tolist() == own.timesteps.tolist()


# ---------------------------------------------------- all that they can ask

INSIDE = "inside the network"
DONE = "honoured"
REFUSED = "refused, but for the values in ddpo.KNOWN"
TRIAL = "what needs more than noise, time and text ends in Policy.try_out"
SAMPLER = "a choice of the sampler: here it is always DDIM's step"
NOT_HERE = "of no consequence for the policy"

SETTINGS = {
    "UNet": {
        INSIDE: """center_input_sample flip_sin_to_cos freq_shift down_block_types mid_block_type
            up_block_types only_cross_attention block_out_channels layers_per_block
            downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups norm_eps
            cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block
            encoder_hid_dim attention_head_dim num_attention_heads dual_cross_attention
            use_linear_projection upcast_attention resnet_time_scale_shift resnet_skip_time_act
            resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn
            timestep_post_act conv_in_kernel conv_out_kernel attention_type
            class_embeddings_concat mid_block_only_cross_attention cross_attention_norm
            addition_embed_type_num_heads downsample_type upsample_type attn_norm_num_groups
            add_attention num_train_timesteps""",
        DONE: "sample_size in_channels addition_time_embed_dim",
        REFUSED: "time_cond_proj_dim",
        TRIAL: """out_channels class_embed_type num_class_embeds addition_embed_type
            encoder_hid_dim_type projection_class_embeddings_input_dim""",
    },
    "VAE": {
        INSIDE: """down_block_types up_block_types layers_per_block act_fn latent_channels
            norm_num_groups use_quant_conv use_post_quant_conv mid_block_add_attention""",
        DONE: "block_out_channels scaling_factor",
        REFUSED: "latents_mean",
        TRIAL: "out_channels",
        NOT_HERE: """in_channels sample_size
            force_upcast shift_factor latents_std""",  # float32; of flows; nothing without a mean
    },
    "scheduler": {
        DONE: """num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample
            clip_sample_range set_alpha_to_one steps_offset timestep_spacing
            rescale_betas_zero_snr""",
        REFUSED: "prediction_type thresholding use_flow_sigmas timestep_type",
        SAMPLER: """variance_type skip_prk_steps interpolation_type use_karras_sigmas
            use_exponential_sigmas use_beta_sigmas sigma_min sigma_max final_sigmas_type
            solver_order algorithm_type solver_type lower_order_final euler_at_final use_lu_lambdas
            lambda_min_clipped predict_x0 disable_corrector solver_p original_inference_steps
            timestep_scaling""",
        NOT_HERE: """dynamic_thresholding_ratio sample_max_value
            flow_shift use_dynamic_shifting time_shift_type shift_terminal""",  # of what is refused
    },
    "pipeline": {
        DONE: """unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler
            force_zeros_for_empty_prompt""",
        NOT_HERE: """safety_checker feature_extractor image_encoder requires_safety_checker
            add_watermarker""",
    },
}
CLASSES = {
    "UNet": "UNet2DConditionModel UNet2DModel",
    "VAE": "AutoencoderKL",
    "scheduler": """DDIMScheduler DDPMScheduler PNDMScheduler EulerDiscreteScheduler
        EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler UniPCMultistepScheduler
        LCMScheduler""",
    "pipeline": " ".join(ddpo.KINDS),
}
UNKNOWN = (
    "{} of diffusers has the setting {}, about which nobody has decided. Does it change the"
    " pictures that a pipeline makes? Then Policy honours it as the pipeline does, or ddpo.KNOWN"
    " has the value that it may have. Then write here which"
)


@pytest.mark.parametrize("part", SETTINGS)
def test_every_setting_of_diffusers_is_decided(part):
    """It is no failure if a version of diffusers lacks some."""
    decided = " ".join(SETTINGS[part].values()).split()
    assert len(decided) == len(set(decided)), "twice in the table"
    for name in CLASSES[part].split():
        for setting in list(inspect.signature(getattr(diffusers, name).__init__).parameters)[1:]:
            assert setting in decided, UNKNOWN.format(name, setting)


def test_what_is_refused_is_in_the_table():
    refused = " ".join(decided.get(REFUSED, "") for decided in SETTINGS.values()).split()
    assert sorted(refused) == sorted(ddpo.KNOWN)


def test_a_pipeline_reads_nothing_that_is_left_to_the_network():
    """diffusers' own code tells which settings of their parts the pipelines act on."""
    parts = {"unet": "UNet", "vae": "VAE", "scheduler": "scheduler"}
    seen = set()
    for name in ddpo.KINDS:
        source = inspect.getsource(getattr(diffusers, name))
        seen |= set(re.findall(r"(?<!`)\b(unet|vae|scheduler)\.config\.([a-z]\w*)", source))
    assert {("vae", "scaling_factor"), ("unet", "sample_size")} <= seen
    for part, setting in seen:
        inside = SETTINGS[parts[part]].get(INSIDE, "").split()
        assert setting not in inside, UNKNOWN.format(parts[part], setting)


# ---------------------------------------------------- the trial


def labelled(folder):
    with_unet(folder, num_class_embeds=3)


def inpainting(folder):
    with_unet(folder, in_channels=9)


def learned_variance(folder):
    with_unet(folder, out_channels=8)


def without_size(folder):
    change(folder / "unet/config.json", sample_size=None)


@pytest.mark.parametrize("damage, named", [
    (labelled, "class_labels"),
    (inpainting, "channels|its UNet"),
    (learned_variance, "its UNet"),
    (without_size, "sample_size|NoneType"),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_a_stable_diffusion_that_cannot_be_trained(damage, named, sd, tmp_path, capsys):
    damage(sd)
    assert re.search(named, refused(sd, tmp_path, capsys))


@pytest.mark.parametrize("config, named", [
    ({"num_class_embeds": 3}, "class_labels"),
    ({"class_embed_type": "timestep"}, "class_labels"),
    ({"in_channels": 2, "out_channels": 2}, ""),
    ({"in_channels": 4, "out_channels": 4}, ""),
    ({"out_channels": 6}, "its UNet predicts more than noise"),
    ({"sample_size": None}, "sample_size|NoneType"),
], ids=str)  # fmt: skip
def test_a_ddpm_that_cannot_be_trained(config, named, tmp_path, capsys):
    model = save_tiny_pixels(tmp_path / "model", **config)
    line = refused(model, tmp_path, capsys, guidance_scale=3.0)
    assert re.search(f"cannot be trained .*({named})", line)


def test_a_ddpm_with_the_unet_of_a_text(tmp_path, capsys):
    model = save_tiny_pixels(tmp_path / "model")
    with_unet(model, in_channels=3, out_channels=3)
    change(model / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    assert "encoder_hidden_states" in refused(model, tmp_path, capsys, guidance_scale=3.0)


def test_a_ddpm_of_grey_pictures_is_trained(tmp_path):
    model = save_tiny_pixels(tmp_path / "model", in_channels=1, out_channels=1)
    assert len(launch(model, tmp_path / "run", epochs=1, guidance_scale=3.0)) == 2


def test_a_whole_unet_with_weights_that_need_no_gradient(tmp_path):
    """Over a single pixel attention is 1, whatever its queries and keys are."""
    blocks = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
    more = {"block_out_channels": (8,) * 4, "sample_size": 8}
    model = save_tiny_pixels(tmp_path / "model", **blocks, **more)
    assert make_policy(model, lora_rank=0, guidance_scale=3.0)[0].weights


def test_a_text_encoder_of_which_a_weight_is_missing(sd, tmp_path, capsys):
    """transformers would draw it at random."""
    path = sd / "text_encoder/model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith("fc1.weight"))]
    save_file(weights, path, {"format": "pt"})
    assert "fc1.weight" in refused(sd, tmp_path, capsys)


def quantised(folder, config):
    """The UNet, as torchao quantises it and diffusers saves it."""
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(getattr(quantization, config)())
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", quantization_config=config)  # fmt: skip
    unet.save_pretrained(folder / "unet")


def test_quantised_activations_cut_the_gradient(sd, tmp_path, capsys):
    quantised(sd, "Int8DynamicActivationInt8WeightConfig")
    line = refused(sd, tmp_path, capsys)
    assert "no gradient" in line and line.endswith("is it quantised?)")


def test_quantised_weights_take_a_lora_only(sd, tmp_path, capsys):
    quantised(sd, "Int8WeightOnlyConfig")
    for precision in ("fp32", "bf16"):
        _, row = launch(sd, tmp_path / precision, brightness, epochs=1, precision=precision)
        assert float(row["ratio_error"]) == 0 and float(row["grad_norm"]) > 0
    line = refused(sd, tmp_path, capsys, lora_rank=0)
    assert re.search("no gradient comes to its .*(Int8|Quantized)Tensor.*is it quantised", line)


# ---------------------------------------------------- half precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [4, 0])
def test_a_step_moves_the_output_in_half_precision(rank, precision, tiniest_model):
    """As far as it moves a copy of the network: autocast keeps its casts of the weights to the end
    of its outermost block, so each call has its own. And the weights that are trained are float32,
    for AdamW makes NaN of those in fp16."""
    policy, settings = make_policy(tiniest_model, lora_rank=rank, precision=precision)
    run = ddpo.Run(settings, policy)
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    call = x_t, torch.tensor([900, 500]), policy.encode(["cat", "bee"])
    before = policy.predict(*call)
    run.scaler.scale(before.mean()).backward()
    assert run.step() > 0
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in policy.weights)
    after = policy.predict(*call)
    policy.unet = copy.deepcopy(policy.unet)
    assert torch.equal(policy.predict(*call), after) and after.mean() < before.mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lora_in_half_a_unet_is_whole(dtype):
    unet = tiny_unet(**TINIEST).to(dtype)
    for layer in ddpo.add_lora(unet, 4).values():
        assert layer.base.weight.dtype == dtype
        assert layer.lora.dtype == torch.float32


# ---------------------------------------------------- the number of steps


@pytest.mark.parametrize("steps", [1000, 1001])
def test_more_steps_than_there_are(steps, tiniest_model, tmp_path, capsys):
    """At 1000 the first of them would be t = 1000, by Stable Diffusion's offset of 1."""
    line = failure(capsys, *flags(tiniest_model, out=tmp_path / "run", steps=steps))
    assert line.startswith(f"ddpo.py: error: --steps {steps}: more than this model's scheduler")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps, start", [(501, 501), (600, 600), (999, None), (500, None)])
def test_steps_that_begin_late(steps, start, tiniest_model, capsys):
    """They are spaced by whole numbers: 600 of 1000 are the first 600."""
    policy, _ = make_policy(tiniest_model, steps=steps)
    line = f"--steps {steps} begins at t = {start} of 1000, but from pure noise\n"
    assert capsys.readouterr().out == (line if start else "")
    assert start in (None, int(policy.scheduler.timesteps[0]))


# ---------------------------------------------------- what has no effect is said


VAIN = "nothing was learned: all images, or all of each group, got the same reward\n"


def of_epochs(*rewards):
    """A reward whose values in the n-th epoch are those of the n-th function of the prompts."""
    asked = []

    def reward(images, prompts):
        asked.append(prompts)
        return rewards[min(len(asked), len(rewards)) - 1](images, prompts)
    return reward


def alike(images, prompts):
    return torch.full((len(images),), 0.1)  # has no exact mean in float32


def by_prompt(images, prompts):
    return [sum(map(ord, prompt)) for prompt in prompts]


@pytest.mark.parametrize("group", [1, 4])
def test_a_reward_that_is_the_same_for_all(group, tiniest_model, tmp_path, capsys):
    launch(tiniest_model, tmp_path / "run", alike, epochs=3, samples_per_prompt=group)
    said = capsys.readouterr().out
    assert said.count(VAIN) == 1 and said.index("epoch 1/3") < said.index(VAIN)
    assert said.index(VAIN) < said.index("epoch 2/3")


def test_a_reward_that_differs_between_groups_only(tiniest_model, tmp_path, capsys):
    given = {"images_per_epoch": 32, "batch_size": 32, "samples_per_prompt": 4}
    launch(tiniest_model, tmp_path / "run", by_prompt, epochs=2, **given)
    assert capsys.readouterr().out.count(VAIN) == 1
    assert float(read_metrics(tmp_path / "run")[1]["reward_std"]) > 0


def test_a_reward_that_is_the_same_later(tiniest_model, tmp_path, capsys):
    """One call is that of the first evaluation."""
    reward = of_epochs(brightness, brightness, alike)
    given = {"epochs": 3, "batch_size": 8, "eval_every": 9}
    launch(tiniest_model, tmp_path / "run", reward, **given)
    said = capsys.readouterr().out
    assert said.count(VAIN) == 1
    assert said.index("epoch 2/3") < said.index(VAIN) < said.index("epoch 3/3")


def test_a_reward_that_teaches(tiniest_model, tmp_path, capsys):
    launch(tiniest_model, tmp_path / "run", brightness, epochs=1)
    assert VAIN not in capsys.readouterr().out


# ---------------------------------------------------- flags on a DDPM


@pytest.fixture
def pixels(tmp_path):
    return save_tiny_pixels(tmp_path / "pixels")


@pytest.mark.parametrize("given, asked, evaluated", [
    ({}, {""}, {""}),
    ({"prompts": "text"}, {"a seven", "an eight"}, {"a seven", "an eight"}),
    ({"prompts": "text", "eval_prompts": "other"}, {"a seven", "an eight"}, {"a nine"}),
    ({"eval_prompts": "other"}, {""}, {"a nine"}),
], ids=["none", "prompts", "both", "of evaluations"])  # fmt: skip
def test_prompts_for_a_ddpm_are_for_its_reward(given, asked, evaluated, pixels, tmp_path):
    (tmp_path / "text").write_text("a seven\nan eight\n")
    (tmp_path / "other").write_text("a nine\n")
    seen = []

    def reward(images, prompts):
        seen.append(prompts)
        return images.mean((1, 2, 3))

    given = {name: tmp_path / file for name, file in given.items()}
    sizes = {"epochs": 1, "images_per_epoch": 16, "guidance_scale": 3.0}
    sizes |= {"batch_size": 16, "updates_per_epoch": 1}
    launch(pixels, tmp_path / "run", reward, **sizes, **given)
    before, epoch, after = map(set, seen)
    assert epoch == asked and before == after == evaluated


def test_a_ddpm_has_no_guidance(pixels, tmp_path, capsys):
    line = refused(pixels, tmp_path, capsys, guidance_scale=7.0)
    assert line.endswith("has no guidance: leave out --guidance-scale")
    with pytest.raises(ddpo.UserError, match="no guidance"):
        ddpo.Policy(make_settings(pixels, guidance_scale=1.0), torch.device("cpu"))


def test_a_set_that_is_named_counts_as_given(pixels, tmp_path):
    """The same as the default of a model with prompts."""
    seen = []

    def reward(images, prompts):
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    launch(pixels, tmp_path / "run", reward, epochs=1, prompts="animals", guidance_scale=3.0)
    assert set(seen) <= set(ddpo.load_prompts("animals")) and len(set(seen)) > 1


class TwoPolicies(ddpo.Policy):
    def predict(self, x_t, t, cond):
        return super().predict(x_t, t, cond) * (0.9 if torch.is_grad_enabled() else 1)


@pytest.mark.parametrize("kind, times", [(ddpo.Policy, 0), (TwoPolicies, 2)])
def test_two_policies_are_told(kind, times, tiniest_model, tmp_path, capsys):
    launch(tiniest_model, tmp_path / "run", parts={"policy_class": kind})
    assert capsys.readouterr().out.count("sampling and learning are two policies") == times


def test_a_gradient_that_is_cut_off_is_refused(tiniest_model, monkeypatch):
    """As by layers that are quantised on the way: below them nothing would learn."""
    load = ddpo.load_pipeline

    def cut(*args):
        pipe = load(*args)
        for name, layer in pipe.unet.named_modules():
            if name.endswith("to_out.0"):
                layer.register_forward_pre_hook(lambda layer, inputs: inputs[0].detach())
        return pipe

    monkeypatch.setattr(ddpo, "load_pipeline", cut)
    with pytest.raises(ValueError, match="no gradient comes to its Parameter"):
        ddpo.Policy(make_settings(tiniest_model, lora_rank=4), torch.device("cpu"))

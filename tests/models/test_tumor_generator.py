"""Tumor generator: the paper's equations and counts, its stages, and images that plain diffusers makes alike."""

import dataclasses
import math
import os
import re
import shutil
import signal

import open_clip
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, StableDiffusionControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dist import World
from bushpc.errors import ConfigError, WeightsError
from bushpc.models.tumor_generator import (
    SD_V1_5,
    TumorGenerator,
    clip_tokenizer,
    kl_divergence,
    sampled,
    split_moments,
)
from bushpc.nn.recompute import recompute
from bushpc.train.loop import Stopped
from bushpc.train.track import Tracker
from tests.conftest import write_run_record

TINY = {
    **{"image_size": 32, "vae_channels": (8, 16), "mask_channels": (8, 16), "unet_channels": (16, 32), "unet_heads": 2},
    **{"text_width": 16, "text_layers": 1, "text_heads": 2, "lora_rank": 2, "steps": 4},
}
SEEDS = [11, 12, 13, 14]


def overrides(**changes):
    """The tiny model's settings as words of a command."""
    words = {name: list(value) if isinstance(value, tuple) else value for name, value in {**TINY, **changes}.items()}
    return [f"model.{name}={value}" for name, value in words.items()]


@pytest.fixture
def generator_config():
    """generator_config(name="tumor_generator_small", **changes) -> its Config; tiny at 32 pixels, or as it is."""

    def make(name="tumor_generator_small", **changes):
        small = TINY if name == "tumor_generator_small" else {}
        return dataclasses.replace(compose([f"model={name}"]).model, **{**small, **changes})

    return make


@pytest.fixture
def tiny(generator_config):
    """tiny(**changes) -> a tiny generator in eval mode, whose ControlNet is not zero any more."""

    def make(**changes):
        model = TumorGenerator(generator_config(**changes)).eval()
        if changes.get("stage", "controlnet") == "controlnet":
            _disturb(model.controlnet.parameters())
        return model

    return make


@pytest.fixture
def batch(make_batch):
    return make_batch(size=32)


@pytest.fixture
def base(tiny, tmp_path):
    """A tiny generator, and the diffusers folder that it saved."""
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def _disturb(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


def _disturb_adapter(model):
    _disturb(parameter for name, parameter in model.unet.named_parameters() if "lora_" in name)


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _generate(model, batch):
    return model.generate(batch.mask_BKHW[:, 0], batch.conditions["captions"], SEEDS)


def _by_diffusers(folder, model, batch, prepare=lambda pipeline: None):
    """What a plain pipeline makes of the folder, with the generator's noise, steps and guidance."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    return pipeline(
        batch.conditions["captions"],
        image=batch.mask_BKHW.expand(-1, 3, -1, -1),
        num_inference_steps=model.config.steps,
        guidance_scale=model.config.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images


# --- the paper's equations and counts ---------------------------------------------------------------------------


def test_latents_and_their_divergence_are_equations_1_and_4():
    moments, noise = torch.randn(3, 8, 5, 5), torch.randn(3, 4, 5, 5)
    theirs = DiagonalGaussianDistribution(moments)
    mu, log_omega2 = split_moments(moments)
    torch.testing.assert_close(sampled(mu, log_omega2, noise), theirs.mean + theirs.std * noise)
    torch.testing.assert_close(kl_divergence(mu, log_omega2), theirs.kl())


def test_noised_latents_are_equation_2_with_stable_diffusions_noise(tiny):
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    z_0, noise = torch.randn(2, 3, 4, 5, 5)
    t_B = torch.tensor([0, 500, 999])
    torch.testing.assert_close(tiny().noised(z_0, noise, t_B), theirs.add_noise(z_0, noise, t_B))


def test_the_loss_of_unet_and_controlnet_is_equation_3(tiny, batch):
    model = tiny(caption_dropout=0.5, latent_scale=0.7)
    torch.manual_seed(5)
    losses = model(batch)
    torch.manual_seed(5)
    mu_shape = (4, 4, 16, 16)
    first, t_B, draws, noise = torch.randn(mu_shape), torch.randint(1000, (4,)), torch.rand(4), torch.randn(mu_shape)
    pipeline, x = model.pipeline(), 2 * batch.image_BCHW - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(x).latent_dist
        z_0 = 0.7 * (posterior.mean + posterior.std * first)
        z_t = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(z_0, noise, t_B)
        captions = [
            "" if draw < 0.5 else caption for draw, caption in zip(draws, batch.conditions["captions"], strict=True)
        ]
        assert "" in captions
        assert captions != [""] * 4, "the case is degenerate"
        e, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
        more = {"encoder_hidden_states": e, "return_dict": False}
        down, mid = pipeline.controlnet(z_t, t_B, controlnet_cond=batch.mask_BKHW.expand(-1, 3, -1, -1), **more)
        more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        expected = (pipeline.unet(z_t, t_B, **more)[0] - noise).square().mean()
    assert losses.terms.keys() == {"mse"}
    assert float(losses.total) == pytest.approx(float(expected), rel=1e-5)


def test_the_vaes_loss_is_its_reconstruction_and_equation_5(generator_config, batch):
    model = TumorGenerator(generator_config(stage="vae", kl_weight=0.3))
    torch.manual_seed(5)
    with torch.no_grad():
        losses = model(batch)
        torch.manual_seed(5)
        x, noise = 2 * batch.image_BCHW - 1, torch.randn(4, 4, 16, 16)
        posterior = model.vae.encode(x).latent_dist
        back = model.vae.decode(posterior.mean + posterior.std * noise).sample
    expected = ((back - x).square().sum(dim=(1, 2, 3)) + 0.3 * posterior.kl()).mean() / x[0].numel()
    assert losses.terms.keys() == {"reconstruction", "kl"}
    assert float(losses.total) == pytest.approx(float(expected), rel=1e-5)


def test_parameters_are_stable_diffusions_and_those_of_table_2(generator_config):
    config = generator_config("tumor_generator", pretrained=False)
    trained = {}
    with torch.device("meta"):
        for stage, rank in (("controlnet", 8), ("full", 8), ("lora", 2), ("lora", 4), ("lora", 8)):
            model = TumorGenerator(dataclasses.replace(config, stage=stage, lora_rank=rank))
            trained[stage, rank] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        vae = _count(TumorGenerator(dataclasses.replace(config, stage="vae")))
    controlnet, outside = 361_279_120, model.outside_state()
    assert trained == {
        ("controlnet", 8): 859_520_964 + controlnet,
        ("full", 8): 859_520_964,
        ("lora", 2): 398_592,
        ("lora", 4): 797_184,
        ("lora", 8): 1_594_368,
    }
    assert {name: _count(module) for name, module in outside.items()} == {"vae": vae, "text_encoder": 123_060_480}
    assert model.parameter_count() == 859_520_964 + 1_594_368 + controlnet + 123_060_480 + vae


def test_captions_become_clips_tokens_filled_up_with_the_end(batch):
    captions = ["", *batch.conditions["captions"], "word " * 100]
    ids = clip_tokenizer()(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    theirs = open_clip.tokenizer.tokenize(captions)  # which fills up with 0
    end = 49407
    filled = torch.where(theirs == 0, end, theirs)
    assert torch.equal(ids.input_ids, filled)
    assert clip_tokenizer().pad_token_id == end


# --- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", 3.0), ("unipc", 1.0)])
def test_generates_what_a_plain_pipeline_makes_of_the_saved_folder(tiny, batch, tmp_path, sampler, guidance):
    model = tiny(sampler=sampler, guidance=guidance, latent_scale=0.5)
    model.save_pretrained(tmp_path)
    ours = _generate(model, batch)
    assert ours.shape == (4, 3, 32, 32)
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert ours.std() > 0.05, "the case is degenerate"
    torch.testing.assert_close(ours, _by_diffusers(tmp_path, model, batch), rtol=0, atol=1e-5)


def test_an_image_depends_on_its_mask_caption_and_seed_and_on_no_neighbour(tiny, batch):
    model = tiny()
    together, mask_BHW = _generate(model, batch), batch.mask_BKHW[:, 0]
    for i in (0, 3):
        alone = model.generate(mask_BHW[i : i + 1], batch.conditions["captions"][i : i + 1], SEEDS[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    others = [
        model.generate(1 - mask_BHW, batch.conditions["captions"], SEEDS),
        model.generate(mask_BHW, batch.conditions["captions"][::-1], SEEDS),
        model.generate(mask_BHW, batch.conditions["captions"], SEEDS[::-1]),
    ]
    for other in others:
        assert all(float((ours - theirs).abs().max()) > 1e-4 for ours, theirs in zip(together, other, strict=True))


def test_an_adapter_of_this_base_is_taken_over_and_pipelines_load_it_too(tiny, base, batch, tmp_path):
    model, folder = base
    plain = _generate(model, batch)
    adapted = {}
    for name, rank in (("udiat", 2), ("stu", 3)):
        trained = tiny(stage="lora", base=str(folder), lora_rank=rank)
        assert torch.equal(_generate(trained, batch), plain)  # B of (8) is zero before training
        _disturb_adapter(trained)
        adapted[name] = _generate(trained, batch)
        assert not torch.equal(adapted[name], plain)
        model.load_adapter(trained, name)
        assert torch.equal(_generate(model, batch), adapted[name])
    for name in ("udiat", "stu"):
        model.use_adapter(name)
        assert torch.equal(_generate(model, batch), adapted[name])
    model.use_adapter(None)
    assert torch.equal(_generate(model, batch), plain)

    trained.save_pretrained(tmp_path / "adapted")
    without = _by_diffusers(tmp_path / "adapted", model, batch)
    torch.testing.assert_close(without, plain, rtol=0, atol=1e-5)
    ours = _by_diffusers(folder, model, batch, lambda pipeline: pipeline.load_lora_weights(str(tmp_path / "adapted")))
    torch.testing.assert_close(ours, adapted["stu"], rtol=0, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(tiny, base):
    model, folder = base
    trained = tiny(stage="lora", base=str(folder))
    with torch.no_grad():
        model.controlnet.conv_in.bias += 1e-3
    with pytest.raises(ConfigError, match=r"another base .*model\.base="):
        model.load_adapter(trained, "other")
    with pytest.raises(ConfigError, match=r"model\.stage=controlnet: only lora"):
        model.load_adapter(model, "none")


# --- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("vae", r"vae\."),
        ("controlnet", r"unet\.|controlnet\."),
        ("full", r"unet\."),
        ("lora", r"unet\..*\.(to_q|to_k|to_v|to_out\.0)\.lora_[AB]\."),
    ],
)
def test_a_stage_trains_exactly_what_it_says(tiny, batch, stage, trained):
    model = tiny(stage=stage).train()
    for _ in range(3):  # the ControlNet's zero convolutions and the adapters' B let nothing through before they move
        model.zero_grad()
        model(batch).total.backward()
        _disturb(p for p in model.parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad is not None and parameter.grad.any()) == bool(re.match(trained, name)), name
    for module in model.outside_state().values():
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("stage", "factor"), [("vae", 0.5), ("controlnet", 0.6), ("full", 0.6)])
def test_learns_one_batch_by_heart(tiny, batch, stage, factor):
    model = tiny(stage=stage, kl_weight=0.0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    totals = []
    for step in range(40):
        torch.manual_seed(step % 4)
        optimizer.zero_grad()
        losses = model(batch)
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total))
    assert sum(totals[-4:]) < factor * sum(totals[:4])


def test_given_moments_replace_the_vae(tiny, batch):
    model = tiny()
    given = dataclasses.replace(
        batch, features=model.features(batch.image_BCHW), image_BCHW=torch.full_like(batch.image_BCHW, math.nan)
    )
    with torch.no_grad():
        losses = []
        for each in (given, batch):
            torch.manual_seed(3)
            losses.append(model(each).total)
        assert torch.equal(*losses)
        scores = [model.predict(each).scores["denoising_mse"] for each in (given, batch)]
    assert torch.equal(*scores)
    assert dataclasses.replace(model.config, stage="vae").feature_settings == {}


def test_a_score_follows_from_the_image_and_its_key_alone(tiny, batch):
    model = tiny()
    with torch.no_grad():
        whole = model.predict(batch).scores["denoising_mse"]
        torch.manual_seed(9)
        parts = torch.cat([model.predict(part).scores["denoising_mse"] for part in batch.split(2)])
        renamed = model.predict(dataclasses.replace(batch, keys=["other"] * 4)).scores["denoising_mse"]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert ((renamed - whole).abs() > 1e-4).all()
    # A network that predicts nothing is off by the noise, whose mean square is 1: 3 sigma of 4 x 4096 draws.
    for parameter in (*model.unet.conv_out.parameters(),):
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        none = model.predict(batch).scores["denoising_mse"]
    torch.testing.assert_close(none, torch.ones(4), rtol=0, atol=3 * math.sqrt(2 / (4 * 4 * 16 * 16)))


def test_recomputing_blocks_changes_no_gradient(tiny, batch):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = tiny().train()
        if again:
            assert recompute(model, model.config.blocks) > 10
        torch.manual_seed(1)
        model(batch).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_what_is_frozen_is_the_same_from_any_seed_and_in_no_checkpoint(generator_config):
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = TumorGenerator(generator_config())
        states.append({name: module.state_dict() for name, module in model.outside_state().items()})
    assert {name.partition(".")[0] for name in model.state_dict()} == {"unet", "controlnet"}
    for name in ("vae", "text_encoder"):
        assert all(torch.equal(states[0][name][key], states[1][name][key]) for key in states[0][name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "unet"}, "unknown model.stage 'unet'"),
        ({"sampler": "ddpm"}, "unknown model.sampler 'ddpm'; did you mean 'ddim'"),
        ({"lora_rank": 0}, "model.lora_rank=0: must be ≥ 1"),
        ({"steps": 30}, "steps=30 with model.sampler=ddim: must be one of 1, 2, 4"),
        ({"steps": 1001, "sampler": "unipc"}, "steps=1001: must be ≥ 1 and ≤ 1000"),
        ({"guidance": 0.5}, "guidance=0.5: must be ≥ 1"),
        ({"caption_dropout": 1.0}, "caption_dropout=1.0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"latent_scale": 0.0}, "latent_scale=0.0"),
        ({"image_size": 30}, "image_size=30 is not a multiple of 4.*nearest is 32"),
        ({"unet_channels": (16, 30)}, "unet_channels=.*multiples of model.groups=8"),
        ({"unet_channels": (16,)}, "unet_channels=.*2 or more"),
        ({"mask_channels": (8,)}, "mask_channels=.*as many numbers are needed"),
        ({"unet_heads": 3}, "16 is not a multiple of model.unet_heads=3"),
        ({"pretrained": True}, "loads Stable Diffusion v1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(generator_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        generator_config(**changes)


def test_a_stage_starts_from_the_staged_files_that_its_base_lacks(generator_config, base):
    full = generator_config("tumor_generator")
    files = {stage: dataclasses.replace(full, stage=stage).weight_files() for stage in ("vae", "controlnet")}
    assert files == {"vae": [SD_V1_5["vae"]], "controlnet": [SD_V1_5[name] for name in ("vae", "unet", "text_encoder")]}
    _, folder = base
    shutil.rmtree(folder / "unet")
    for config in (generator_config(base=str(folder)), generator_config(base=str(folder), stage="vae")):
        assert config.weight_files() == []
    with pytest.raises(ConfigError, match=r"stage=lora with model.base=null.*bushpc export"):
        dataclasses.replace(full, stage="lora").weight_files()
    with pytest.raises(ConfigError, match="has no unet with its safetensors"):
        generator_config(base=str(folder), stage="lora").weight_files()


def test_each_fold_starts_from_its_own_folder_of_an_export_and_all_from_one_that_is_given(
    tiny, tmp_path, phantom_folder
):
    for k in range(5):
        tiny().save_pretrained(tmp_path / "export" / f"fold{k}")
    words = [
        "model=tumor_generator_small",
        *overrides(),
        f"data.root={phantom_folder}",
        f"runs_dir={tmp_path / 'runs'}",
    ]

    def bases(base):
        return [cell.model.base for cell in cv_plan(compose([*words, f"model.base={base}"])).cells.values()]

    assert bases(tmp_path / "export") == [str(tmp_path / "export" / f"fold{k}") for k in range(5)]
    assert bases(tmp_path / "export" / "fold1") == [str(tmp_path / "export" / "fold1")] * 5
    shutil.rmtree(tmp_path / "export" / "fold0")
    with pytest.raises(ConfigError, match=r"model\.base=.*fold0 has no vae"):
        bases(tmp_path / "export")


def test_a_base_that_does_not_fit_is_refused(generator_config, base, tmp_path):
    _, folder = base
    for changes, message in (
        ({"base": str(tmp_path / "nowhere")}, "has no vae or unet or text_encoder or controlnet"),
        ({"base": str(folder), "unet_layers": 2}, "its unet has layers_per_block 1, and these settings make 2"),
        ({"base": str(folder), "latent_scale": 0.5}, "its vae has scaling_factor 1.0, and these settings make 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            generator_config(**changes).weight_files()
    (folder / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(ConfigError, match="has an adapter in addition to its UNet"):
        generator_config(base=str(folder)).weight_files()


def test_staged_files_are_read_by_the_names_of_their_time(generator_config, monkeypatch, tmp_path):
    with torch.device("meta"):
        shapes = TumorGenerator(generator_config("tumor_generator", pretrained=False)).outside_state()
    tiny = TumorGenerator(generator_config())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    states = {
        "vae": {_replaced(name, old): value for name, value in tiny.frozen_vae.net.state_dict().items()},
        "text_encoder": {f"text_model.{name}": value for name, value in tiny.text.net.state_dict().items()},
        "unet": tiny.unet.state_dict(),
    }
    assert any("proj_attn" in name for name in states["vae"])
    assert shapes["vae"].state_dict().keys() & states["vae"].keys()
    states["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, state in states.items():
        safetensors.torch.save_file({k: v + 1 for k, v in state.items()}, tmp_path / SD_V1_5[name].name)
    config = generator_config()
    object.__setattr__(config, "pretrained", True)  # only Stable Diffusion's own size may say so
    model = TumorGenerator(config, str(tmp_path))
    for name, part in (("vae", "frozen_vae"), ("text_encoder", "text")):
        theirs = getattr(tiny, part).net.state_dict()
        assert all(torch.equal(v, theirs[k] + 1) for k, v in model.outside_state()[name].state_dict().items())
    assert all(torch.equal(v, tiny.unet.state_dict()[k] + 1) for k, v in model.unet.state_dict().items())
    copied = model.controlnet.down_blocks.state_dict()
    assert all(torch.equal(v, copied[k]) for k, v in model.unet.down_blocks.state_dict().items())
    safetensors.torch.save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / SD_V1_5["unet"].name)
    with pytest.raises(WeightsError, match=r"(?s)does not fit the unet.*bushpc weights pull model=tumor_generator"):
        TumorGenerator(config, str(tmp_path))
    with pytest.raises(WeightsError, match="is not staged"):
        TumorGenerator(config, str(tmp_path / "elsewhere"))


def _replaced(name, pairs):
    for then, now in pairs.items():
        name = name.replace(then, now)
    return name


def test_the_yamls_are_the_papers_protocol():
    cell = compose(["model=tumor_generator", "data=busi"])
    assert (cell.model.image_size, cell.model.kl_weight, cell.model.lora_rank) == (512, 0.001, 8)
    assert (cell.train.epochs, cell.train.batch_size, cell.train.lr, cell.train.warmup) == (200, 64, 1e-4, 500)
    assert cell.train.schedule == "constant"
    vae = compose(["model=tumor_generator_vae", "data=busi"])
    assert dataclasses.replace(vae.model, stage="controlnet") == cell.model
    assert dataclasses.replace(vae.train) == cell.train


# --- all stages, through the command ----------------------------------------------------------------------------


@pytest.fixture
def stage_cell(tmp_path, make_cell):
    """stage_cell(name, *words) -> a tiny cell of a stage, ready for `run_cell`, in a run that can be exported."""

    def make(name, *words):
        settings = ["model=tumor_generator_small", *overrides()]
        training = ["train.iterations=4", "train.batch_size=4", "train.accumulate=2", "train.save_every=1"]
        more = [f"loader.features_dir={tmp_path / 'features'}", "train.log_every=1", "train.track=[]"]
        cell_dir = make_cell(name, *settings, *training, *more, *words)
        write_run_record(cell_dir, "tumor_generator")
        return cell_dir

    return make


def test_every_stage_trains_is_preempted_goes_on_exactly_and_starts_the_next_one(
    stage_cell, tmp_path, batch, monkeypatch
):
    vae = ["model=tumor_generator_vae_small", *overrides()]
    stages = {"vae": vae, "controlnet": [], "lora": ["model.stage=lora"], "full": ["model.stage=full"]}
    base: list[str] = []
    for stage, words in stages.items():
        whole = stage_cell(stage, *words, *base)
        assert run_cell(whole, World()) is None
        if stage != "full":
            disturbed = stage_cell(f"{stage}-disturbed", *words, *base)
            with monkeypatch.context() as patched:
                patched.setattr(Tracker, "train", _preempted(Tracker.train))
                assert run_cell(disturbed, World()) == Stopped(step=2, signal_name="SIGTERM")
            assert run_cell(disturbed, World()) is None
            assert _weights(whole).keys() == _weights(disturbed).keys()
            for name, value in _weights(whole).items():
                assert torch.equal(value, _weights(disturbed)[name]), name
            assert (whole / "per_image.csv").read_text() == (disturbed / "per_image.csv").read_text()
        column = (whole / "per_image.csv").read_text().splitlines()[0].split(",")
        assert ("reconstruction_mse" if stage == "vae" else "denoising_mse") in column
        assert main(["export", str(tmp_path / stage), str(tmp_path / f"{stage}-export")]) == 0
        if stage in ("vae", "controlnet"):
            base = [f"model.base={tmp_path / f'{stage}-export' / 'fold0'}"]
    assert {name.partition(".")[0] for name in _weights(tmp_path / "lora" / "cells" / "fold0")} == {"unet"}

    # A VAE that was trained is the one that later stages use; plain diffusers opens what they saved.
    there = [tmp_path / f"{stage}-export" / "fold0" / "vae" for stage in ("vae", "controlnet", "lora")]
    files = [(folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in there]
    assert files[0] == files[1] == files[2]
    for stage in ("controlnet", "lora", "full"):
        model = _exported(tmp_path / f"{stage}-export")
        images = _by_diffusers(
            tmp_path / f"{stage}-export" / "fold0",
            model,
            batch,
            (lambda p: p.load_lora_weights(str(tmp_path / "lora-export" / "fold0"))) if stage == "lora" else _as_it_is,
        )
        torch.testing.assert_close(_generate(model, batch), images, rtol=0, atol=1e-5)
    for file in (tmp_path / "lora-export").rglob("*"):
        if file.suffix in (".json", ".yaml", ".md"):
            assert str(tmp_path) not in file.read_text(), file
    card = (tmp_path / "lora-export" / "README.md").read_text()
    assert "StableDiffusionControlNetPipeline.from_pretrained(folder)" in card
    assert "Denoising MSE" in card


def _as_it_is(pipeline):
    pass


def _preempted(log_step):
    def log_and_be_preempted(self, step, *args) -> None:
        log_step(self, step, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    return log_and_be_preempted


def _weights(cell_dir):
    return safetensors.torch.load_file(sorted((cell_dir / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def _exported(folder):
    from bushpc.evaluate.predictor import load_export

    [member] = load_export(folder)[0]
    return member.model.eval()


@pytest.mark.parametrize(("guided_by", "mask_counts", "caption_counts"), [("text", False, True), ("mask", True, False)])
def test_what_guided_by_leaves_out_changes_no_image(guided_by, mask_counts, caption_counts):
    config = compose(["model=tumor_generator_small", "data=phantom", "cluster=local"]).model
    config = dataclasses.replace(config, guided_by=guided_by, image_size=32, steps=2)
    torch.manual_seed(0)
    model = TumorGenerator(config).eval()
    for parameter in model.controlnet.parameters():  # its last layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    empty, full = torch.zeros(1, 32, 32), torch.ones(1, 32, 32)
    first = model.generate(empty, ["a benign tumor"], [1])
    assert torch.equal(first, model.generate(full, ["a benign tumor"], [1])) != mask_counts
    assert torch.equal(first, model.generate(empty, ["a malignant tumor"], [1])) != caption_counts

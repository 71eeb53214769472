"""ViT-conditioned diffusion: the paper's equations, both modes, and noise that depends on nothing but key and seed."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from bushpc.config import CellConfig, compose
from bushpc.errors import ConfigError, TrainingError, WeightsError
from bushpc.losses.topology import topological_loss
from bushpc.models.vit_diffusion import AdaptiveConditioningBridge, VitDiffusion, build_vit
from bushpc.nn.diffusion import Noising, check_steps
from bushpc.nn.recompute import recompute


@pytest.fixture
def tiny(diffusion_config):
    """tiny(**changes) -> the smallest model, in eval mode: no bridge, 16 pixels."""

    def make(**changes):
        config = diffusion_config(**{"image_size": 16, "widths": (8, 16), "acb": False, **changes})
        return VitDiffusion(config).eval()

    return make


@pytest.fixture
def batch(make_batch):
    return make_batch(size=32)


def _count(module):
    return sum(p.numel() for p in module.parameters())


# --- the paper's equations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_masks_are_noised_and_made_clean_again_as_diffusers_does(diffusion_config, beta_schedule, prediction):
    noising = Noising(diffusion_config(beta_schedule=beta_schedule, prediction=prediction))
    theirs = DDIMScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[beta_schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        clip_sample=False,
    )
    theirs.set_timesteps(1000)
    x_0, noise, predicted = torch.randn(3, 5, 2, 8, 8)
    t_B = torch.tensor([0, 7, 300, 800, 998])
    x_t = noising.noised(x_0, noise, t_B)
    torch.testing.assert_close(x_t, theirs.add_noise(x_0, noise, t_B))
    torch.testing.assert_close(noising.velocity(x_0, noise, t_B), theirs.get_velocity(x_0, noise, t_B))
    clean = noising.clean(predicted, x_t, t_B)
    for i, step in enumerate(t_B):
        one = theirs.step(predicted[i : i + 1], int(step), x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(clean[i : i + 1], one)
    # And the true prediction gives the mask back, as far as it can still be told from the noise.
    truth = noise if prediction == "epsilon" else noising.velocity(x_0, noise, t_B)
    torch.testing.assert_close(noising.clean(truth, x_t, t_B)[:4], x_0[:4], atol=1e-3, rtol=1e-3)


def test_the_bridge_is_equations_4_and_5():
    bridge = AdaptiveConditioningBridge(width=16, token_width=12, time_width=20).double()
    x, c, e_t = torch.randn(3, 16, 4, 5).double(), torch.randn(3, 7, 12).double(), torch.randn(3, 20).double()
    c_prime = bridge.enhance(c)
    gamma, beta = bridge.modulation(e_t)
    f = gamma * c_prime + beta  # (4)
    z = bridge.query(bridge.norm(x)).flatten(2).transpose(1, 2)
    read = torch.softmax(z @ f.transpose(1, 2) / math.sqrt(16), dim=2) @ f  # (5)
    expected = x + bridge.out(read.transpose(1, 2).reshape(3, 16, 4, 5))
    torch.testing.assert_close(bridge(x, c_prime, e_t), expected)
    # One time for all images, as in sampling.
    one = bridge(x, c_prime, e_t[:1])
    torch.testing.assert_close(one, bridge(x, c_prime, e_t[:1].expand(3, -1)))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_hybrid_loss_is_equations_6_and_7(diffusion_config, batch, prediction):
    weights = {"denoising_weight": 2.0, "x0_dice_weight": 0.3, "aux_dice_weight": 0.7, "aux_focal_weight": 5.0}
    model = VitDiffusion(diffusion_config(prediction=prediction, beta_schedule="linear", **weights))
    with torch.no_grad():
        torch.manual_seed(5)
        losses = model(batch)
        torch.manual_seed(5)
        t_B, noise = torch.randint(1000, (4,)), torch.randn(4, 1, 32, 32)
        diffusers = DDPMScheduler(beta_schedule="linear")
        m = batch.mask_BKHW
        x_t = diffusers.add_noise(2 * m - 1, noise, t_B)
        features = model.unet(x_t, t_B, model.condition(batch.image_BCHW))
        predicted, aux = model.unet.noise_head(features).double(), model.unet.auxiliary_head(features).double()
    alpha_bar = diffusers.alphas_cumprod[t_B].reshape(4, 1, 1, 1).double()
    if prediction == "epsilon":
        target = noise
        x0 = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    else:
        target = diffusers.get_velocity(2 * m - 1, noise, t_B)
        x0 = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * predicted
    p = aux.sigmoid()
    p_t = torch.where(m == 1, p, 1 - p)
    expected = {
        "mse": (predicted - target).square().mean(),
        "dice_x0": _dice_loss(((x0 + 1) / 2).clamp(0, 1), m),
        "dice_aux": _dice_loss(p, m),
        "focal_aux": (torch.where(m == 1, 0.25, 0.75) * (1 - p_t) ** 2 * -p_t.log()).mean(),
    }
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses.terms[name]) == pytest.approx(float(value), rel=1e-4), name
    total = 2 * (expected["mse"] + 0.3 * expected["dice_x0"]) + 0.7 * expected["dice_aux"] + 5 * expected["focal_aux"]
    assert float(losses.total) == pytest.approx(float(total), rel=1e-4)


def _dice_loss(p, m):
    per_sample = [1 - (2 * (p[i] * m[i]).sum() + 1) / (p[i].sum() + m[i].sum() + 1) for i in range(len(p))]
    return torch.stack(per_sample).mean()


@pytest.mark.parametrize("topo_gradient", ["current", "both"])
def test_the_enhanced_loss_is_equations_8_and_9(tiny, make_batch, topo_gradient):
    changes = {"timesteps": 8, "steps": 8, "auxiliary_t": 7, "lookback": 5, "mask_classes": 2}  # most t are below k
    without = {"denoising_weight": 0.0, "aux_dice_weight": 0.0, "aux_focal_weight": 0.0}
    model = tiny(**changes, **without, topo_weight=0.4, topo_ramp=4, topo_gradient=topo_gradient)
    m = (torch.rand(4, 2, 16, 16) > 0.5).float()
    given = make_batch(size=16, mask_BKHW=m, epochs=[0, 1, 4, 9])
    torch.manual_seed(5)
    losses = model(given)
    losses.total.backward()
    found = model.unet.noise_head[2].weight.grad.clone()
    model.zero_grad()

    torch.manual_seed(5)
    t_B, noise = torch.randint(8, (4,)), torch.randn(4, 2, 16, 16)
    assert (t_B < 5).any()
    condition = model.condition(given.image_BCHW)

    def x0(t_B):
        x_t = model.noising.noised(2 * m - 1, noise, t_B)
        clean = model.noising.clean(model.unet.noise_head(model.unet(x_t, t_B, condition)), x_t, t_B)
        return ((clean + 1) / 2).clamp(0, 1)

    earlier = x0((t_B - 5).clamp(min=0))
    topo = topological_loss(x0(t_B), earlier.detach() if topo_gradient == "current" else earlier)
    w = torch.tensor([0.0, 0.1, 0.4, 0.4])
    expected = (w[:, None] * (1 + topo).log()).mean()
    expected.backward()
    assert float(losses.terms["topo"]) == pytest.approx(float(topo.mean()), rel=1e-5)
    assert float(losses.total) == pytest.approx(float(expected), rel=1e-5)
    assert found.any()
    torch.testing.assert_close(found, model.unet.noise_head[2].weight.grad, rtol=1e-4, atol=1e-7)


def test_at_the_first_step_there_is_nothing_to_look_back_to(tiny, make_batch):
    model = tiny(timesteps=2, steps=2, auxiliary_t=1, lookback=1, topo_weight=1.0)
    for seed in range(20):
        torch.manual_seed(seed)
        if not torch.randint(2, (4,)).any():  # t = 0 for all
            torch.manual_seed(seed)
            assert model(make_batch(size=16, epochs=[1] * 4)).terms["topo"] == 0
            return
    raise AssertionError("no seed draws t = 0 four times")


@pytest.mark.parametrize("topo_gradient", ["current", "both"])
def test_no_diagram_is_computed_while_its_weight_is_0(tiny, make_batch, topo_gradient):
    model = tiny(topo_weight=0.1, topo_gradient=topo_gradient)

    def step(epochs):
        torch.manual_seed(0)
        model.zero_grad()
        losses = model(make_batch(size=16, epochs=epochs))
        losses.total.backward()
        return losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (first, gradients), (later, _) = step([0] * 4), step([0, 0, 0, 1])
    assert first.terms["topo"] == 0 < later.terms["topo"]
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("timesteps", [2, 25, 100, 500, 1000, 4000])
def test_x_T_is_noise_whatever_T(tiny, timesteps):
    """The signal left in x_T of Ho et al.'s schedule is 0.006; with a T of 100 and its betas it would be 0.60."""
    changes = {"timesteps": timesteps, "steps": 1, "auxiliary_t": 1, "lookback": 1, "sampler": "ddim"}
    model = tiny(**changes, beta_schedule="linear", scaled_betas=True)
    alpha_bar = model.noising.alpha_bar
    assert len(alpha_bar) == timesteps
    assert float(alpha_bar[-1].sqrt()) < 0.05
    if timesteps >= 100:
        assert float(alpha_bar[-1].sqrt()) == pytest.approx(0.006, abs=0.003)
    unscaled = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    expected = (1 - (unscaled * 1000 / timesteps).clamp(max=0.999)).cumprod(0)
    torch.testing.assert_close(alpha_bar.double(), expected, rtol=2e-3, atol=1e-6)


def test_a_single_step_that_leaves_the_mask_in_x_T_is_refused():
    with pytest.raises(ConfigError, match=r"0\.95 of the mask is left in x_T"):
        check_steps(SimpleNamespace(timesteps=1, steps=1, sampler="ddim", beta_schedule="linear", scaled_betas=True))


HUNDRED = ["data=phantom", "model.timesteps=100", "model.steps=4", "model.sampler=ddim", "model.beta_schedule=linear"]


@pytest.mark.parametrize("name", ["vit_diffusion_small", "medsegdiff_small"])
def test_a_run_of_an_earlier_version_keeps_the_betas_that_it_was_trained_with(name):
    words = [f"model={name}", *HUNDRED, *(["model.auxiliary_t=99"] if name.startswith("vit") else [])]
    today = compose(words)
    assert today.model.scaled_betas
    frozen = today.to_dict()
    del frozen["model"]["scaled_betas"]  # there was no such field
    earlier = CellConfig.from_dict(frozen)
    theirs = DDIMScheduler(num_train_timesteps=100, beta_schedule="linear")
    torch.testing.assert_close(Noising(earlier.model).alpha_bar, theirs.alphas_cumprod)
    assert CellConfig.from_dict(yaml.safe_load(earlier.to_yaml())) == earlier, "also when it is frozen again"
    assert earlier.hash != today.hash
    if name.startswith("vit"):  # as the version before computed them
        assert (earlier.hash, earlier.training_hash) == ("99893584686d", "2e00c50a7934")


def test_betas_that_leave_the_mask_in_x_T_are_refused_where_they_are_asked_for():
    with pytest.raises(ConfigError, match=r"0\.60 of the mask .* Set model\.scaled_betas=true"):
        compose(["model=medsegdiff_small", *HUNDRED, "model.scaled_betas=false"])


@pytest.mark.parametrize("topo_weight", [0.0, 0.1])
def test_empty_and_full_masks_have_finite_gradients(diffusion_config, make_batch, topo_weight):
    model = VitDiffusion(diffusion_config(topo_weight=topo_weight))
    mask = torch.zeros(4, 1, 32, 32)
    mask[2:] = 1
    model(make_batch(size=32, mask_BKHW=mask, epochs=[5] * 4)).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_prediction_that_is_no_number_is_an_error_and_no_gradient(tiny, make_batch):
    model = tiny(topo_weight=0.1)
    nn.init.constant_(model.unet.noise_head[2].bias, math.nan)
    with pytest.raises(TrainingError, match="NaN"):
        model(make_batch(size=16, epochs=[1] * 4))


# --- parameters and switches ------------------------------------------------------------------------------------


def test_the_full_model_has_the_papers_size_within_a_quarter_of_a_percent(diffusion_config):
    with torch.device("meta"):
        model = VitDiffusion(diffusion_config("vit_diffusion", pretrained=False))
        off = VitDiffusion(diffusion_config("vit_diffusion", pretrained=False, acb=False))
    assert _count(model) == pytest.approx(12_860_000, rel=0.0025)
    # timm's ViT-tiny without its classifier, and with positions for 16 x 16 patches instead of 14 x 14.
    assert _count(model.vit) == 5_717_416 - 1000 * 193 + (16 * 16 - 14 * 14) * 192
    # Feature enhancer, gamma and beta, normalisation, two 1 x 1 convolutions; tokens of 192, e_t of 128.
    bridges = sum(2 * 192 + 193 * d + (d + 1) * d + 129 * 2 * d + 2 * d + 2 * (d + 1) * d for d in (128, 64, 32))
    assert _count(model) - _count(off) == _count(model.vit) + bridges


@pytest.mark.parametrize(
    "changes",
    [{}, {"diffusion": False}, {"acb": False}, {"diffusion": False, "acb": False}, {"mask_classes": 3, "channels": 4}],
)
def test_every_parameter_of_what_is_on_gets_a_gradient(diffusion_config, make_batch, changes):
    model = VitDiffusion(diffusion_config(**changes))
    classes, channels = changes.get("mask_classes", 1), changes.get("channels", 3)
    given = make_batch(
        size=32,
        image_BCHW=torch.rand(4, channels, 32, 32),
        mask_BKHW=(torch.rand(4, classes, 32, 32) > 0.7).float(),
    )
    model(given).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert model.eval().predict(given).prob_BKHW.shape == (4, classes, 32, 32)
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert ("vit" in names) == changes.get("acb", True)


def test_recomputing_blocks_changes_no_gradient(diffusion_config, batch):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = VitDiffusion(diffusion_config())
        if again:
            assert recompute(model, model.config.blocks) == 6 + 5 + 2  # of the ViT, residual ones, bridges
        torch.manual_seed(1)
        model(batch).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_bf16_is_finite_in_training_and_in_both_modes(diffusion_config, batch):
    with torch.autocast("cpu", torch.bfloat16):
        model = VitDiffusion(diffusion_config(topo_weight=0.1))
        model(dataclasses.replace(batch, epochs=[9] * 4)).total.backward()
        # The look-back's pass without gradients shares autocast's copies of the weights with the one that has them.
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        with torch.no_grad():
            for inference in ("auxiliary", "generative"):
                prob = _set(model.eval(), inference=inference).predict(batch).prob_BKHW
                assert prob.dtype == torch.float32
                assert prob.isfinite().all()


def test_the_vit_starts_from_its_staged_file_whatever_size_and_channels_images_have(diffusion_config, tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    state = timm.create_model(name).state_dict()
    path = tmp_path / f"{name}.safetensors"
    safetensors.torch.save_file(state, path)
    vit = build_vit(diffusion_config("vit_diffusion", channels=4), str(tmp_path))
    assert torch.equal(vit.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])
    assert vit.pos_embed.shape == (1, 1 + 16 * 16, 192)
    # timm's rule: the filters of red, green, blue and red again, a little weaker.
    filters = state["patch_embed.proj.weight"]
    assert torch.equal(vit.patch_embed.proj.weight, filters[:, [0, 1, 2, 0]] * 0.75)
    del state["blocks.3.attn.qkv.weight"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(WeightsError, match=r"(?s)does not fit.*bushpc weights pull model=vit_diffusion"):
        build_vit(diffusion_config("vit_diffusion"), str(tmp_path))
    (file,) = diffusion_config("vit_diffusion").weight_files()
    assert file.hub_repo == f"timm/{name}"
    assert diffusion_config("vit_diffusion", acb=False).weight_files() == []


# --- prediction -------------------------------------------------------------------------------------------------


def _set(model, **changes):
    model.config = dataclasses.replace(model.config, **changes)
    return model


def _dice(prob_BKHW, mask_BKHW):
    found, truth = prob_BKHW > 0.5, mask_BKHW > 0
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def test_learns_one_batch_by_heart_in_both_modes(diffusion_config, batch):
    model = VitDiffusion(diffusion_config(steps=10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(batch).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for changes in (
            {"inference": "auxiliary"},
            *({"inference": "generative", "sampler": sampler} for sampler in ("ddpm", "ddim", "dpm_solver")),
        ):
            assert _dice(_set(model, **changes).predict(batch).prob_BKHW, batch.mask_BKHW) > 0.8, changes


@pytest.mark.parametrize(
    ("sampler", "steps", "beta_schedule", "prediction"),
    [
        ("ddim", 1000, "linear", "epsilon"),
        ("ddim", 50, "cosine", "v"),
        ("ddpm", 50, "linear", "epsilon"),
        ("dpm_solver", 20, "linear", "epsilon"),
        ("dpm_solver", 30, "cosine", "v"),
    ],
)
def test_samples_are_those_of_diffusers_own_loop(tiny, make_batch, sampler, steps, beta_schedule, prediction):
    model = tiny(
        inference="generative", sampler=sampler, steps=steps, beta_schedule=beta_schedule, prediction=prediction
    )
    shared = {
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[beta_schedule],
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        "timestep_spacing": "trailing",
    }
    more = {}
    if sampler == "ddpm":
        theirs, more = DDPMScheduler(**shared), {"generator": torch.Generator().manual_seed(1)}
    elif sampler == "ddim":
        theirs, more = DDIMScheduler(**shared), {"use_clipped_model_output": True}
    else:  # thresholding at 1 is what it has instead of clip_sample
        theirs = DPMSolverMultistepScheduler(**shared, thresholding=True, sample_max_value=1.0)
    theirs.set_timesteps(steps)
    with torch.no_grad():
        condition = model.condition(make_batch(size=16, count=1).image_BCHW)
        x_T = torch.randn(1, 1, 16, 16)
        x = x_T
        for step in theirs.timesteps:
            predicted = model.unet.noise_head(model.unet(x, step[None], condition))
            x = theirs.step(predicted, step, x, **more).prev_sample
        ours = model.sample(x_T, condition, [torch.Generator().manual_seed(1)])
    assert x.std() > 0.1
    torch.testing.assert_close(ours, x, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("inference", ["auxiliary", "generative"])
def test_a_prediction_depends_on_image_key_and_seed_alone(tiny, make_batch, inference):
    mode = {"inference": inference, "auxiliary_input": "noise", "sampler": "ddpm"}
    model, whole = tiny(**mode, steps=4, samples=3), make_batch(size=16)
    with torch.no_grad():
        together = model.predict(whole)
        apart = [model.predict(part) for part in whole.split(4)]
        for field in ("prob_BKHW", "uncertainty_BKHW"):
            one_by_one = torch.cat([getattr(prediction, field) for prediction in apart])
            torch.testing.assert_close(getattr(together, field), one_by_one, atol=1e-5, rtol=1e-4)
        torch.manual_seed(99)
        assert torch.equal(model.predict(whole).prob_BKHW, together.prob_BKHW)
        renamed = model.predict(dataclasses.replace(whole, keys=["another", *whole.keys[1:]])).prob_BKHW
        assert not torch.equal(renamed[0], together.prob_BKHW[0])
        assert torch.equal(renamed[1:], together.prob_BKHW[1:])
        assert not torch.equal(_set(model, sampling_seed=1).predict(whole).prob_BKHW, together.prob_BKHW)


def test_an_ensemble_is_the_mean_of_its_samples_and_their_deviation(tiny, make_batch):
    model, given = tiny(inference="generative", sampler="ddpm", steps=4, samples=3), make_batch(size=16)
    with torch.no_grad():
        prediction = model.predict(given)
        alone = _set(model, samples=1).predict(given)
        assert alone.uncertainty_BKHW is None
        x_T, generators = _set(model, samples=3).draw(given)
        every = model.sample(x_T, model.condition(given.image_BCHW).repeated(3), generators).unflatten(0, (4, 3))
    prob = ((every + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(prob[:, 0], alone.prob_BKHW, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prediction.prob_BKHW, prob.mean(dim=1))
    mean = prob.mean(dim=1, keepdim=True)
    torch.testing.assert_close(prediction.uncertainty_BKHW, (prob - mean).square().mean(dim=1).sqrt())


def test_the_vit_runs_once_however_many_steps_and_samples_follow(diffusion_config, batch):
    model = VitDiffusion(diffusion_config(inference="generative", samples=2)).eval()
    calls = {"vit": 0, "enhance": 0, "step": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    model.vit.patch_embed.register_forward_hook(count("vit"))
    model.unet.register_forward_hook(count("step"))
    for stage in model.unet.decoder:
        stage.bridge.enhance.register_forward_hook(count("enhance"))
    with torch.no_grad():
        model.predict(batch)
    assert calls == {"vit": 1, "enhance": 2, "step": 4}


def test_sampling_leaves_the_weights_in_the_order_of_memory_that_training_goes_on_with(tiny, make_batch):
    model = tiny(inference="generative")
    before = {name: (p.stride(), p.data_ptr()) for name, p in model.named_parameters()}
    with torch.no_grad():
        model.predict(make_batch(size=16))
    assert {name: (p.stride(), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_prediction_touches_no_mask(tiny, make_batch):
    poisoned = make_batch(size=16, mask_BKHW=torch.full((4, 1, 16, 16), math.nan))
    with torch.no_grad():
        for inference in ("auxiliary", "generative"):
            model = tiny(inference=inference)
            assert torch.equal(model.predict(poisoned).prob_BKHW, model.predict(make_batch(size=16)).prob_BKHW)


def test_a_model_reads_no_more_than_it_says(diffusion_config):
    def more(**changes):
        return diffusion_config(**changes).needs - {"image_BCHW", "mask_BKHW"}

    assert more() == set()
    assert more(topo_weight=0.1) == {"epochs"}
    assert more(auxiliary_input="noise") == more(inference="generative") == {"keys"}


def test_a_map_is_made_of_the_pass_that_segments_and_of_no_sampling(diffusion_config):
    assert VitDiffusion(diffusion_config()).cam_layer() is not None
    assert VitDiffusion(diffusion_config(inference="generative")).cam_layer() is None


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "dimm"}, "unknown model.sampler 'dimm'; did you mean 'ddim'"),
        ({"inference": "generativ"}, "unknown model.inference 'generativ'; did you mean 'generative'"),
        ({"beta_schedule": "sigmoid"}, "unknown model.beta_schedule 'sigmoid'"),
        ({"prediction": "x0"}, "unknown model.prediction 'x0'"),
        ({"steps": 30}, r"steps=30 with model.sampler=ddim: must be one of 1, 2, 4, 5, 8, 10"),
        ({"steps": 2000}, "steps=2000: must be ≤ 1000"),
        ({"auxiliary_t": 1000}, "auxiliary_t=1000: must be ≤ 999"),
        ({"lookback": 1000}, "lookback=1000: must be ≤ 999"),
        ({"lookback": 0}, "lookback=0: must be ≥ 1"),
        ({"samples": 2, "auxiliary_input": "zeros"}, "samples=2: no noise is drawn"),
        ({"diffusion": False, "inference": "generative"}, "inference=generative with model.diffusion=false"),
        ({"diffusion": False, "topo_weight": 0.1}, "topo_weight=0.1 with model.diffusion=false"),
        ({"topo_weight": -1.0}, "topo_weight=-1.0: must be ≥ 0"),
        ({"aux_dice_weight": math.nan}, "aux_dice_weight=nan: must be ≥ 0"),
        ({"focal_alpha": 2.0}, "focal_alpha=2.0: must be ≥ 0 and ≤ 1"),
        ({"topo_downsample": 5}, "topo_downsample=5 does not divide model.image_size=32"),
        ({"widths": (32, 60)}, "widths=.*multiples of 8"),
        ({"widths": (32,)}, "widths=.*two or more"),
        ({"image_size": 36}, "image_size=36 is not a multiple of 8.*nearest is 32"),
        ({"image_size": 24}, "image_size=24 is not a multiple of 16, the patches of model.vit=test_vit"),
        ({"vit": "vit_tinny"}, "vit=vit_tinny: timm has no such model; small ones are vit_tiny_patch16_224"),
        ({"vit": "resnet18"}, "vit=resnet18 is no plain vision transformer"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(diffusion_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        diffusion_config(**changes)


def test_a_dataset_with_other_classes_or_channels_is_refused_with_the_settings_that_fit(diffusion_config):
    rgb, mri = ["red", "green", "blue"], ["flair", "t1", "t1ce", "t2"]
    tumour = ["enhancing_tumor", "tumor_core", "whole_tumor"]
    diffusion_config().check_data(["lesion"], rgb)
    diffusion_config(mask_classes=2).check_data(["disc", "cup"], rgb)
    diffusion_config(mask_classes=3, channels=4).check_data(tumour, mri)
    with pytest.raises(ConfigError, match=r"model.mask_classes=1, .* has 2 \(disc, cup\)\. Set model.mask_classes=2"):
        diffusion_config().check_data(["disc", "cup"], rgb)
    with pytest.raises(ConfigError, match=r"Set model\.mask_classes=3 model.channels=4"):
        diffusion_config().check_data(tumour, mri)


def test_the_yaml_is_the_papers_protocol():
    cell = compose(["model=vit_diffusion", "data=breast"])
    assert (cell.train.lr, cell.train.batch_size, cell.train.schedule) == (5e-5, 16, "cosine")
    assert (cell.model.timesteps, cell.model.steps, cell.model.sampler) == (1000, 1000, "ddpm")
    assert 0 < cell.train.ema < 1

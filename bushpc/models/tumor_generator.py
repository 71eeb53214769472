"""Clinical prior-guided tumor generator: Stable Diffusion, a ControlNet that reads the lesion's mask, LoRA per domain.

Pan, Mo, Lin, Zhang, Wu, Wang and Zheng, "Clinical Prior-Guided Tumor Generation for Breast Ultrasound with Cross Domain
Adaptation". Equation numbers and symbols are the paper's: z_0 the latents of an image with mean mu and log-variance
log omega^2, z_t the noised ones, e the embedding of a caption by the text encoder, m the mask.

    image ─VAE─→ mu, omega ─(1)─→ z_0 ─(2)─→ z_t ─┐
    caption ─text encoder─→ e ────────────────────┼─→ UNet ─→ noise ─(3)─ or ─ step after step ─→ z_0 ─VAE─→ image
    mask ─ControlNet, with z_t, t and e───────────┘

Training has stages, each a separate run that starts from the export of the one before: `vae`, `controlnet`
(ControlNet and UNet), and for another domain `lora`, or `full` as its control. Times are counted from 0, as diffusers
does. Shape suffixes besides those of `bushpc.sample`: h, w the latents; N tokens of a caption, D their width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import typing as t
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.conditions import Caption, Condition
from bushpc.conditions.words import refuse_long
from bushpc.config import ModelConfig, WeightFile, config_class, setting
from bushpc.dist import keyed_seed
from bushpc.errors import ConfigError, WeightsError
from bushpc.files import EXPORT_FILE, read_json
from bushpc.models.base import Model
from bushpc.nn.uncompiled import not_compiled
from bushpc.sample import Batch, Losses, Prediction

if t.TYPE_CHECKING:  # these take seconds to import, and the login node does without
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer

# Component → its file in a diffusers folder. Each is staged from Stable Diffusion v1.5, but the ControlNet, which
# starts as a copy of the UNet's encoder (Zhang et al. 2023).
FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",
}
SD_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_V1_5 = {
    name: WeightFile(f"sd_v1_5_{name}.safetensors", SD_REPO, f"{name}/{file}", "main", "creativeml-openrail-m")
    for name, file in FILES.items()
    if name != "controlnet"
}
# The noise of Stable Diffusion v1.5. Steps begin at T - 1 ("trailing"): a start from pure noise at a lower t, which it
# has by default, promises the network a signal that is not there (Lin et al., 2024).
TIMESTEPS = 1000
NOISE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
# Its maps that LoRA adapts: 398,592 parameters at rank 2, as Table 2 has them.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
TOKENS = 77  # of a caption, with what fills it up
VOCABULARY = 49_408  # of CLIP
# A score is the mean over so many draws of t, one from each equal stretch of 0 to T - 1.
SCORE_DRAWS = 4


@config_class
class TumorGeneratorConfig(ModelConfig):
    """The paper's values are the defaults. `configs/model/tumor_generator.yaml` lists what it leaves open."""

    image_size: int = setting(512, "Edge of the square images (3.1).", unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "Start from staged weights of Stable Diffusion v1.5 (3.1): `bushpc weights pull model=tumor_generator`.",
    )
    stage: t.Literal["vae", "controlnet", "lora", "full"] = setting(
        "controlnet",
        "What is trained. `vae`: the VAE, by (5), see model=tumor_generator_vae. `controlnet`: ControlNet and UNet "
        "together, by (3). `lora`: adapters of the UNet's attention, for another domain (2.3). `full`: the UNet, as "
        "the control of lora.",
    )
    base: str | None = setting(
        None,
        "What the stage before exported, OUT of `bushpc export RUN OUT`: each fold starts from its own folder "
        "OUT/fold0, … and has seen nothing of its validation part. OUT/fold0 itself, or another diffusers folder, "
        "serves all folds: of another dataset, or with fold=0. Components that it lacks start from staged weights. "
        "lora and full need one.",
    )
    base_sha256: str | None = setting(
        None,
        "SHA-256 of the tensors in base, as `bushpc export` noted it; null if that did not write it. Set when planned.",
    )
    guided_by: t.Literal["both", "text", "mask"] = setting(
        "both",
        "What conditions it: `both`; `text`, a caption without a mask (Ours-t of Table 1); `mask`, a mask without a "
        "caption (Ours-m). The ControlNet then gets an empty mask, the text encoder an empty caption.",
        since=4,
    )
    lora_rank: int = setting(8, "r of (8): 2, 4 or 8 in Table 2, where 8 is best.", ge=1)
    kl_weight: float = setting(0.001, "alpha of (5).", ge=0, lt=math.inf)
    caption_dropout: float = setting(
        0.1,
        "Share of training samples whose caption is left out, without which guidance would have nothing to lead away "
        "from. Not in the paper; 0.1 is that of Stable Diffusion v1.5.",
        ge=0,
        lt=1,
    )
    vae_channels: tuple[int, ...] = setting(
        (128, 256, 512, 512),
        "Channels of the levels of Stable Diffusion v1.5's VAE, each at half the resolution of the one before.",
    )
    vae_layers: int = setting(2, "Blocks of a level of the VAE.", ge=1)
    latent_channels: int = setting(4, "Channels of z.", ge=1)
    latent_scale: float = setting(0.18215, "Factor on z that makes its deviation about 1.", gt=0, lt=math.inf)
    unet_channels: tuple[int, ...] = setting(
        (320, 640, 1280, 1280), "Channels of the levels of Stable Diffusion's UNet; all but the deepest attend."
    )
    unet_layers: int = setting(2, "Blocks of a level of the UNet.", ge=1)
    unet_heads: int = setting(8, "Heads of the UNet's attention.", ge=1)
    text_width: int = setting(768, "Channels of CLIP ViT-L/14's text encoder.", ge=1)
    text_layers: int = setting(12, "Layers of the text encoder.", ge=1)
    text_heads: int = setting(12, "Attention heads of the text encoder.", ge=1)
    mask_channels: tuple[int, ...] = setting(
        (16, 32, 96, 256),
        "Channels of ControlNet's convolutions that bring a mask to the latents' size, halving it from each to the "
        "next (Zhang et al.).",
    )
    groups: int = setting(32, "Groups of GroupNorm in all of them.", ge=1)
    sampler: t.Literal["ddim", "unipc"] = setting(
        "ddim", "`ddim` (eta = 0) or `unipc`. The paper names no sampler.", affects="predictions"
    )
    steps: int = setting(
        50,
        "Steps of the sampler. Not in the paper; usual for Stable Diffusion. For ddim they must divide 1000.",
        affects="predictions",
        ge=1,
        le=TIMESTEPS,
    )
    guidance: float = setting(
        7.5,
        "Scale of classifier-free guidance; 1 switches it off. Not in the paper; 7.5 is diffusers' for Stable "
        "Diffusion.",
        affects="predictions",
        ge=1,
        lt=math.inf,
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built or sampled. Raises: ConfigError."""
        super().__post_init__()
        if self.sampler == "ddim" and TIMESTEPS % self.steps:
            # diffusers' DDIM steps from t to t - T // steps: with a remainder that is not the next t.
            divisors = ", ".join(str(n) for n in range(1, TIMESTEPS + 1) if TIMESTEPS % n == 0)
            raise ConfigError(f"model.steps={self.steps} with model.sampler=ddim: must be one of {divisors}")
        self._check_shapes()
        self._check_size()
        if self.base is not None:  # jobs run in another folder
            object.__setattr__(self, "base", str(Path(self.base).expanduser().resolve()))

    @property
    def needs(self) -> frozenset[str]:
        """Image and mask; the keys for the noise that a score draws. The VAE's stage reads the image alone."""
        return frozenset({"image_BCHW"} if self.stage == "vae" else {"image_BCHW", "mask_BKHW", "keys"})

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The caption, but for the VAE's stage."""
        return () if self.stage == "vae" else (Caption(),)

    def weight_files(self) -> list[WeightFile]:
        """Those of Stable Diffusion v1.5 that `base` does not replace. Raises: ConfigError for a base that cannot."""
        there = _check_base(self)
        names = [name for name in self.components if name in SD_V1_5 and name not in there]
        return [SD_V1_5[name] for name in names] if self.pretrained else []

    @property
    def feature_settings(self) -> dict[str, t.Any]:
        """Those of the VAE, where it is not trained."""
        if self.stage == "vae":
            return {}
        names = ("image_size", "vae_channels", "vae_layers", "latent_channels", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def blocks(self) -> tuple[type, ...]:
        """Residual and transformer blocks of the VAE, the UNet and the ControlNet."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return ResnetBlock2D, BasicTransformerBlock

    @property
    def stride(self) -> int:
        """Of the latents to the image."""
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def components(self) -> tuple[str, ...]:
        """What this stage trains or uses."""
        return ("vae",) if self.stage == "vae" else ("vae", "unet", "text_encoder", "controlnet")

    def standalone(self) -> t.Self:
        """Without base, whose tensors an export holds."""
        return dataclasses.replace(super().standalone(), base=None, base_sha256=None)

    @property
    def starts_from(self) -> Path | None:
        """`base`."""
        return Path(self.base) if self.base else None

    def for_fold(self, fold: int) -> TumorGeneratorConfig:
        """With the fold's own folder of `base`, where that is a whole export, and with the hash of what is in it."""
        if self.base is None:
            return self
        base = Path(self.base)
        if any(base.glob("fold[0-9]*/")):
            base = base / f"fold{fold}"
        return dataclasses.replace(self, base=str(base), base_sha256=_exported_sha256(base))

    def _check_shapes(self) -> None:
        for name, fewest in (("vae_channels", 1), ("unet_channels", 2)):
            channels = getattr(self, name)
            if len(channels) < fewest or any(count < 1 or count % self.groups for count in channels):
                raise ConfigError(
                    f"model.{name}={list(channels)}: {fewest} or more multiples of model.groups={self.groups} are "
                    "needed"
                )
        if len(self.mask_channels) != len(self.vae_channels) or min(self.mask_channels) < 1:
            raise ConfigError(
                f"model.mask_channels={list(self.mask_channels)}: as many numbers are needed as in model.vae_channels, "
                f"{len(self.vae_channels)}, so that a mask comes to the latents' size"
            )
        for name, width, heads in (
            *(("unet_channels", width, "unet_heads") for width in self.unet_channels),
            ("text_width", self.text_width, "text_heads"),
        ):
            if width % getattr(self, heads):
                raise ConfigError(f"model.{name}: {width} is not a multiple of model.{heads}={getattr(self, heads)}")
        deepest = self.stride * 2 ** (len(self.unet_channels) - 1)
        if self.image_size % deepest:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {deepest}, the stride of the UNet's deepest "
                f"level; the nearest is {max(1, round(self.image_size / deepest)) * deepest}"
            )

    def _check_size(self) -> None:
        names = ("vae_channels", "vae_layers", "latent_channels", "unet_channels", "unet_layers", "unet_heads")
        shape = tuple(getattr(self, name) for name in (*names, "text_width", "text_layers", "text_heads", "groups"))
        sd = ((128, 256, 512, 512), 2, 4, (320, 640, 1280, 1280), 2, 8, 768, 12, 12, 32)
        if self.pretrained and shape != sd:
            raise ConfigError(
                f"pretrained=true loads Stable Diffusion v1.5, and ({', '.join(names)}, text_width, text_layers, "
                f"text_heads, groups) are {shape}, not {sd}. Use those, or pretrained=false."
            )


class TumorGenerator(Model):
    """Images of lesions from mask and caption; one mask class, three channels.

    `features` are "moments", mu and log omega^2 of an image, one after the other in the channels.
    """

    Config = TumorGeneratorConfig
    makes = frozenset({"scores"})

    config: TumorGeneratorConfig

    def __init__(self, config: TumorGeneratorConfig, weights_dir: str | None = None) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.controlnets.controlnet import ControlNetModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        super().__init__(config, weights_dir)
        start = functools.partial(_start, config=config, weights_dir=weights_dir)
        if config.stage == "vae":
            self.vae = start("vae", AutoencoderKL(**_settings(config)["vae"]))
            return
        self.frozen_vae = Frozen(lambda: start("vae", AutoencoderKL(**_settings(config)["vae"])))
        self.text = TextEncoder(config, weights_dir)
        self.unet = start("unet", UNet2DConditionModel(**_settings(config)["unet"]))
        self.controlnet = start(
            "controlnet",
            ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=config.mask_channels),
        )
        if config.stage != "controlnet":
            self.controlnet.requires_grad_(False)
        if config.stage == "lora":
            self.unet.requires_grad_(False)
            self.unet.add_adapter(_adapter(config.lora_rank))
        self.alpha_bar = make_sampler(config).alphas_cumprod  # (2); no buffer, or bfloat16 would round it

    def outside_state(self) -> dict[str, nn.Module]:
        """VAE and text encoder, where they are frozen."""
        if self.config.stage == "vae":
            return {}
        return {"vae": self.frozen_vae.net, "text_encoder": self.text.net}

    def features(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean and log-variance of z, "moments": B x 2 latent_channels x h x w, float32 whatever autocast says."""
        return {"moments": self._moments(image_BCHW)}

    # Not compiled: a frozen VAE moves between devices.
    @not_compiled
    @torch.no_grad()
    def _moments(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(image_BCHW.device.type, enabled=False):
            moments: torch.Tensor = self._vae(image_BCHW.device).encode(2 * image_BCHW - 1).latent_dist.parameters
        return moments.contiguous()

    def _vae(self, device: torch.device) -> AutoencoderKL:
        return self.vae if self.config.stage == "vae" else self.frozen_vae.on(device)

    # --- training ---

    def forward(self, batch: Batch) -> Losses:
        """(3), term "mse"; at stage `vae` (5) with the reconstruction's error, terms "reconstruction" and "kl".

        Squared norms are means over the values of an image or its latents, not sums.
        """
        if self.config.stage == "vae":
            return self._vae_losses(batch.image_BCHW)
        features = batch.features or self.features(batch.image_BCHW)
        mu, log_omega2 = split_moments(features["moments"])
        z_0 = self.config.latent_scale * sampled(mu, log_omega2, noise_like(mu))
        # On the CPU, where the schedule is; torch's generator there is seeded by step and rank too.
        t_B = torch.randint(TIMESTEPS, (len(z_0),))
        left_out = torch.rand(len(z_0)) < self.config.caption_dropout
        captions = [
            "" if out else caption for caption, out in zip(batch.conditions["captions"], left_out.tolist(), strict=True)
        ]
        noise = noise_like(z_0)
        predicted = self._predicted_noise(self.noised(z_0, noise, t_B), t_B, captions, batch.mask_BKHW)
        mse = F.mse_loss(predicted, noise)
        return Losses(total=mse, terms={"mse": mse.detach()})

    def _vae_losses(self, image_BCHW: torch.Tensor) -> Losses:
        """(5) as a VAE is trained by it, both of its terms over the number of an image's values.

        The paper's (5) adds (4) to the denoising loss (3), and names no reconstruction: alone that would reward
        latents that are noise and nothing else.
        """
        x = 2 * image_BCHW - 1
        mu, log_omega2 = split_moments(self.vae.encode(x).latent_dist.parameters.float())
        z_0 = sampled(mu, log_omega2, noise_like(mu))
        reconstruction = F.mse_loss(self.vae.decode(z_0).sample.float(), x)
        kl = kl_divergence(mu, log_omega2).mean() / x[0].numel()
        return Losses(
            total=reconstruction + self.config.kl_weight * kl,
            terms={"reconstruction": reconstruction.detach(), "kl": kl.detach()},
        )

    def noised(self, z_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """(2); t_B on the CPU."""
        alpha_bar = self.alpha_bar[t_B].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(z_0.device) * z_0 + (1 - alpha_bar).sqrt().to(z_0.device) * noise

    def _predicted_noise(
        self, z_t: torch.Tensor, t_B: torch.Tensor, captions: list[str], mask_BKHW: torch.Tensor
    ) -> torch.Tensor:
        captions, mask_BKHW = self._guides(captions, mask_BKHW)
        e_BND = self.text(captions, z_t.device)
        return self.denoise(z_t, t_B.to(z_t.device), e_BND, mask_BKHW.expand(-1, 3, -1, -1)).float()

    def _guides(self, captions: list[str], mask: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """Captions and masks without what `guided_by` leaves out."""
        guided_by = self.config.guided_by
        if guided_by == "mask":
            captions = [""] * len(captions)
        return captions, torch.zeros_like(mask) if guided_by == "text" else mask

    def denoise(
        self, z_t: torch.Tensor, t_B: torch.Tensor, e_BND: torch.Tensor, mask_BCHW: torch.Tensor
    ) -> torch.Tensor:
        """epsilon_theta(z_t, t, e, xi_theta): the predicted noise. mask_BCHW: three channels, as pipelines have it."""
        down, mid = self.controlnet(z_t, t_B, encoder_hidden_states=e_BND, controlnet_cond=mask_BCHW, return_dict=False)
        predicted: torch.Tensor = self.unet(
            z_t,
            t_B,
            encoder_hidden_states=e_BND,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return predicted

    # --- evaluation and generation ---

    def predict(self, batch: Batch) -> Prediction:
        """How well it knows held-out images: "denoising_mse", (3) of each; at stage `vae` "reconstruction_mse".

        Noise and times are drawn by key, so that a score is always the same.
        """
        moments = (batch.features or self.features(batch.image_BCHW))["moments"]
        mu, log_omega2 = split_moments(moments)
        if self.config.stage == "vae":
            errors = self.vae.decode(mu).sample.float() - (2 * batch.image_BCHW - 1)
            return Prediction(scores={"reconstruction_mse": errors.square().mean(dim=(1, 2, 3))})
        generators = [torch.Generator().manual_seed(keyed_seed("denoising", key)) for key in batch.keys]

        def drawn() -> torch.Tensor:
            return torch.stack([torch.randn(mu.shape[1:], generator=each) for each in generators]).to(mu.device)

        z_0 = self.config.latent_scale * sampled(mu, log_omega2, drawn())
        stretch = TIMESTEPS // SCORE_DRAWS
        errors_B = torch.zeros(len(z_0), device=z_0.device)
        for i in range(SCORE_DRAWS):
            t_B = torch.cat([i * stretch + torch.randint(stretch, (1,), generator=each) for each in generators])
            noise = drawn()
            predicted = self._predicted_noise(
                self.noised(z_0, noise, t_B), t_B, batch.conditions["captions"], batch.mask_BKHW
            )
            errors_B += (predicted - noise).square().mean(dim=(1, 2, 3))
        return Prediction(scores={"denoising_mse": errors_B / SCORE_DRAWS})

    @not_compiled
    @torch.no_grad()
    def generate(self, mask_BHW: torch.Tensor, captions: list[str], seeds: list[int]) -> torch.Tensor:
        """B images by mask and caption, B x 3 x S x S, float32 in [0, 1], on the model's device.

        mask_BHW: float, 0 or 1, at image_size. seeds: each image's noise comes from its own, drawn on the CPU, so that
        it depends on neither batch, rank nor device. Raises: ConfigError where the run trained the VAE alone.
        """
        config = self.config
        if config.stage == "vae":
            raise ConfigError(
                "a run with model.stage=vae generates nothing: train model.stage=controlnet on its export"
            )
        device = self.unet.device
        captions, mask_BHW = self._guides(captions, mask_BHW)
        shape = (config.latent_channels, config.image_size // config.stride, config.image_size // config.stride)
        z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        z, guided = z.to(device), config.guidance > 1 and config.guided_by != "mask"  # without captions both agree
        e_BND = self.text([""] * len(seeds) * guided + captions, device)
        mask_BCHW = mask_BHW.to(device)[:, None].expand(-1, 3, -1, -1).repeat(1 + guided, 1, 1, 1)
        scheduler = make_sampler(config)
        for step in scheduler.timesteps:
            predicted = self.denoise(z.repeat(1 + guided, 1, 1, 1), step.to(device), e_BND, mask_BCHW).float()
            if guided:
                without, with_caption = predicted.chunk(2)
                predicted = without + config.guidance * (with_caption - without)
            z = scheduler.step(predicted, step, z, return_dict=False)[0]
        with torch.autocast(device.type, enabled=False):
            image_BCHW: torch.Tensor = self._vae(device).decode(z / config.latent_scale).sample
        return (image_BCHW / 2 + 0.5).clamp(0, 1)

    # --- adapters ---

    def load_adapter(self, trained: TumorGenerator, name: str) -> None:
        """Take over the adapter that a run with stage `lora` trained on this very base, and use it from now on.

        Several may be loaded under names of their own. Raises: ConfigError for another base.
        """
        if trained.config.stage != "lora":
            raise ConfigError(f"the adapter's run has model.stage={trained.config.stage}: only lora trains an adapter")
        if trained.base_sha256() != self.base_sha256():
            raise ConfigError(
                f"the adapter was trained on another base ({trained.config.base}): it changes weights that this "
                "generator does not have. Train it with model.base=<the export of this generator>"
            )
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        self.unet.add_adapter(_adapter(trained.config.lora_rank), adapter_name=name)
        set_peft_model_state_dict(self.unet, get_peft_model_state_dict(trained.unet), adapter_name=name)

    def use_adapter(self, name: str | None) -> None:
        """Generate with a loaded adapter from now on; None: with the base as it is."""
        if name is None:
            self.unet.disable_adapters()
        else:
            self.unet.enable_adapters()
            self.unet.set_adapter(name)

    def base_sha256(self) -> str:
        """SHA-256 of all tensors but the adapters': what an adapter of this model is for."""
        digest = hashlib.sha256()
        parts = {"unet": self.unet, "controlnet": self.controlnet, **self.outside_state()}
        for part, module in parts.items():
            for name, tensor in sorted(_without_adapters(module).items()):
                digest.update(json.dumps([part, name, list(tensor.shape)]).encode())
                digest.update(tensor.float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # --- in diffusers ---

    def save_pretrained(self, folder: Path) -> str:
        """Write what diffusers opens: a pipeline, with stage `lora` and its adapter; at stage `vae` the VAE."""
        if self.config.stage == "vae":
            self.vae.save_pretrained(folder / "vae")
            return "`diffusers.AutoencoderKL.from_pretrained(folder, subfolder='vae')`"
        pipeline = self.pipeline()
        opened = "`diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder)`"
        if self.config.stage == "lora":
            from peft import get_peft_model_state_dict

            pipeline.save_lora_weights(str(folder), unet_lora_layers=get_peft_model_state_dict(self.unet))
            pipeline.unet = copy.deepcopy(self.unet)
            pipeline.unet.unload_lora()
            opened += f", and its `load_lora_weights(folder)` for the adapter ({ADAPTER_FILE})"
        pipeline.save_pretrained(folder)
        return opened

    def pipeline(self) -> t.Any:
        """diffusers' StableDiffusionControlNetPipeline of these very components, with this sampler."""
        from diffusers import StableDiffusionControlNetPipeline

        return StableDiffusionControlNetPipeline(
            vae=self.frozen_vae.net,
            text_encoder=self.text.net,
            tokenizer=clip_tokenizer(),
            unet=self.unet,
            controlnet=self.controlnet,
            scheduler=make_sampler(self.config),
            safety_checker=None,  # it looks for nudity
            feature_extractor=None,
            requires_safety_checker=False,
        )


# --- latents ----------------------------------------------------------------------------------------------------


def split_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and log omega^2, the latter within diffusers' bounds."""
    mu, log_omega2 = moments.chunk(2, dim=1)
    return mu, log_omega2.clamp(-30, 20)


def noise_like(values: torch.Tensor) -> torch.Tensor:
    """Drawn in the order of the dimensions, however the values lie in memory: convolutions may turn that about."""
    return torch.randn(values.shape, device=values.device)


def sampled(mu: torch.Tensor, log_omega2: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(1)."""
    return mu + (log_omega2 / 2).exp() * noise


def kl_divergence(mu: torch.Tensor, log_omega2: torch.Tensor) -> torch.Tensor:
    """(4) of each of B latents, the sum over their values."""
    return -0.5 * (1 + log_omega2 - mu.square() - log_omega2.exp()).sum(dim=(1, 2, 3))


def make_sampler(config: TumorGeneratorConfig) -> t.Any:
    """diffusers' scheduler of the configured sampler, set to its steps."""
    from diffusers import DDIMScheduler, UniPCMultistepScheduler

    scheduler: t.Any
    if config.sampler == "ddim":
        scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = UniPCMultistepScheduler(**NOISE)
    scheduler.set_timesteps(config.steps)
    return scheduler


# --- captions ---------------------------------------------------------------------------------------------------


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """transformers' CLIPTokenizer with the vocabulary that open_clip's package ships: nothing is fetched.

    Captions are filled up to 77 tokens with the end's, as Stable Diffusion does, where open_clip has zeros.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): number for token, number in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks), model_max_length=TOKENS)


class Frozen:
    """A part that is not trained, on the device only while it is used.

    Deliberately no nn.Module: `bushpc.models.sam_multitask.FrozenEncoder` says why. Without weights it is a random draw
    from a separate seed. net: in eval mode, the same one in all copies of a model.
    """

    SEED = 2025

    def __init__(self, build: t.Callable[[], nn.Module]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            self.net: t.Any = build().requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, t.Any]) -> Frozen:
        return self

    def on(self, device: torch.device) -> t.Any:
        """The net, moved there."""
        return self.net.to(device)


class TextEncoder(Frozen):
    """tau_phi: CLIP's text encoder, frozen, asked once for each distinct caption."""

    def __init__(self, config: TumorGeneratorConfig, weights_dir: str | None) -> None:
        def build() -> nn.Module:
            from transformers import CLIPTextConfig, CLIPTextModel

            net = CLIPTextModel(CLIPTextConfig(**_settings(config)["text_encoder"]))
            return _start("text_encoder", net, config=config, weights_dir=weights_dir)

        super().__init__(build)
        self._known: dict[str, torch.Tensor] = {}

    # Not compiled: which captions are new depends on the start.
    @not_compiled
    def __call__(self, captions: list[str], device: torch.device) -> torch.Tensor:
        """e of B captions: the last hidden states, B x 77 x D, float32, on `device`."""
        for caption in dict.fromkeys(captions):
            if caption not in self._known:
                self._known[caption] = self._embed(caption, device)
        return torch.stack([self._known[caption] for caption in captions]).to(device)

    def _embed(self, caption: str, device: torch.device) -> torch.Tensor:
        # One caption at a time: in a batch its last digits would depend on its neighbours. Not in inference mode: the
        # tensor is kept, and training saves it for the backward pass.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            refuse_long(caption, "a caption")
            ids = clip_tokenizer()(caption, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
            e_1ND: torch.Tensor = self.on(device)(ids.to(device)).last_hidden_state
            return e_1ND[0].float().cpu()


# --- components -------------------------------------------------------------------------------------------------


def _settings(config: TumorGeneratorConfig) -> dict[str, dict[str, t.Any]]:
    """Component → what its library builds it from: with the paper's settings, Stable Diffusion v1.5's own."""
    latent_size = config.image_size // config.stride
    levels = len(config.unet_channels) - 1
    return {
        "vae": {
            "block_out_channels": config.vae_channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(config.vae_channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(config.vae_channels),
            "layers_per_block": config.vae_layers,
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.groups,
            "scaling_factor": config.latent_scale,
            "sample_size": config.image_size,
        },
        "unet": {
            "in_channels": config.latent_channels,
            "out_channels": config.latent_channels,
            "block_out_channels": config.unet_channels,
            "down_block_types": ("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
            "layers_per_block": config.unet_layers,
            "attention_head_dim": config.unet_heads,  # the number of heads, whatever diffusers calls it
            "cross_attention_dim": config.text_width,
            "norm_num_groups": config.groups,
            "sample_size": latent_size,
        },
        "text_encoder": {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": TOKENS,
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "hidden_act": "quick_gelu",
            "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 1,
        },
    }


# Of a base, which may have been made for images of another size, and names its end of text as older libraries did.
_MAY_DIFFER = ("sample_size", "bos_token_id", "eos_token_id", "pad_token_id")


def _check_base(config: TumorGeneratorConfig) -> list[str]:
    """The components that `base` has. Raises: ConfigError where it lacks what it must have, or has others."""
    if config.base is None:
        if config.pretrained and config.stage in ("lora", "full"):
            raise ConfigError(
                f"model.stage={config.stage} with model.base=null: it adapts a trained generator, whose ControlNet has "
                "learnt what a mask means. Export one (bushpc export RUN OUT) and set model.base=OUT"
            )
        return []
    folder = Path(config.base)
    there = [name for name in config.components if (folder / name / FILES[name]).is_file()]
    wanted = list(config.components) if config.stage in ("lora", "full") else there
    if not there or (lacking := [name for name in wanted if name not in there]):
        raise ConfigError(
            f"model.base={folder} has no {', '.join(lacking) if there else ' or '.join(config.components)} with its "
            "safetensors: give what `bushpc export RUN OUT` wrote of the stage before, OUT or one fold's OUT/fold0"
        )
    if config.base_sha256 not in (None, _exported_sha256(folder)):
        raise ConfigError(
            f"model.base={folder} holds another export than model.base_sha256={config.base_sha256} says: what was "
            "trained on the one is worth nothing with the other. Restore it, or start a run under another name=…"
        )
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(
            f"model.base={folder} has an adapter in addition to its UNet, which would be lost: give the base that the "
            "adapter was trained on"
        )
    for name, ours in _settings(config).items():
        if name not in there:
            continue
        theirs = json.loads((folder / name / "config.json").read_text())
        for key, value in ours.items():
            value = list(value) if isinstance(value, tuple) else value
            if key not in _MAY_DIFFER and theirs.get(key, value) != value:
                raise ConfigError(
                    f"model.base={folder}: its {name} has {key} {theirs[key]}, and these settings make {value}; set "
                    "the model's fields to those of the run that made it"
                )
    return there


def _exported_sha256(folder: Path) -> str | None:
    """Of the tensors in a fold's folder, from the export's list next to it."""
    for fold in (read_json(folder.parent / EXPORT_FILE) or {}).get("folds", []):
        if fold["name"] == folder.name:
            return str(fold["tensors_sha256"])
    return None


Net = t.TypeVar("Net", bound=nn.Module)


def _start(name: str, net: Net, *, config: TumorGeneratorConfig, weights_dir: str | None) -> Net:
    """`net` with the weights it starts from: the base's, else staged ones, else as it is. Raises: WeightsError."""
    if name in _check_base(config):
        from safetensors.torch import load_file

        where = str(Path(t.cast(str, config.base)) / name / FILES[name])
        state, way_on = load_file(where), "export the run it came from again"
    elif config.pretrained and name in SD_V1_5:
        where = SD_V1_5[name].name
        state = weights.load_staged(TumorGenerator, SD_V1_5[name], weights_dir)
        way_on = f"run: {weights.pull_command(TumorGenerator)}"
    else:
        return net
    try:
        net.load_state_dict(_as_named_now(state))
    except RuntimeError as error:
        raise WeightsError(f"{where} does not fit the {name} it is meant for: {error} Then {way_on}") from error
    return net


def _as_named_now(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of files from older versions of diffusers and transformers, by their names of today."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    named = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        for then, now in old.items():
            name = name.replace(then, now)
        if not name.endswith("position_ids"):
            named[name] = tensor
    return named


def _adapter(rank: int) -> t.Any:
    """peft's settings of (8): theta + AB, without any other factor."""
    from peft import LoraConfig  # takes seconds to import

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED), init_lora_weights="gaussian")


def _without_adapters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a module as it was before adapters were put into it."""
    state = module.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}

"""ViT-conditioned diffusion: a UNet that denoises masks, steered by a ViT's tokens, with a second head that segments.

Singh, Dholey and Vinod, "A Dual-Mode ViT-Conditioned Diffusion Framework with an Adaptive Conditioning Bridge for
Breast Cancer Segmentation". Equation numbers and symbols are the paper's: x_0 is the mask, -1 outside and 1 inside, x_t
the noised one, x'_0 the clean mask that a prediction of the noise implies, c the tokens, e_t the embedding of t.

    image ─ViT─→ c ─feature enhancers─→ c' per scale ─┐ (5), FiLM (4) by e_t
    image ─stem─┐                                     ↓
    x_t   ─stem─+─→ encoder, e_t ─→ deepest blocks ─→ decoder ─→ noise head ─→ x'_0 ─→ … a thousand times … ─→ mask
                                                           └──→ auxiliary head ─→ mask, in one pass

Times are counted from 0, as diffusers does: t = 0 is x_1 of the paper, t = T - 1 its x_T. Shape suffixes besides those
of `bushpc.sample`: h, w a decoder's map; N tokens, D their width.
"""

from __future__ import annotations

import copy
import itertools
import math
import typing as t

import torch
import typing_extensions as te
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import dice_loss, soft_dice_loss
from bushpc.losses.topology import start_topological_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.nn.diffusion import Noising, as_prob, check_steps, draw_noise, follow_timesteps, reverse
from bushpc.nn.pretrained import HALF, timm_facts
from bushpc.sample import Batch, Losses, Prediction

if t.TYPE_CHECKING:  # importing timm takes seconds, which the login node need not spend
    from timm.models.vision_transformer import VisionTransformer

GROUPS = 8  # of GroupNorm
# Patch edges of the shipped configs' ViTs, listed here because importing timm takes seconds.
PATCHES = {"vit_tiny_patch16_224.augreg_in21k_ft_in1k": 16, "test_vit": 16}


@config_class
class VitDiffusionConfig(BackboneConfig):
    """The paper's values are the defaults. `configs/model/vit_diffusion.yaml` lists what it leaves open."""

    usual = HALF  # of ViT-tiny

    image_size: int = setting(
        256,
        "Edge of the square input. The paper does not give it; 256 is MedSegDiff's, which it compares with.",
        unit="pixels",
        ge=1,
    )
    pretrained: bool = setting(
        True, "The ViT starts from staged ImageNet weights (2.2): `bushpc weights pull model=vit_diffusion`."
    )
    channels: int = setting(
        3, "Channels of the images: 3 for ultrasound, ISIC 2018 and REFUGE2, 4 for BraTS 2021.", ge=1
    )
    mask_classes: int = setting(
        1,
        "Classes of the masks: 1 for ultrasound and ISIC 2018, 2 for REFUGE2 (disc and cup), 3 for BraTS 2021. Each "
        "class has a separate mask, so they may overlap, as cup and disc do.",
        ge=1,
    )
    diffusion: bool = setting(
        True,
        'Table 3: false is "Aux Head Only (No Diffusion)", without noise head; then only the image is segmented.',
    )
    acb: bool = setting(True, 'Table 3: false is "ACB OFF", without the bridge, and so without ViT.')
    vit: str = setting(
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "A VisionTransformer of timm; ViT-tiny (2.2). The paper does not say which weights: timm's first choice, "
        "ImageNet-21k and then 1k.",
    )
    patch: int = setting(
        2,
        "The UNet works on squares of so many pixels, whose values become channels, and back at its end. Not in the "
        "paper: 2 costs a quarter of 1 and loses nothing, as the heads give each pixel its own value back.",
        unit="pixels",
        ge=1,
    )
    widths: tuple[int, ...] = setting(
        (32, 64, 128, 256),
        "Channels of the UNet's levels, each at half the resolution of the one before. Not in the paper; chosen for "
        "its total of parameters.",
    )
    depth: int = setting(3, "Residual blocks per level. Not in the paper; see widths.", ge=1)
    timesteps: int = setting(1000, "T (3.1).", ge=1)
    beta_schedule: t.Literal["linear", "cosine"] = setting(
        "linear", "Schedule of the noise; the paper does not say which, linear is DDPM's."
    )
    scaled_betas: bool | None = setting(
        None,
        "Whether the linear schedule's betas are multiplied by 1000 / T, so that x_T is noise. With another T, null "
        "becomes true when a command is composed; in the frozen config of an earlier version it stands for false.",
        since=5,
    )
    prediction: t.Literal["epsilon", "v"] = setting(
        "epsilon", "What the noise head predicts; epsilon in the paper (2.1)."
    )
    denoising_weight: float = setting(1.0, "alpha of (7). The paper does not give it.", ge=0, lt=math.inf)
    x0_dice_weight: float = setting(0.1, "lambda of (6). The paper does not give it.", ge=0, lt=math.inf)
    aux_dice_weight: float = setting(1.0, "beta of (7). The paper does not give it.", ge=0, lt=math.inf)
    aux_focal_weight: float = setting(1.0, "gamma of (7). The paper does not give it.", ge=0, lt=math.inf)
    focal_alpha: float = setting(
        0.25,
        "Weight of the foreground in the focal loss. The paper gives none; this is Lin et al.'s.",
        ge=0,
        le=1,
    )
    focal_gamma: float = setting(
        2.0, "Exponent of the focal loss. The paper gives none; this is Lin et al.'s.", ge=0, lt=math.inf
    )
    topo_weight: float = setting(
        0.0,
        "w_epoch of (8) rises linearly from 0 in epoch 0 to topo_weight in epoch topo_ramp, and stays there. 0 is the "
        'hybrid loss, which the paper\'s models have unless it says "enhanced"; 0.1 is the enhanced one. The paper '
        "gives neither.",
        ge=0,
        lt=math.inf,
    )
    topo_ramp: int = setting(50, "See topo_weight.", unit="epochs", ge=1)
    lookback: int = setting(5, "k of (9): 5, 10 or 15 (3.3).", unit="steps", ge=1)
    topo_gradient: t.Literal["current", "both"] = setting(
        "current",
        "`current`: x'_0|t-k, made from less noise, is a fixed aim for x'_0|t and needs no backward pass. `both`: each "
        "learns from the other. The paper does not say.",
    )
    topo_min_persistence: float = setting(
        0.0,
        "Points of a diagram up to this persistence are left out; 0 is (9) as it stands. At high t, x'_0 is hardly "
        "more than noise, with thousands of points.",
        ge=0,
        lt=math.inf,
    )
    topo_downsample: int = setting(
        1, "Maps are averaged over squares of so many pixels before; 1 is (9) as it stands.", unit="pixels", ge=1
    )
    inference: t.Literal["auxiliary", "generative"] = setting(
        "auxiliary",
        "`auxiliary`, the auxiliary head in one pass (Table 1), or `generative`, sampling (Table 2).",
        affects="predictions",
    )
    auxiliary_t: int = setting(
        999,
        "The t that enters in the auxiliary mode; the paper does not give it. No mask is known then, and only at "
        "t = T - 1 is what the network saw in training no more than noise. Chosen by experiment: vit_diffusion_small "
        "on the phantom (fold 0, one run) has a mean Dice of 0.903 with zeros, the noise's mean, and 0.871 with noise "
        "at t = 999; at t = 500 it is 0.739 and 0.769, at t = 0 0.356 and 0.485.",
        affects="predictions",
        ge=0,
    )
    auxiliary_input: t.Literal["noise", "zeros"] = setting(
        "zeros",
        "The x_t of the auxiliary mode, `noise` or `zeros`; see auxiliary_t.",
        affects="predictions",
    )
    sampler: t.Literal["ddpm", "ddim", "dpm_solver"] = setting(
        "ddpm",
        '`ddpm`, `ddim` (eta = 0) or `dpm_solver` (DPM-Solver++ of second order): 1000 steps of ddpm are "the full '
        'diffusion sampling process" (3.1).',
        affects="predictions",
    )
    steps: int = setting(
        1000, "Steps of the sampler. For ddpm and ddim they must divide T.", affects="predictions", ge=1
    )
    samples: int = setting(
        1,
        "Draws of noise per image; the prediction is their mean, and their deviation the uncertainty. The paper has "
        "one.",
        affects="predictions",
        ge=1,
    )
    sampling_seed: int = setting(
        0, "Seed of that noise, which depends on this and on the sample's key alone.", affects="predictions"
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built or sampled. Raises: ConfigError."""
        super().__post_init__()
        if self.image_size % self.topo_downsample:
            raise ConfigError(
                f"model.topo_downsample={self.topo_downsample} does not divide model.image_size={self.image_size}"
            )
        self._check_shapes()
        self._check_sampling()

    def follow_network(self) -> te.Self:
        """And with betas that follow T."""
        return follow_timesteps(super().follow_network())

    @property
    def needs(self) -> frozenset[str]:
        """Image and mask; the epochs for w_epoch of (8), the keys for the noise that a prediction draws."""
        epochs = {"epochs"} if self.topo_weight else set()
        keys = {"keys"} if self.draws_noise else set()
        return frozenset({"image_BCHW", "mask_BKHW"} | epochs | keys)

    def check_data(self, mask_classes: t.Sequence[str], channels: t.Sequence[str]) -> None:
        """As many heads as classes, as many inputs as channels. Raises: ConfigError."""
        given = {"mask_classes": mask_classes, "channels": channels}
        differ = {name: names for name, names in given.items() if len(names) != getattr(self, name)}
        if differ:
            raise ConfigError(
                "; ".join(
                    f"model.{name}={getattr(self, name)}, and this dataset has {len(names)} ({', '.join(names)})"
                    for name, names in differ.items()
                )
                + f". Set {' '.join(f'model.{name}={len(names)}' for name, names in differ.items())}"
            )

    def weight_files(self) -> list[WeightFile]:
        """The ViT's weights, if there is one. Raises: ConfigError when timm has none."""
        return [WeightFile.of_timm(self.vit)] if self.pretrained and self.acb else []

    @property
    def backbone(self) -> str | None:
        """The ViT, if there is one."""
        return self.vit if self.acb else None

    @property
    def blocks(self) -> tuple[type, ...]:
        """The ViT's blocks, the UNet's residual blocks and the bridges."""
        from diffusers.models.resnet import ResnetBlock2D
        from timm.models.vision_transformer import Block

        return Block, ResnetBlock2D, AdaptiveConditioningBridge

    @property
    def stride(self) -> int:
        """Of the UNet's deepest level to the image."""
        return self.patch << len(self.widths) - 1

    @property
    def draws_noise(self) -> bool:
        """Whether a prediction does."""
        return self.diffusion and (self.inference == "generative" or self.auxiliary_input == "noise")

    def _check_shapes(self) -> None:
        if len(self.widths) < 2 or any(width < 1 or width % GROUPS for width in self.widths):
            raise ConfigError(f"model.widths={list(self.widths)}: two or more multiples of {GROUPS} are needed")
        if self.image_size % self.stride:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {self.stride}, the stride of the deepest of "
                f"{len(self.widths)} levels on squares of {self.patch} pixels; the nearest is "
                f"{max(1, round(self.image_size / self.stride)) * self.stride}"
            )
        if self.acb:
            edge = PATCHES.get(self.vit) or self._patch_of_timm()
            if self.image_size % edge:
                raise ConfigError(
                    f"model.image_size={self.image_size} is not a multiple of {edge}, the patches of "
                    f"model.vit={self.vit}"
                )

    def _patch_of_timm(self) -> int:
        import timm
        from timm.layers.patch_embed import PatchEmbed
        from timm.models.vision_transformer import VisionTransformer

        if not timm.is_model(self.vit.partition(".")[0]):
            near = ", ".join(timm.list_models("vit_tiny*", include_tags=True))
            raise ConfigError(f"model.vit={self.vit}: timm has no such model; small ones are {near}")
        timm_facts(self.vit)  # refuses a tag that timm lacks
        with torch.device("meta"):  # shapes without weights
            vit = timm.create_model(self.vit, num_classes=0)
        if not isinstance(vit, VisionTransformer) or not isinstance(vit.patch_embed, PatchEmbed):
            raise ConfigError(f"model.vit={self.vit} is no plain vision transformer, such as vit_tiny_patch16_224")
        return int(vit.patch_embed.patch_size[0])

    def _check_sampling(self) -> None:
        if not self.diffusion:
            for name, needless in (("inference", self.inference == "generative"), ("topo_weight", self.topo_weight)):
                if needless:
                    raise ConfigError(
                        f"model.{name}={getattr(self, name)} with model.diffusion=false: there is no noise head; use "
                        "model.diffusion=true, or model.inference=auxiliary and model.topo_weight=0"
                    )
        if self.auxiliary_t >= self.timesteps:
            raise ConfigError(f"model.auxiliary_t={self.auxiliary_t}: must be ≤ {self.timesteps - 1} (T - 1)")
        if self.lookback >= self.timesteps:
            raise ConfigError(f"model.lookback={self.lookback}: must be ≤ {self.timesteps - 1} (T - 1)")
        check_steps(self)
        if self.samples > 1 and not self.draws_noise:
            raise ConfigError(
                f"model.samples={self.samples}: no noise is drawn with model.diffusion=false, or with model.inference="
                "auxiliary and model.auxiliary_input=zeros, so that all samples are the same; set model.samples=1"
            )


class VitDiffusion(Model):
    """Segmentation by denoising, or by an auxiliary head; any number of mask classes, which may overlap."""

    Config = VitDiffusionConfig
    makes = frozenset({"prob_BKHW"})

    config: VitDiffusionConfig

    def __init__(self, config: VitDiffusionConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = config.normalize(config.channels)
        self.vit = build_vit(config, weights_dir) if config.acb else None
        self.unet = DiffusionUNet(config, self.vit.embed_dim if self.vit else 0)
        self.noising = Noising(config)

    def cam_layer(self) -> nn.Module | None:
        """The decoder's last stage; none in generative mode, where a gradient would go through every step."""
        return self.unet.decoder[-1] if self.config.inference == "auxiliary" else None

    def forward(self, batch: Batch) -> Losses:
        """(6), and with a topo_weight (8); terms "mse", "dice_x0", "dice_aux", "focal_aux" and "topo".

        "topo" is L_topo of (9), the mean over samples and classes; the total has the mean of w_epoch log(1 + L_topo).
        Where w_epoch is 0 for the whole batch, as in epoch 0, L_topo is not computed and its term is 0.
        Both masks of (9) come from the same noise: x_t and x_t-k then lie on one path of denoising, and differ by k
        steps of it alone. Before the first step there is nothing: t - k is 0 at the least, and with t = 0 L_topo is 0.
        """
        config, mask_BKHW = self.config, batch.mask_BKHW
        condition = self.condition(batch.image_BCHW)
        if not config.diffusion:
            return self._auxiliary_losses(self.unet(None, torch.zeros(1), condition), mask_BKHW)

        x_0 = 2 * mask_BKHW - 1
        # On the CPU, where the schedule is; torch's generator there is seeded by step and rank too.
        t_B = torch.randint(config.timesteps, (len(x_0),))
        noise_BKHW = torch.randn_like(x_0)
        x_t = self.noising.noised(x_0, noise_BKHW, t_B)
        map_BDhw = self.unet(x_t, t_B, condition)
        predicted_BKHW = self.unet.noise_head(map_BDhw).float()
        x0_t = self.noising.clean(predicted_BKHW, x_t, t_B)
        topology = None
        w_B = torch.tensor([config.topo_weight * min(1.0, epoch / config.topo_ramp) for epoch in batch.epochs])
        no_topology = 0.0
        if config.topo_weight:  # in every epoch, or ranks would differ in their passes where ZeRO-3 gathers parameters
            earlier_B = (t_B - config.lookback).clamp(min=0)
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.topo_gradient == "both"):
                x_earlier = self.noising.noised(x_0, noise_BKHW, earlier_B)
                predicted_earlier = self.unet.noise_head(self.unet(x_earlier, earlier_B, condition))
                x0_earlier = self.noising.clean(predicted_earlier.float(), x_earlier, earlier_B)
            if w_B.any():  # diagrams cost the most by far, and in epoch 0 they would count for nothing
                topology = start_topological_loss(
                    as_prob(x0_t),
                    as_prob(x0_earlier),
                    min_persistence=config.topo_min_persistence,
                    downsample=config.topo_downsample,
                )
            else:  # the same backward pass on all ranks
                no_topology = 0.0 * predicted_earlier.float().mean()

        target_BKHW = noise_BKHW if config.prediction == "epsilon" else self.noising.velocity(x_0, noise_BKHW, t_B)
        mse = F.mse_loss(predicted_BKHW, target_BKHW)
        dice_x0 = dice_loss(as_prob(x0_t), mask_BKHW)
        auxiliary = self._auxiliary_losses(map_BDhw, mask_BKHW)
        total = config.denoising_weight * (mse + config.x0_dice_weight * dice_x0) + auxiliary.total
        terms = {"mse": mse.detach(), "dice_x0": dice_x0.detach(), **auxiliary.terms}
        if topology is not None:
            topo_BK = topology.loss()
            total = total + (w_B.to(topo_BK)[:, None] * topo_BK.log1p()).mean()
            terms["topo"] = topo_BK.detach().mean()
        elif config.topo_weight:
            total = total + no_topology
            terms["topo"] = torch.zeros_like(mse.detach())
        return Losses(total=total, terms=terms)

    def _auxiliary_losses(self, map_BDhw: torch.Tensor, mask_BKHW: torch.Tensor) -> Losses:
        config, logits_BKHW = self.config, self.unet.auxiliary_head(map_BDhw).float()
        from torchvision.ops import sigmoid_focal_loss  # takes a second to import

        dice = soft_dice_loss(logits_BKHW, mask_BKHW)
        focal = sigmoid_focal_loss(logits_BKHW, mask_BKHW, config.focal_alpha, config.focal_gamma, reduction="mean")
        return Losses(
            total=config.aux_dice_weight * dice + config.aux_focal_weight * focal,
            terms={"dice_aux": dice.detach(), "focal_aux": focal.detach()},
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities by the mode of the config, the mean over `samples`; with several of them their deviation too.

        Each sample's noise is drawn from its key and `sampling_seed`, so it is the same in any batch, on any rank and
        after a resume. `Batch.mask_BKHW` is not read.
        """
        config = self.config
        condition = self.condition(batch.image_BCHW).repeated(config.samples)
        x_T, generators = self.draw(batch)
        if config.inference == "generative":
            prob = as_prob(self.sample(x_T, condition, generators))
        else:
            t_1 = torch.tensor([config.auxiliary_t if config.diffusion else 0])
            map_BDhw = self.unet(x_T if config.diffusion else None, t_1, condition)
            prob = self.unet.auxiliary_head(map_BDhw).float().sigmoid()
        if config.samples == 1:
            return Prediction(prob_BKHW=prob)
        prob_BnKHW = prob.unflatten(0, (-1, config.samples))
        return Prediction(prob_BKHW=prob_BnKHW.mean(dim=1), uncertainty_BKHW=prob_BnKHW.std(dim=1, correction=0))

    def condition(self, image_BCHW: torch.Tensor) -> Condition:
        """Everything that depends on the image alone, computed once for all steps and samples."""
        tokens_BND = None
        if self.vit is not None:
            tokens_BND = self.vit.forward_features(self.normalize(image_BCHW, self.vit))
        return self.unet.condition(self.normalize(image_BCHW, self.unet), tokens_BND)

    def sample(
        self, x_T: torch.Tensor, condition: Condition, generators: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """The reverse process from x_T, B x K x H x W, to x_0.

        generators: B of them, for what `ddpm` draws at each step. x'_0 is cut to [-1, 1] each time, as Ho et al. do.
        """
        unet = self.unet
        if x_T.device.type == "cpu":
            # About a tenth less of the processor's time, a sixth in bfloat16. A copy, since training goes on with the
            # order of memory, and so with the rounding, that it began with. CUDA's GroupNorm has only the other order.
            unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        return reverse(
            self.config, self.noising, lambda x, t_1: unet.noise_head(unet(x, t_1, condition)), x_T, generators
        )

    def draw(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Generator]]:
        """x_T of all samples of all images, image by image, and the generators it came from; zeros without noise."""
        config, device = self.config, batch.image_BCHW.device
        count, _, *size = batch.image_BCHW.shape
        if not config.draws_noise:
            return torch.zeros(count, config.mask_classes, *size, device=device), []
        return draw_noise(config, batch.keys, (config.mask_classes, *size), device)


# --- network ----------------------------------------------------------------------------------------------------


class Condition(t.NamedTuple):
    """What depends on the image alone. stem_BChw: its share of the UNet's first map. enhanced: c' of each bridge."""

    stem_BChw: torch.Tensor
    enhanced: tuple[torch.Tensor, ...]

    def repeated(self, count: int) -> Condition:
        """Each image `count` times in a row."""
        if count == 1:
            return self
        again = [value.repeat_interleave(count, dim=0) for value in (self.stem_BChw, *self.enhanced)]
        return Condition(again[0], tuple(again[1:]))


def build_vit(config: VitDiffusionConfig, weights_dir: str | None) -> VisionTransformer:
    """timm's ViT for this image size and these channels, with staged weights where the config says so.

    Positions are interpolated to the image's grid, and filters of colours shared out over other channels, as timm does.
    Raises: WeightsError.
    """
    import timm
    from timm.models import adapt_input_conv
    from timm.models.vision_transformer import checkpoint_filter_fn

    size = config.image_size
    vit = t.cast(
        "VisionTransformer", timm.create_model(config.vit, img_size=size, in_chans=config.channels, num_classes=0)
    )
    if config.pretrained:
        file = WeightFile.of_timm(config.vit)
        state = weights.load_staged(VitDiffusion, file, weights_dir)
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        with weights.fits(VitDiffusion, file):
            name = "patch_embed.proj.weight"
            state[name] = adapt_input_conv(config.channels, state[name])
            vit.load_state_dict(checkpoint_filter_fn(state, vit))
    return vit


class DiffusionUNet(nn.Module):
    """epsilon_theta and s_aux: residual blocks that read e_t, a bridge to the ViT's tokens after each decoder stage.

    The image enters with x_t, as in MedSegDiff. Its first convolution is a sum of one of x_t and one of the image, so
    that the second is computed once.
    """

    def __init__(self, config: VitDiffusionConfig, token_width: int) -> None:
        from diffusers.models.embeddings import TimestepEmbedding  # takes seconds to import

        super().__init__()
        widths, time_width, square = config.widths, 4 * config.widths[0], config.patch**2
        self.patch, self.width = config.patch, widths[0]
        self.time = TimestepEmbedding(widths[0], time_width)
        self.stem_image = nn.Conv2d(config.channels * square, widths[0], 3, padding=1)
        if config.diffusion:
            self.stem_x = nn.Conv2d(config.mask_classes * square, widths[0], 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(
            EncoderStage(width, after, config.depth, time_width) for width, after in itertools.pairwise(widths)
        )
        self.deepest = _residual_blocks(widths[-1], widths[-1], config.depth, time_width)
        self.decoder = nn.ModuleList(
            DecoderStage(before, width, config.depth, time_width, token_width)
            for before, width in itertools.pairwise(reversed(widths))
        )
        self.auxiliary_head = _head(widths[0], config.mask_classes, config.patch)
        if config.diffusion:
            self.noise_head = _head(widths[0], config.mask_classes, config.patch)

    def condition(self, image_BCHW: torch.Tensor, tokens_BND: torch.Tensor | None) -> Condition:
        """From the normalised image, and the ViT's tokens c where there are bridges."""
        stem_BChw = self.stem_image(F.pixel_unshuffle(image_BCHW, self.patch))
        if tokens_BND is None:
            return Condition(stem_BChw, ())
        stages = [t.cast(DecoderStage, stage) for stage in self.decoder]
        return Condition(stem_BChw, tuple(stage.bridge.enhance(tokens_BND) for stage in stages))

    def forward(self, x_t: torch.Tensor | None, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The map that both heads read. x_t: B x K x H x W, None without diffusion. t_B: B times, or one for all."""
        x = condition.stem_BChw
        if x_t is not None:
            # In this order: a sum is laid out in memory as its first term.
            x = self.stem_x(F.pixel_unshuffle(x_t.to(self.stem_x.weight.dtype), self.patch)) + x
        from diffusers.models.embeddings import get_timestep_embedding

        code = get_timestep_embedding(t_B.to(x.device), self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        e_t = self.time(code.to(x.dtype))
        skips = []
        for down in self.encoder:
            skip, x = down(x, e_t)
            skips.append(skip)
        for block in self.deepest:
            x = block(x, e_t)
        for i, up in enumerate(self.decoder):
            x = up(x, skips.pop(), e_t, condition.enhanced[i] if condition.enhanced else None)
        return x


class EncoderStage(nn.Module):
    """Residual blocks at one resolution, then half of it."""

    def __init__(self, width: int, after: int, depth: int, time_width: int) -> None:
        super().__init__()
        self.blocks = _residual_blocks(width, width, depth, time_width)
        self.down = nn.Conv2d(width, after, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, e_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B x width x h x w to the skip, as large, and B x after x h/2 x w/2."""
        for block in self.blocks:
            x = block(x, e_t)
        return x, self.down(x)


class DecoderStage(nn.Module):
    """Twice the resolution, the skip, residual blocks, and the bridge to the tokens where there are some."""

    def __init__(self, before: int, width: int, depth: int, time_width: int, token_width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1))
        self.blocks = _residual_blocks(2 * width, width, depth, time_width)
        if token_width:
            self.bridge = AdaptiveConditioningBridge(width, token_width, time_width)

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor, e_t: torch.Tensor, enhanced_BND: torch.Tensor | None
    ) -> torch.Tensor:
        """B x before x h x w to B x width x 2h x 2w."""
        x = torch.cat([self.up(x), skip], dim=1)
        for block in self.blocks:
            x = block(x, e_t)
        return x if enhanced_BND is None else self.bridge(x, enhanced_BND, e_t)


class AdaptiveConditioningBridge(nn.Module):
    """(4) and (5): the decoder's map z asks the enhanced tokens c', which the time modulates.

    With f = gamma c' + beta, softmax(z f^T / sqrt(d)) f = gamma softmax((z gamma) c'^T / sqrt(d)) c' + beta: z beta^T
    is the same for all tokens, which a softmax does not see, and its weights sum to 1. So gamma and beta move to the
    map's side, exactly, and c' is key and value at all times: made once per image, whatever t is.
    """

    def __init__(self, width: int, token_width: int, time_width: int) -> None:
        super().__init__()
        self.enhance = nn.Sequential(
            nn.LayerNorm(token_width), nn.Linear(token_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.film = nn.Linear(time_width, 2 * width)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.query = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, enhanced_BND: torch.Tensor, e_t: torch.Tensor) -> torch.Tensor:
        """x plus what was read: B x D x h x w; D is the width of map and of c'."""
        gamma_B1D, beta_B1D = self.modulation(e_t)
        z_BND = self.query(self.norm(x)).flatten(2).transpose(1, 2)
        # One head, but as a dimension, and with each position's numbers side by side in memory: otherwise the kernels
        # that hold no N x N map are passed over.
        q_B1ND, kv_B1ND = (z_BND * gamma_B1D).contiguous()[:, None], enhanced_BND[:, None]
        read_BND = F.scaled_dot_product_attention(q_B1ND, kv_B1ND, kv_B1ND)[:, 0]
        read_BND = gamma_B1D * read_BND + beta_B1D
        return x + self.out(read_BND.transpose(1, 2).unflatten(2, x.shape[2:]))

    def modulation(self, e_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gamma and beta of (4), B x 1 x D; gamma is 1 plus what is learnt."""
        gamma_BD, beta_BD = self.film(F.silu(e_t)).chunk(2, dim=1)
        return 1 + gamma_BD[:, None], beta_BD[:, None]


def _residual_blocks(given: int, made: int, depth: int, time_width: int) -> nn.ModuleList:
    from diffusers.models.resnet import ResnetBlock2D

    return nn.ModuleList(
        ResnetBlock2D(in_channels=made if i else given, out_channels=made, temb_channels=time_width, groups=GROUPS)
        for i in range(depth)
    )


def _head(given: int, mask_classes: int, patch: int) -> nn.Sequential:
    conv = nn.Conv2d(given, mask_classes * patch**2, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(GROUPS, given), nn.SiLU(), conv, nn.PixelShuffle(patch))

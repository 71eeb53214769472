"""What is tried: each model at its small and at its full size, with the stages and settings that run other code."""

from __future__ import annotations

import dataclasses
import typing as t

import torch

from bushpc.config import CellConfig, compose
from bushpc.sample import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """name: of the row. words: the settings. memory: its peak goes into the table that `bushpc doctor` reads."""

    name: str
    words: tuple[str, ...]
    full: bool = False
    memory: bool = False


def _small(model: str, *words: str, name: str = "") -> Case:
    return Case(name=name or model, words=(f"model={model}", *words))


def _full(model: str, *words: str, name: str = "", memory: bool = True) -> Case:
    """Without weights, and without stored features, so that the frozen parts run, too."""
    plain = (f"model={model}", "model.pretrained=false", "loader.features=false", "train.accumulate=1")
    return Case(name=name or model, words=(*plain, *words), full=True, memory=memory)


GENERATIVE = ("model.inference=generative", "model.steps=2", "model.samples=2")
SEGMENTATION_RIVALS = (
    *("classic_unet", "attention_unet", "basic_unet", "unet_plus_plus", "fcn", "deeplabv3", "swin_unetr", "smp"),
    *("smp_label", "edcnn", "aau_net", "transunet", "swin_unet", "u_kan", "anatosegnet", "multitask_nnunet"),
    *("mask_rcnn", "bussam", "clip_tnseg", "xbusnet_released"),
)
CASES = (
    _small("unet_small"),
    _small("unet_small", "engine.channels_last=true", name="unet_small channels_last"),
    _small("efficientnet_small"),
    _small("hybrid_attention_small"),
    _small("hybrid_attention_small", "engine.channels_last=true", name="hybrid_attention_small channels_last"),
    _small("xbusnet_small"),
    _small("xbusnet_small", "engine.recompute=true", "train.accumulate=2", name="xbusnet_small recompute"),
    _small("xbusnet_small", "engine.channels_last=true", name="xbusnet_small channels_last"),
    _small("sam_multitask_small"),
    _small("sam_multitask_small", "model.encoder=frozen", name="sam_multitask_small frozen"),
    _small("sam_multitask_small", "model.encoder=lora", "model.decoder=sd", name="sam_multitask_small lora, SD-H"),
    _small("vit_diffusion_small"),
    _small("vit_diffusion_small", "model.topo_weight=0.1", "model.topo_gradient=both", name="vit_diffusion_small topo"),
    _small("vit_diffusion_small", *GENERATIVE, name="vit_diffusion_small ddim"),
    _small("vit_diffusion_small", *GENERATIVE, "model.sampler=ddpm", name="vit_diffusion_small ddpm"),
    _small("vit_diffusion_small", *GENERATIVE, "model.sampler=dpm_solver", name="vit_diffusion_small dpm_solver"),
    _small("tumor_generator_small", "model.steps=2"),
    _small("tumor_generator_small", "model.steps=2", "model.stage=lora", name="tumor_generator_small lora"),
    _small("tumor_generator_small", "model.steps=2", "model.sampler=unipc", name="tumor_generator_small unipc"),
    _small("tumor_generator_vae_small"),
    _small("transunet_small"),
    _small("swin_unet_small"),
    _small("aau_net_small"),
    _small("u_kan_small"),
    _small("anatosegnet_small"),
    _small("multitask_nnunet_small"),
    _small("medsegdiff_small", "model.steps=2"),
    _small("bus_recipe_small"),
    _small("bussam_small"),
    _small("clip_tnseg_small"),
    _full("unet"),
    _full("efficientnet"),
    _full("hybrid_attention"),
    _full("hybrid_attention", "engine.channels_last=true", name="hybrid_attention channels_last", memory=False),
    _full("xbusnet"),
    _full("xbusnet", "engine.recompute=true", name="xbusnet recompute"),
    _full("xbusnet", "engine.channels_last=true", name="xbusnet channels_last", memory=False),
    _full("vit_diffusion"),
    _full("vit_diffusion", *GENERATIVE, name="vit_diffusion ddpm", memory=False),
    _full("sam_multitask", name="sam_multitask frozen"),
    _full("sam_multitask", "loader.features=true", name="sam_multitask features"),
    _full("sam_multitask", "model.encoder=lora", name="sam_multitask lora"),
    _full("sam_multitask", "model.encoder=full", name="sam_multitask full"),
    _full("sam_multitask", "model.encoder=full", "engine.recompute=true", name="sam_multitask full recompute"),
    _full("tumor_generator_vae"),
    _full("tumor_generator", "model.steps=2", name="tumor_generator"),
    _full("tumor_generator", "model.steps=2", "engine.recompute=true", name="tumor_generator recompute"),
    _full(
        "tumor_generator", "loader.features=true", "engine.recompute=true", name="tumor_generator features recompute"
    ),
    _full("tumor_generator", "loader.features=true", name="tumor_generator features"),
    _full("tumor_generator", "model.stage=lora", "loader.features=true", name="tumor_generator lora features"),
    _full("bus_recipe"),
    *(_full(rival) for rival in SEGMENTATION_RIVALS),
    _full("medsegdiff", "model.steps=2"),
    *(_full(rival) for rival in ("gan", "cgan", "dcgan")),
    *(_full(rival, "model.steps=2") for rival in ("ddpm", "sgd")),
)


def cell_of(case: Case, precision: str) -> CellConfig:
    """The composed cell of a case on one GPU."""
    on_gpu = ("data=phantom", "cluster.gpus=1", "engine.device=cuda", f"engine.precision={precision}", "fold=0")
    return compose([*case.words, *on_gpu])


def batch_of(cell: CellConfig, images: int) -> Batch:
    """As the loader hands it over: uint8, on the CPU."""
    edge = cell.model.image_size
    channels, classes = getattr(cell.model, "channels", 3), getattr(cell.model, "mask_classes", 1)
    sentences: dict[str, list[t.Any]] = {
        "spatial_prompts": ["a small lesion in the upper inner quadrant of the breast"] * images,
        "attribute_prompts": ["oval shape, circumscribed margin"] * images,
        "captions": ["breast ultrasound image of benign tumor"] * images,
        "place_prompts": [(0.5, 0.5)] * images,
    }
    return Batch(
        keys=[f"scan{i}" for i in range(images)],
        epochs=[50] * images,
        image_BCHW=torch.zeros(images, channels, edge, edge, dtype=torch.uint8),
        mask_BKHW=torch.zeros(images, classes, edge, edge, dtype=torch.uint8),
        label_B=torch.arange(images) % 2,
        conditions=sentences,
    )

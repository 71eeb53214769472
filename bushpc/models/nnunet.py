"""nnU-Net (Isensee et al. 2021, Nature Methods 18, 203-211): the network of the nnunetv2 package behind our contract.

Its own trainer trains it, see bushpc.train.nnunet. nnU-Net plans the network from the images that it trains on, so a
model has none before it is told the plan; weights carry the plan with them, and load into a model that has none.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import typing as t
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from bushpc.config import ModelConfig, config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction

if t.TYPE_CHECKING:
    from bushpc.config import CellGroups

# The properties that nnU-Net's reader of natural images reports; it has no pixel size.
SPACING = (999, 1, 1)
LESION = 1  # its label
# Settings that nnU-Net decides itself. They must keep their defaults.
ITS_OWN: dict[str, t.Any] = {
    **{"engine.kind": "ddp", "engine.recompute": False, "engine.channels_last": False, "loader.features": False},
    **{"data.stream": None, "train.epochs": None, "train.batch_size": 1, "train.accumulate": 1},
    **{"train.balance": False, "train.schedule": "cosine", "train.stop_patience": 0, "train.holdout": 0.0},
    **{"train.warmup": 0, "train.grad_clip": 1.0, "train.ema": 0.0, "train.validate_every": 0},
}


@config_class
class NnUNetConfig(ModelConfig):
    """nnU-Net plans the rest of its settings itself, from the fold's real training scans."""

    image_size: int = setting(
        512,
        "Edge of the square images that it gets, resized as for all other models, and at which it is scored. nnU-Net "
        "itself would take the images as they are.",
        unit="pixels",
        ge=1,
    )
    pretrained: bool = setting(False, "nnU-Net trains from scratch; true is rejected.")
    iterations_per_epoch: int = setting(
        250,
        "Steps of an nnU-Net epoch: each has one learning rate, and ends with its own validation and a checkpoint.",
        unit="steps",
        ge=1,
    )

    @property
    def needs(self) -> frozenset[str]:
        """The image alone: its own trainer reads masks from files."""
        return frozenset({"image_BCHW"})

    @property
    def why_no_mirror(self) -> str:
        """Its predictor does it."""
        return "averages over mirror images by itself"

    def __post_init__(self) -> None:
        """Refuse impossible values. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: nnU-Net trains from scratch; set model.pretrained=false")

    def check_run(self, cell: CellGroups) -> None:
        """Refuse settings that nnU-Net does not have, and machines without nnunetv2. Raises: ConfigError."""
        if cell.cluster.world_size > 1:
            raise ConfigError(
                f"model=nnunet with {cell.cluster.world_size} ranks (cluster.nodes x cluster.ranks_per_node): nnU-Net "
                "plans for one GPU; set both to 1, and train the folds side by side"
            )
        found = {key: functools.reduce(getattr, key.split("."), t.cast(t.Any, cell)) for key in ITS_OWN}
        given = [f"{key}={found[key]}" for key, own in ITS_OWN.items() if found[key] != own]
        given += ["augment.*"] if cell.augment.changes else []
        if given:
            raise ConfigError(
                f"{', '.join(given)}: nnU-Net has its own augmentation, batch size, schedule and so on, which it "
                "cannot be told. Leave that out; what it follows is train.iterations, train.lr, train.weight_decay, "
                "train.save_every and train.keep"
            )
        per_epoch = self.iterations_per_epoch
        if cell.train.iterations % per_epoch:
            nearest = max(1, round(cell.train.iterations / per_epoch)) * per_epoch
            raise ConfigError(
                f"train.iterations={cell.train.iterations} is no multiple of model.iterations_per_epoch={per_epoch}; "
                f"the nearest is {nearest}"
            )
        if importlib.util.find_spec("nnunetv2") is None:
            raise ConfigError(
                "model=nnunet is the package nnunetv2, which is not installed: pip install 'bushpc[nnunet]', or "
                "choose model=unet"
            )


class Blueprint(t.TypedDict):
    """The plan of a network, as nnU-Net writes it. mirroring: axes of its test-time augmentation."""

    plans: dict[str, t.Any]
    configuration: str
    dataset: dict[str, t.Any]
    mirroring: list[int]


class NnUNet(Model):
    """nnU-Net as the nnunetv2 package plans, trains and applies it; one mask class.

    blueprint: its Blueprint as JSON, bytes (N); empty as long as there is no network.
    """

    Config = NnUNetConfig
    makes = frozenset({"prob_BKHW"})
    trainer = "bushpc.train.nnunet"

    config: NnUNetConfig
    blueprint: torch.Tensor
    network: nn.Module | None

    def __init__(self, config: NnUNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.register_buffer("blueprint", torch.empty(0, dtype=torch.uint8))
        self.network = None
        self._predictor: t.Any = None

    def build(self, blueprint: Blueprint, network: nn.Module | None = None) -> None:
        """Take a network that nnU-Net's trainer has built by these plans, or build it."""
        text = json.dumps(blueprint, sort_keys=True).encode()
        self.blueprint = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.network, self._predictor = network or self._architecture(), None

    def state_dict(self, *args: t.Any, **kwargs: t.Any) -> dict[str, t.Any]:  # type: ignore[override]
        """Like any module's, with each tensor once: nnU-Net's modules hold some under several names."""
        names = {name for name, _ in (*self.named_parameters(), *self.named_buffers())}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in names}

    def load_state_dict(self, state_dict: Mapping[str, t.Any], strict: bool = True, assign: bool = False) -> t.Any:
        """The inverse; builds the network that the weights are of where there is none."""
        if self.network is None and "blueprint" in state_dict:
            self.build(json.loads(bytes(state_dict["blueprint"].tolist())))
        name_of = {tensor.data_ptr(): name for name, tensor in self.state_dict().items()}
        everywhere = {name: name_of[tensor.data_ptr()] for name, tensor in super().state_dict().items()}
        again = {name: state_dict[first] for name, first in everywhere.items() if first in state_dict}
        return super().load_state_dict({**state_dict, **again}, strict, assign)

    def predict(self, batch: Batch) -> Prediction:
        """nnU-Net's own: its preprocessing, patches that overlap by half, the mean over mirror images."""
        assert self.network is not None, "it was trained, or has loaded weights"
        self.network.decoder.deep_supervision = False  # type: ignore[union-attr]
        if self._predictor is None or self._predictor.device != batch.image_BCHW.device:
            self._predictor = self._new_predictor(batch.image_BCHW.device)
        maps = [self._probability(image_CHW) for image_CHW in batch.image_BCHW]
        return Prediction(prob_BKHW=torch.stack(maps)[:, None].to(batch.image_BCHW.device))

    def _new_predictor(self, device: torch.device) -> t.Any:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        blueprint = self._blueprint()
        plans = PlansManager(blueprint["plans"])
        predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
        predictor.manual_initialization(
            *(self.network, plans, plans.get_configuration(blueprint["configuration"]), None),
            *(blueprint["dataset"], "nnUNetTrainer", tuple(blueprint["mirroring"])),
        )
        return predictor

    def _probability(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """prob_HW of one image, which comes from 0 to 1; nnU-Net has grey levels."""
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        predictor, plans = self._predictor, self._predictor.plans_manager
        configuration = predictor.configuration_manager
        levels_C1HW = (image_CHW.float() * 255).round()[:, None].cpu().numpy()
        if not levels_C1HW.any():  # nnU-Net cuts black edges off, and nothing would be left
            return torch.zeros(image_CHW.shape[1:])
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            levels_C1HW, None, {"spacing": SPACING}, plans, configuration, predictor.dataset_json
        )
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.ascontiguousarray(data))).cpu()
        _, prob_LHW = convert_predicted_logits_to_segmentation_with_correct_shape(
            *(logits, plans, configuration, predictor.label_manager, properties),
            return_probabilities=True,
            num_threads_torch=torch.get_num_threads(),
        )
        return torch.from_numpy(prob_LHW[LESION, 0].astype(np.float32))

    def _blueprint(self) -> Blueprint:
        return t.cast(Blueprint, json.loads(bytes(self.blueprint.tolist())))

    def _architecture(self) -> nn.Module:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        blueprint = self._blueprint()
        plans, dataset = PlansManager(blueprint["plans"]), blueprint["dataset"]
        configuration = plans.get_configuration(blueprint["configuration"])
        channels = determine_num_input_channels(plans, configuration, dataset)
        heads = plans.get_label_manager(dataset).num_segmentation_heads
        network: nn.Module = nnUNetTrainer.build_network_architecture(plans, configuration, channels, heads, False)
        return network

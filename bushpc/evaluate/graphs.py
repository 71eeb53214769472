"""A model as one graph, image → probability map: torch.export and ONNX files for programs without bushpc."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from bushpc.config import CellConfig
from bushpc.errors import ConfigError
from bushpc.files import flush_file
from bushpc.models.base import Model
from bushpc.sample import Batch

FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
# What a graph may differ by from the model that it was made of, in probability: rounding, not another model.
GRAPH_TOLERANCE = {"torch": 1e-6, "onnx": 1e-4}
# Fields of a Batch that are tensors of the image; a model that reads others is more than one graph.
GRAPH_INPUTS = {"image_BCHW", "mask_BKHW", "label_B"}


class _Graph(nn.Module):
    """A model as one function of tensors: image (B x 3 x S x S, 0 to 1) → probability of lesion (B x K x S x S)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        batch = Batch(
            keys=[],
            epochs=[],
            image_BCHW=image_BCHW,
            mask_BKHW=torch.zeros_like(image_BCHW[:, :1]),
            label_B=torch.zeros_like(image_BCHW[:, 0, 0, 0], dtype=torch.int64),
        )
        prob_BKHW = self.model.predict(batch).prob_BKHW
        assert prob_BKHW is not None
        return prob_BKHW


def refuse_graphs(config: CellConfig, graphs: Sequence[str]) -> None:
    more = sorted(config.model.needs - GRAPH_INPUTS | {kind.name for kind in config.model.conditions})
    if graphs and more:
        raise ConfigError(
            f"--format {' '.join(graphs)}: {config.model_class.__name__} reads {', '.join(more)}, sentences that are "
            "made, embedded and, after a first pass, made again: that is no one function of an image, which is what a "
            "graph holds. Leave the format out: safetensors holds all of it, for bushpc.load"
        )
    if "onnx" in graphs:
        lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if lacking:
            raise ConfigError(f"--format onnx needs {', '.join(lacking)}: pip install 'bushpc[onnx]', or leave it out")


def write_graph(model: Model, kind: str, path: Path) -> float:
    """Write it for any batch size, run what was written, and return how far it is off at most, in probability.

    Raises: ConfigError when it is not the same function.
    """
    graph = _Graph(model).eval()
    size = model.config.image_size
    image_BCHW = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        # Not strict: bytecode tracing is for programs with control flow, and takes several times as long.
        try:
            program = torch.export.export(graph, (image_BCHW,), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever the model's code does that cannot be traced
            raise ConfigError(
                f"--format {kind}: torch cannot make a graph of {type(model).__name__} "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Leave the format out"
            ) from error
        if kind == "torch":
            torch.export.save(program, path)
            run: Callable[[torch.Tensor], torch.Tensor] = torch.export.load(path).module()
        else:
            torch.onnx.export(
                program,
                (image_BCHW,),
                path,
                input_names=["image"],
                output_names=["probability"],
                external_data=False,
                verbose=False,
            )
            run = _onnx_session(path)
        # Another batch than the one that was traced, and a single image.
        others = [image_BCHW[:1], image_BCHW.flip(0)[:2]]
        deviation = max(float((run(other) - graph(other)).abs().max()) for other in others)
    if not deviation <= (allowed := GRAPH_TOLERANCE[kind]):
        raise ConfigError(
            f"--format {kind}: the graph is off by {deviation:.2g} in probability, {allowed:g} is allowed: it is not "
            "this model. Leave the format out"
        )
    flush_file(path)
    return deviation


def _onnx_session(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image_BCHW: torch.from_numpy(session.run(None, {"image": image_BCHW.numpy()})[0])

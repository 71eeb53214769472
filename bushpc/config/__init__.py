"""Every setting of a run, and how yaml files and words of the command line become one.

train, fine_tune, data, augment, evaluate, loader, engine, prompting, cluster
             one file per group: every field with default, unit, sentence, bounds, what it affects
model.py     the fields that every model has; a model's file extends them
cell.py      the groups together: what their combinations allow, the hash, the frozen config.yaml
fields.py    how a field is declared (`setting`)
catalogue.py all fields of a class as one list
content.py   yaml files and words → plain settings, each with its source
compose.py   the one reader: Hydra's groups, site yamls, grids, the command line → a checked `CellConfig`
read.py      plain data → config classes, and back
places.py    where configs, shards, runs and weights lie
"""

from bushpc.config.augment import AugmentConfig, StrengthConfig
from bushpc.config.cell import CellConfig, differences, way_on
from bushpc.config.cluster import ClusterConfig
from bushpc.config.compose import (
    GROUPS,
    Composer,
    Described,
    Origin,
    compose,
    compose_command,
    config_names,
    described,
    explain,
    group_names,
    model_names,
    reconfigure,
    shards_folder,
)
from bushpc.config.data import DataConfig
from bushpc.config.engine import Device, EngineConfig, Precision
from bushpc.config.evaluate import EvaluateConfig
from bushpc.config.fields import About, Settings, as_word, config_class, group, setting
from bushpc.config.frozen import load_frozen
from bushpc.config.loader import LoaderConfig
from bushpc.config.model import CellGroups, ModelConfig, WeightFile, model_of, target_of
from bushpc.config.prompting import PromptingConfig
from bushpc.config.read import YAML_FAILS, flat
from bushpc.config.train import TrainConfig

__all__ = [
    "GROUPS",
    "YAML_FAILS",
    "About",
    "AugmentConfig",
    "CellConfig",
    "CellGroups",
    "ClusterConfig",
    "Composer",
    "DataConfig",
    "Described",
    "Device",
    "EngineConfig",
    "EvaluateConfig",
    "LoaderConfig",
    "ModelConfig",
    "Origin",
    "Precision",
    "PromptingConfig",
    "Settings",
    "StrengthConfig",
    "TrainConfig",
    "WeightFile",
    "as_word",
    "compose",
    "compose_command",
    "config_class",
    "config_names",
    "described",
    "differences",
    "explain",
    "flat",
    "group",
    "group_names",
    "load_frozen",
    "model_names",
    "model_of",
    "reconfigure",
    "setting",
    "shards_folder",
    "target_of",
    "way_on",
]

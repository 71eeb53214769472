"""Every setting of a run, and how yaml files and words of the command line become one.

schema.py   every field: default, unit, sentence, bounds, what it affects
            (cluster.py: those of profiles; augment.py: those of augmentation)
fields.py   how a field is declared (`setting`)
compose.py  the one reader: Hydra's groups, site yamls, grids, the command line → a checked `CellConfig`
read.py     plain data → config classes, and back
places.py   where configs, shards, runs and weights lie
"""

from bushpc.config.augment import AugmentConfig, StrengthConfig
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
from bushpc.config.fields import About, Settings, as_word, config_class, group, setting
from bushpc.config.read import YAML_FAILS, flat
from bushpc.config.schema import (
    CellConfig,
    DataConfig,
    Device,
    EngineConfig,
    EvaluateConfig,
    LoaderConfig,
    ModelConfig,
    Precision,
    PromptingConfig,
    TrainConfig,
    WeightFile,
    differences,
    load_frozen,
    model_of,
    way_on,
)

__all__ = [
    "GROUPS",
    "YAML_FAILS",
    "About",
    "AugmentConfig",
    "CellConfig",
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
    "way_on",
]

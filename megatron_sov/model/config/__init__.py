"""Training run settings, as frozen dataclasses (no torch).

Reading a config (JSON, `--set key=value`) checks types and bounds of single values. `RunConfig.problems()`
returns every violated rule between settings; `RunConfig.check()` raises `SettingsError` for both.
"""

from megatron_sov.model.config.data import DataConfig, PhaseConfig
from megatron_sov.model.config.encoders import AudioEncoderConfig, MediaConfig, VisionEncoderConfig
from megatron_sov.model.config.evaluate import (
    BackgroundEvalConfig, EvaluateConfig, ExtendConfig, ExtendStageConfig, GateConfig, Language, LmEvalConfig,
    NeedleConfig, NeedleKind, PartConfig)
from megatron_sov.model.config.gpu import GpuConfig
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.lora import LoraConfig
from megatron_sov.model.config.model import (
    IdBlock, LatentAttentionConfig, LinearAttentionConfig, ModelConfig, YarnConfig)
from megatron_sov.model.config.post_training import (
    DistillationConfig, PolicyConfig, PreferenceConfig, RolloutConfig)
from megatron_sov.model.config.run import (
    ObjectiveConfig, RunConfig, apply_settings, correct_setting, find_settings, from_dict, is_setting,
    layout_settings, parse_data_paths, setting_names, split_weight)
from megatron_sov.model.config.train import GroupConfig, GuardConfig, ObsConfig, OptimConfig, TrainConfig

__all__ = [
    "AudioEncoderConfig", "BackgroundEvalConfig", "DataConfig", "DistillationConfig", "EvaluateConfig",
    "ExtendConfig", "ExtendStageConfig", "GateConfig", "GpuConfig", "GroupConfig", "GuardConfig", "IdBlock",
    "Language", "LatentAttentionConfig", "LinearAttentionConfig", "LmEvalConfig", "LoraConfig", "MediaConfig",
    "ModelConfig", "NeedleConfig", "NeedleKind", "ObjectiveConfig", "ObsConfig", "OptimConfig",
    "ParallelConfig", "PartConfig", "PhaseConfig", "PolicyConfig", "PreferenceConfig", "RolloutConfig",
    "RunConfig", "TrainConfig", "VisionEncoderConfig", "YarnConfig", "apply_settings", "correct_setting",
    "find_settings", "from_dict", "is_setting", "layout_settings", "parse_data_paths", "setting_names",
    "split_weight"]

"""What a command's TARGET means: a checkpoint, a run's newest checkpoint,
or a Hugging Face folder.  Reads headers only."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sov import convert
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.parallel import launcher
from megatron_sov.engine.parallel.device import inference_precision, on_gpu
from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.families.adapters import identity
from megatron_sov.model.families.family import text_config
from megatron_sov.model.pretrained import CONFIG, weight_files
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, CHECKPOINTS_FOLDER, IMPORTED_RECIPE, check_model_folder, check_model_path,
    find_checkpoint, read_checkpoint_settings)
from megatron_sov.runs.launch_environment import is_first_rank, num_ranks

HF_SEQ_LEN = 4096
"""Context, in tokens, in which a Hugging Face model is judged unless told:
its own limit may be far longer."""


@dataclass(frozen=True)
class Target:
    """A model on disk."""

    path: Path
    """The checkpoint or Hugging Face folder."""
    is_hf: bool
    """Whether it is a Hugging Face folder."""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that holds tokenizer.json."""
        return self.path if self.is_hf else self.path / "tokenizer"

    @property
    def config(self) -> RunConfig | None:
        """The settings that a checkpoint was trained with;
        None where nothing tells them (imported models)."""
        config = None if self.is_hf else read_checkpoint_settings(self.path)
        return None if config is None or config.recipe == IMPORTED_RECIPE else config

    @property
    def model(self) -> ModelConfig:
        """The architecture; `UserError` for a Hugging Face folder of a family that we do not know."""
        return convert.open_weights(self.path).model if self.is_hf else read_checkpoint_settings(self.path).model

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self._hf_field("vocab_size") if self.is_hf else self.model.vocab_size

    @property
    def step(self) -> int | None:
        """Optimizer steps of a checkpoint; None where the folder does not tell."""
        return None if self.is_hf else int(read_manifest(self.path, CHECKPOINT_KIND).content["step"])

    @property
    def max_tokens(self) -> float:
        """Longest sequence that it can be given, in tokens; infinite where a Hugging Face folder of
        another family says none."""
        if not self.is_hf:
            return self.model.max_position_tokens
        try:
            return self._hf_field("max_position_embeddings")
        except UserError:
            return math.inf

    @property
    def trained_tokens(self) -> int:
        """Longest sequence that it was trained on, in tokens; of an imported model a sequence that it
        should be good for."""
        if self.config is None:
            limit = (self._hf_field("max_position_embeddings") if self.is_hf
                     else self.model.max_position_tokens)
            return min(HF_SEQ_LEN, limit)
        return self.config.data.max_seq_len()

    def _hf_field(self, name: str) -> int:
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return int(text_config(config)[name])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise UserError(f"{self.path / 'config.json'}: has no readable {name} ({e!r}); "
                            "restore it from its source") from None


def find_target(path: Path) -> Target:
    """Return the model that a path means.

    Raises:
        UserError: it is neither a checkpoint, a run with one, nor a Hugging Face folder.
    """
    check_model_path(path)
    if convert.is_hf_folder(path):
        return Target(path, True)
    check_model_folder(path)
    if (path / CONFIG).is_file() and not (path / CHECKPOINTS_FOLDER).is_dir():
        weight_files(path)  # which says what it lacks
    return Target(find_checkpoint(path), False)


@contextlib.contextmanager
def as_checkpoint(target: Target) -> Iterator[Path]:
    """Give the target as a checkpoint; a Hugging Face folder is converted into a temporary one."""
    if not target.is_hf:
        yield target.path
        return
    with tempfile.TemporaryDirectory(prefix="sov-target-") as folder:
        out = Path(folder) / "checkpoint"
        # In a process of its own, whose memory is free again before the model is loaded.
        code = launcher.apart(lambda: convert.from_hf(target.path, out))
        if code:
            raise SystemExit(code)
        yield out


def inference_config(checkpoint: Path, settings: Sequence[str], nproc: int | None, option: str = "--set"
                     ) -> RunConfig:
    """Return the settings to run a checkpoint with: its architecture, one process's layout and the precision
    of `inference_precision`; then `settings`, which `option` gives.

    Raises:
        UserError: a setting does not exist or asks for other adapters, or the layout does not fit the model
            and the number of processes.
    """
    made_with = read_checkpoint_settings(checkpoint)
    # One process: the layout of the training run does not matter here.
    train = dataclasses.replace(made_with.train, precision=inference_precision(), num_threads=0,
                                deterministic=False)
    config = apply_settings(dataclasses.replace(made_with, parallel=ParallelConfig(), train=train), settings,
                            option)
    if identity(config.lora, made_with.model) != identity(made_with.lora, made_with.model):
        # new ones would add nothing, and be taken for something
        asked = next(setting for setting in settings if setting.startswith("lora"))
        raise UserError(f"{option} {asked}: adapters are made by training, and {checkpoint} is run with "
                        "those that it has; leave it out")
    problems = config.model.problems() + config.parallel.problems(config.model, num_ranks(nproc))
    if problems:
        raise SettingsError(f"{checkpoint}: cannot be run like this", problems)
    return config


def report_precision(path: Path, engine: str, precision: str) -> None:
    """Print on standard error which engine runs a model, in which precision and on which device."""
    if is_first_rank():
        print(f"{path}: runs in {engine} with {precision} on {'a GPU' if on_gpu() else 'the CPU'}",
              file=sys.stderr, flush=True)

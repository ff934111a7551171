"""Find the model that a command's TARGET names: a checkpoint, the newest checkpoint of a run, or a Hugging
Face folder. Reads headers only."""

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
from megatron_sov.engine.parallel import launcher
from megatron_sov.engine.parallel.device import choose_inference_precision, on_gpu
from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.families.adapters import adapter_identity
from megatron_sov.model.families.family import extract_text_config
from megatron_sov.model.pretrained import CONFIG, find_weight_files
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, CHECKPOINTS_FOLDER, IMPORTED_RECIPE, apply_layout, check_model_folder, check_model_path,
    find_checkpoint, read_checkpoint_settings)
from megatron_sov.runs.launch_environment import is_first_rank

HF_SEQ_LEN = 4096
"""Default context, in tokens, for evaluating Hugging Face models; their own limit may be far longer."""


@dataclass(frozen=True)
class Target:
    """A model on disk."""

    path: Path
    """Checkpoint or Hugging Face folder."""
    is_hf: bool

    @property
    def tokenizer_folder(self) -> Path:
        """Folder with tokenizer.json."""
        return self.path if self.is_hf else self.path / "tokenizer"

    @property
    def config(self) -> RunConfig | None:
        """Training config; None for imported models."""
        config = None if self.is_hf else read_checkpoint_settings(self.path)
        return None if config is None or config.recipe == IMPORTED_RECIPE else config

    @property
    def model(self) -> ModelConfig:
        """Architecture; raises `UserError` for a Hugging Face folder with an unsupported family."""
        if self.is_hf:
            return convert.open_weights(self.path).model
        return read_checkpoint_settings(self.path).model

    @property
    def vocab_size(self) -> int:
        """Vocabulary size in token ids."""
        return self._hf_field("vocab_size") if self.is_hf else self.model.vocab_size

    @property
    def step(self) -> int | None:
        """Completed optimizer steps; None for a Hugging Face folder."""
        return None if self.is_hf else int(read_manifest(self.path, CHECKPOINT_KIND).content["step"])

    @property
    def max_tokens(self) -> float:
        """Longest sequence in tokens; infinite for Hugging Face folders without a limit."""
        if not self.is_hf:
            return self.model.max_position_tokens
        try:
            return self._hf_field("max_position_embeddings")
        except UserError:
            return math.inf

    @property
    def trained_tokens(self) -> int:
        """Sequence length of the training, in tokens; for imported models at most `HF_SEQ_LEN`."""
        if self.config is None:
            limit = (self._hf_field("max_position_embeddings") if self.is_hf
                     else self.model.max_position_tokens)
            return min(HF_SEQ_LEN, limit)
        return self.config.data.max_seq_len()

    def _hf_field(self, name: str) -> int:
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return int(extract_text_config(config)[name])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise UserError(f"{self.path / 'config.json'}: has no readable {name} ({e!r}); "
                            "restore it from its source") from None


def find_target(path: Path) -> Target:
    """Return the model at a path. Raises `UserError`: `path` is neither a checkpoint, a run with a
    checkpoint, nor a Hugging Face folder."""
    check_model_path(path)
    if convert.is_hf_folder(path):
        return Target(path, True)
    check_model_folder(path)
    if (path / CONFIG).is_file() and not (path / CHECKPOINTS_FOLDER).is_dir():
        find_weight_files(path)  # raises an error with the missing files
    return Target(find_checkpoint(path), False)


@contextlib.contextmanager
def open_as_checkpoint(target: Target) -> Iterator[Path]:
    """Yield the target's checkpoint; a Hugging Face folder is converted to a temporary checkpoint."""
    if not target.is_hf:
        yield target.path
        return
    with tempfile.TemporaryDirectory(prefix="sov-target-") as folder:
        out = Path(folder) / "checkpoint"
        # in a subprocess, so that the conversion's memory is freed before the model is loaded
        code = launcher.run_in_fork(lambda: convert.from_hf(target.path, out))
        if code:
            raise SystemExit(code)
        yield out


def build_inference_config(checkpoint: Path, settings: Sequence[str], nproc: int | None, option: str = "--set"
                           ) -> RunConfig:
    """Return the config for running a checkpoint: one process, the precision of `choose_inference_precision`,
    then `settings`.

    Args:
        checkpoint: checkpoint folder.
        settings: `key=value` changes.
        nproc: local processes.
        option: option that gives the settings, for messages.

    Raises:
        UserError: a setting does not exist or changes adapters, or the layout does not fit the model or the
            number of processes.
    """
    trained_config = read_checkpoint_settings(checkpoint)
    train = dataclasses.replace(trained_config.train, precision=choose_inference_precision(), num_threads=0,
                                deterministic=False)
    config = apply_layout(checkpoint, dataclasses.replace(trained_config, train=train), settings, nproc,
                          option)
    model = trained_config.model
    if adapter_identity(config.lora, model) != adapter_identity(trained_config.lora, model):
        # Untrained adapters would have no effect.
        setting = next(setting for setting in settings if setting.startswith("lora"))
        raise UserError(f"{option} {setting}: the adapters of {checkpoint} are fixed by its training; leave "
                        "it out")
    return config


def report_precision(path: Path, engine: str, precision: str) -> None:
    """Print engine, precision and device to standard error."""
    if is_first_rank():
        print(f"{path}: runs in {engine} with {precision} on {'a GPU' if on_gpu() else 'the CPU'}",
              file=sys.stderr, flush=True)

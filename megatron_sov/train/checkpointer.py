"""The checkpoints of a run: what one holds beside tensors, how it is taken, how a run gets all of it back,
and which one it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sov.base.artifacts import MANIFEST, format_json, manifest_sha256
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.folder import (
    CONFIG_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_fields, read_chat_template, read_special_token)
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.load import raise_on_all_ranks
from megatron_sov.checkpoint.safetensors_files import TensorFile
from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver, SavedCheckpoint
from megatron_sov.convert.companion_files import GENERATION_CONFIG, copy_carried_fields
from megatron_sov.convert.sources import open_shards
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.engine.parallel.world import ParallelWorld, run_on_main
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, RunConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import AUDIO, ENCODER, VISION, encoder_shapes
from megatron_sov.model.pretrained import CONFIG, format_names, read_json
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.train.data.token_shards import Source, tokenizer_folder
from megatron_sov.work.processes.stop_signals import StopFlag


@dataclass
class TrainState:
    """The loop's own counters; in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens consumed, padding not counted."""
    wall_s: float = 0.0
    """Seconds that the run has worked, over all its restarts."""
    trained_tokens: int = 0
    """Longest samples that the weights have learned from, in tokens: here, or in the runs before."""


ANY_STEP = 2**62


def find_sound_checkpoint(folder: RunFolder, world: ParallelWorld, last_step: int = ANY_STEP) -> Path | None:
    """Return the newest sound checkpoint of a run up to a step, or None; called by all processes together.

    A damaged one is set aside, loudly, for the one before.
    """
    # one process looks: on a network file system the others may still see an older listing
    while ((newest := run_on_main(
            world, lambda: checkpoints.latest_checkpoint_until(folder.checkpoints, last_step)))
           is not None):
        problem = load.find_damage(newest)
        if problem is None:
            return Path(newest)
        run_on_main(world, partial(_set_aside, folder, newest, problem))
    return None


def _set_aside(folder: RunFolder, damaged: Path, problem: str) -> None:
    aside = checkpoints.rename_damaged_checkpoint(damaged)
    text = (f"{problem}; {damaged.name} is renamed to {aside.name}, and the run goes on from the "
            "checkpoint before it")
    # a log of its own: when a run starts its records are not open yet
    events = EventLog(folder.path / EVENTS)
    warn(text, events.write, step=checkpoints.checkpoint_step(damaged))
    events.write("damaged_checkpoint", path=f"{folder.checkpoints.name}/{damaged.name}", reason=problem,
                 renamed_to=f"{folder.checkpoints.name}/{aside.name}")
    events.close()


def check_adapter_base(newest: Path, start_from: Path) -> None:
    """Raise `UserError` where an adapter's run would go on beside other frozen weights."""
    base = checkpoints.read_adapter_base(newest)
    if base is not None:
        start = (checkpoints.read_adapter_base(start_from)
                 or checkpoints.AdapterBase.from_checkpoint(start_from))
        if start.sha256 != base.sha256:
            raise UserError(f"--from {start_from}: is another model than {base.path}, beside which {newest} "
                            "was trained; resume with that, or start a new --run")


# Starting weights of encoders of pictures and sounds, from a Hugging Face folder that holds such an
# encoder, alone or inside a larger model.

PARTS = ("vision_config", "audio_config", "thinker_config")
"""Fields of a larger model's config.json under which an encoder's own fields stand."""
FIELDS = {
    "siglip": {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
               "num_attention_heads": "num_heads", "intermediate_size": "ffn_dim", "image_size": "image_size",
               "patch_size": "patch_size"},
    "qwen2_5_vl": {"hidden_size": "hidden_size", "depth": "num_layers", "num_heads": "num_heads",
                   "intermediate_size": "ffn_dim", "patch_size": "patch_size",
                   "spatial_merge_size": "merge_size", "temporal_patch_size": "temporal_patch_size",
                   "window_size": "window_size", "out_hidden_size": "out_hidden_size",
                   "fullatt_block_indexes": "full_attention_layers"},
    "whisper": {"d_model": "hidden_size", "encoder_layers": "num_layers",
                "encoder_attention_heads": "num_heads", "encoder_ffn_dim": "ffn_dim",
                "num_mel_bins": "num_mels"},
}
FIELDS["qwen2_audio"] = FIELDS["whisper"]
"""Kind -> field of transformers' config -> ours: what the shapes of weights do not tell, such as heads, has
to agree as well."""


@torch.no_grad()
def load_encoder_weights(model: LanguageModel, config: RunConfig) -> None:
    """Give encoders the weights of the folders that `media` names; called by all processes together.

    Raises:
        UserError: on every process; a folder holds no such encoder, or one of other sizes.
    """
    for prefix, folder in ((VISION, config.media.vision_from), (AUDIO, config.media.audio_from)):
        if not folder:
            continue
        files, found = open_encoder(Path(folder), prefix, config.model)
        blocks = [block for block in list_local_shards(model) if block.key in found]
        with raise_on_all_ranks():
            for block in blocks:
                name = found[block.key]
                block.data.copy_(files[name].read(name).reshape(block.data.shape))


def open_encoder(folder: Path, prefix: str,
               model: ModelConfig) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Return a folder's files by tensor, and for each of an encoder's tensors the name that it has there.

    Args:
        folder: with config.json and safetensors files.
        prefix: `VISION` or `AUDIO`.
        model: whose encoder it is.

    Raises:
        UserError: the folder holds no such encoder, several of them, or one of other sizes.
    """
    check_model_path(folder)
    setting = f"media.{prefix[:-1]}_from = {str(folder)!r}"
    encoder = model.vision if prefix == VISION else model.audio
    assert encoder is not None  # by `RunConfig.problems`
    files = open_shards(folder)
    wanted = {key: shape for key, shape in encoder_shapes(model).items() if key.startswith(prefix + ENCODER)}
    names = {key: key.removeprefix(prefix + ENCODER) for key in wanted}
    first = next(iter(names.values()))
    places = [name.removesuffix(first) for name in files if name == first or name.endswith("." + first)]
    whole = [place for place in places if all(place + name in files for name in names.values())]
    if len(whole) != 1:
        lacking = [name for name in names.values() if not places or places[0] + name not in files]
        raise UserError(f"{setting}: holds {len(whole)} encoders of kind {encoder.kind!r} with "
                        f"{encoder.num_layers} layers, must hold one"
                        f"{'' if whole else f' (it lacks {format_names(lacking)})'}; "
                        f"compare its {CONFIG} with "
                        f"model.{prefix[:-1]}")
    found = {key: whole[0] + name for key, name in names.items()}
    others = [f"{name} {list(files[name].entries[name].shape)} instead of {list(wanted[key])}"
              for key, name in found.items() if tuple(files[name].entries[name].shape) != wanted[key]]
    if others:
        raise UserError(f"{setting}: {format_names(others)}; set the sizes of model.{prefix[:-1]} as its "
                        f"{CONFIG} has them")
    _refuse_other_sizes(folder, setting, encoder)
    return files, found


def _refuse_other_sizes(folder: Path, setting: str,
                        encoder: VisionEncoderConfig | AudioEncoderConfig) -> None:
    config: dict[str, Any] = read_json(folder / CONFIG)
    while part := next((config[name] for name in PARTS if isinstance(config.get(name), dict)), None):
        config = part
    for theirs, ours in FIELDS[encoder.kind].items():
        value = getattr(encoder, ours)
        told = config.get(theirs, value)
        if told != (list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{setting}: its {CONFIG} has {theirs} = {told}, and the model's "
                            f"{ours} is {value}; make them agree")


STOP = "asked to stop"


def _read_companions(start: Path, data: Path) -> dict[str, bytes]:
    """Return the files beside tokenizer.json that a run takes over from the tokenizer folder of its start,
    with the special tokens and chat template of its data's; none if the data are of another tokenizer."""
    if find_difference(start, data) is not None:
        return {}
    files = {file.name: file.read_bytes() for file in sorted(start.iterdir())
             if file.is_file() and file.name not in (TOKENIZER_JSON, MANIFEST)}
    if read_chat_fields(data) == read_chat_fields(start):
        return files
    config, defaults = (read_json(start / name) if name in files else {} for name in (
        CONFIG_JSON, GENERATION_CONFIG))
    for name in ("bos_token", "eos_token"):
        text = read_special_token(data, name)
        if text and text != read_special_token(start, name):
            config[name] = text
            defaults.pop(f"{name}_id", None)
    template = read_chat_template(data)
    if template and template != read_chat_template(start):
        config["chat_template"] = template
        files.pop(TEMPLATE_FILE, None)
    changed = {CONFIG_JSON: config, **({GENERATION_CONFIG: defaults} if GENERATION_CONFIG in files else {})}
    return files | {name: format_json(content).encode() for name, content in changed.items()}


class Stateful(Protocol):
    """Something with a memory that a resumed run must have."""

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


class Checkpointer:
    """Takes checkpoints of one run and loads them; every call is made by all processes together."""

    def __init__(self, config: RunConfig, folder: RunFolder, sources: list[Source], model: LanguageModel,
                 optimizer: Optimizer, batches: Stateful, parts: Mapping[str, Stateful],
                 on_saved: Callable[[SavedCheckpoint], None]) -> None:
        """Begin without a checkpoint.

        Args:
            config: the run's settings.
            folder: the run's folder.
            sources: what is read; the hashes of their manifests are kept.
            model: its weights.
            optimizer: its moments and master weights.
            batches: the data order.
            parts: what else has a memory, by its name in the checkpoint.
            on_saved: called when a checkpoint is complete.
        """
        self._config, self._folder, self._model, self._optimizer = config, folder, model, optimizer
        self._batches, self._parts = batches, parts
        self._data = {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}
        self._tokenizer = tokenizer_folder(sources)
        self._beside: dict[str, bytes] = {}
        self._carried: dict[str, Any] = {}
        self._saver = CheckpointSaver(on_saved, config.train.save_timeout_s)

    def save(self, done: TrainState) -> None:
        """Take a checkpoint, which is written in the background; waits for the one before.  Where
        `train.async_save` is off, `finish` must be called before the next step.

        Args:
            done: the loop's counters.
        """
        settings, folder = self._config.train, self._folder.checkpoints
        state = {"step": done.step, "tokens": done.tokens, "wall_s": done.wall_s,
                 "trained_tokens": done.trained_tokens, "num_updates": self._optimizer.num_updates,
                 "order": self._batches.state(), "data": self._data,
                 **{name: part.state() for name, part in self._parts.items()}}
        self._saver.begin(self._folder.checkpoint(done.step), self._model, self._optimizer,
                          CheckpointMetadata(state, self._config.to_dict(), self._tokenizer, self._beside,
                                     self._carried),
                          # behind the rename: a crash while the new one is written must leave the one before
                          on_complete=lambda: checkpoints.prune_checkpoints(folder, settings.keep_checkpoints,
                                                         settings.keep_every_steps),
                          wait=not settings.async_save)

    def sync(self, stop: StopFlag) -> bool:
        """Do the all-reduce at the end of a step: who was asked to stop,
        and how far the outstanding checkpoint is.

        Where all processes have written their part of the checkpoint it is completed,
        and appears under its name.

        Returns:
            Whether any process was asked to stop.

        Raises:
            UserError: the outstanding checkpoint failed.
        """
        # one message for both: an all-reduce costs its latency, however few its numbers
        sums = sum_dict({STOP: float(stop.reason is not None), **self._saver.progress()},
                        collectives.all_reduce_world)
        self._saver.advance(sums)
        return sums[STOP] > 0

    def advance(self) -> None:
        """Complete the outstanding checkpoint where all processes have written their part, as `sync` does,
        between steps that take long.

        Raises:
            UserError: it failed.
        """
        self._saver.advance(sum_dict(self._saver.progress(), collectives.all_reduce_world))

    def finish(self) -> None:
        """Wait for the outstanding checkpoint, if there is one.

        Raises:
            UserError: it failed.
        """
        self._saver.finish()

    def finish_alone(self) -> None:
        """Let the outstanding checkpoint become complete where an error has ended the steps behind it; no
        collective."""
        self._saver.finish_alone()

    def load_weights(self, path: Path) -> None:
        load.check_weights(path)
        self._load_model(path, new_encoders=True)

    def load(self, path: Path, *, load_data_order: bool = True) -> TrainState:
        """Bring back what a (sound) checkpoint of this run holds, and return the loop's
        counters as they were.

        Args:
            path: the checkpoint.
            load_data_order: also the place in the data; else they go on where they are.

        Raises:
            UserError: a source is not what the run has read so far.
        """
        state = load.read_state(path)
        for name, read_so_far in state["data"].items():
            # before a weight is touched; of a source that is no longer read no cursor is used
            if self._data.get(name, read_so_far) != read_so_far:
                raise UserError(f"source {name!r}: its data was packed anew since {path} was written, "
                                "and the cursor into it means nothing now; resume with the data of before, "
                                "or start a new --run --from that checkpoint")
        self._load_model(path)
        load.load_optimizer(path, self._optimizer, state["num_updates"])
        for name, part in self._parts.items():
            if name in state:
                part.restore(state[name])
        if load_data_order:
            self._batches.restore(state["order"])
        return TrainState(state["step"], state["tokens"], state["wall_s"],
                          checkpoints.read_trained_tokens(path))

    def _load_model(self, path: Path, *, new_encoders: bool = False) -> None:
        # read now: a checkpoint that the run goes on from may be pruned before the next one is written
        self._carried = copy_carried_fields(path)
        if self._tokenizer is not None:
            self._beside = _read_companions(path / "tokenizer", self._tokenizer)
        load.load_model(path, self._model, new_encoders=new_encoders)
        # else the next update would write the optimizer's older copies over what was loaded
        self._optimizer.sync_master_weights()

"""Save and load a run's checkpoints, and find a sound checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.base.artifacts import MANIFEST, format_json, manifest_sha256
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.folder import (
    CONFIG_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_fields, read_chat_template, read_special_token)
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver, SavedCheckpoint
from megatron_sov.convert.companion_files import GENERATION_CONFIG, copy_carried_fields
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.engine.parallel.world import ParallelWorld, run_on_main
from megatron_sov.model.config import RunConfig
from megatron_sov.model.pretrained import read_json
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.train.data.sources import Source, tokenizer_folder
from megatron_sov.work.processes.stop_signals import StopFlag

MAX_STEP = 2**62
"""A step after every run's end."""
STOP = "stop requests"
"""Name of the sum over ranks in `Checkpointer.sync`."""


@dataclass
class TrainState:
    """Training-loop counters, stored in every checkpoint."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Learned tokens, without padding."""
    wall_s: float = 0.0
    """Working time in seconds, summed over restarts."""
    trained_tokens: int = 0
    """Longest sample that trained the weights, in tokens, including earlier runs."""


class Stateful(Protocol):
    """A part of the run whose state checkpoints store."""

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result that `state` returned."""


class Checkpointer:
    """Saves and loads a run's checkpoints; every method but `finish_alone` is collective."""

    def __init__(self, config: RunConfig, folder: RunFolder, sources: list[Source], model: LanguageModel,
                 optimizer: Optimizer, batches: Stateful, parts: Mapping[str, Stateful],
                 on_saved: Callable[[SavedCheckpoint], None]) -> None:
        """Start without a checkpoint; `on_saved` will be called with each complete checkpoint.

        Checkpoints store `model`, `optimizer`, the data order `batches`, the manifest hashes of `sources`,
        and `parts` (name -> further part).
        """
        self._config, self._folder, self._model, self._optimizer = config, folder, model, optimizer
        self._batches, self._parts = batches, parts
        self._data = {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}
        self._tokenizer = tokenizer_folder(sources)
        self._companions: dict[str, bytes] = {}
        self._carried: dict[str, Any] = {}
        self._saver = CheckpointSaver(on_saved, config.train.save_timeout_s)

    def save(self, counters: TrainState) -> None:
        """Start writing a checkpoint in the background, after the outstanding checkpoint is complete.

        If `train.async_save` is off, `finish` must be called before the next step.
        """
        settings, folder = self._config.train, self._folder.checkpoints
        state = {"step": counters.step, "tokens": counters.tokens, "wall_s": counters.wall_s,
                 "trained_tokens": counters.trained_tokens, "num_updates": self._optimizer.num_updates,
                 "order": self._batches.state(), "data": self._data,
                 **{name: part.state() for name, part in self._parts.items()}}
        metadata = CheckpointMetadata(state, self._config.to_dict(), self._tokenizer, self._companions,
                                      self._carried)
        # pruned after the rename: a crash during the write must leave the previous checkpoint
        prune = partial(checkpoints.prune_checkpoints, folder, settings.keep_checkpoints,
                        settings.keep_every_steps)
        self._saver.begin(self._folder.checkpoint(counters.step), self._model, self._optimizer, metadata,
                          on_complete=prune, wait=not settings.async_save)

    def sync(self, stop: StopFlag) -> bool:
        """Share stop requests and progress of the outstanding checkpoint by an all-reduce after a step.

        The checkpoint gets its final name after every rank has written its part. Returns whether a rank got
        a stop request. Raises `UserError` if the checkpoint failed.
        """
        # a single message: the cost of a small all-reduce is its latency
        sums = sum_dict({STOP: float(stop.reason is not None), **self._saver.progress()},
                        collectives.all_reduce_world)
        self._saver.advance(sums)
        return sums[STOP] > 0

    def advance(self) -> None:
        """Complete the outstanding checkpoint if every rank has written its part; for use during long steps.

        Raises `UserError` if the checkpoint failed.
        """
        self._saver.advance(sum_dict(self._saver.progress(), collectives.all_reduce_world))

    def finish(self) -> None:
        """Wait for the outstanding checkpoint. Raises `UserError` if it failed."""
        self._saver.finish()

    def finish_alone(self) -> None:
        """Complete the outstanding checkpoint after an error, without a collective."""
        self._saver.finish_alone()

    def load_weights(self, path: Path) -> None:
        load.check_weights(path)
        self._load_model(path, new_encoders=True)

    def load(self, path: Path, *, load_data_order: bool = True) -> TrainState:
        """Restore this run's sound checkpoint `path` and return the counters.

        `load_data_order=False`, or a checkpoint from another program, leaves the data order at its position.
        Raises `UserError` if the data of a source changed after the checkpoint was written.
        """
        state = load.read_state(path)
        for name, manifest_hash in state["data"].items():
            # before a weight changes; cursors of removed sources are not used
            if self._data.get(name, manifest_hash) != manifest_hash:
                raise UserError(f"source {name!r}: its data was packed again after {path} was written, so "
                                "the checkpoint's position in it is invalid; restore the previous data, or "
                                "start a new --run --from that checkpoint")
        self._load_model(path)
        load.load_optimizer(path, self._optimizer, state["num_updates"])
        for name, part in self._parts.items():
            if name in state:
                part.restore(state[name])
        if load_data_order and "order" in state:
            self._batches.restore(state["order"])
        return TrainState(state["step"], state["tokens"], state["wall_s"],
                          checkpoints.read_trained_tokens(path))

    def _load_model(self, path: Path, *, new_encoders: bool = False) -> None:
        # read now: the checkpoint may be pruned before the next save
        self._carried = copy_carried_fields(path)
        if self._tokenizer is not None:
            self._companions = _read_companions(path / "tokenizer", self._tokenizer)
        load.load_model(path, self._model, new_encoders=new_encoders)
        # the next update would otherwise overwrite the loaded weights with older master weights
        self._optimizer.sync_master_weights()


def find_sound_checkpoint(folder: RunFolder, world: ParallelWorld, last_step: int = MAX_STEP) -> Path | None:
    """Return the newest sound checkpoint of a run up to `last_step`, or None. Collective.

    Damaged checkpoints are renamed, with a warning and an event.
    """
    # rank 0 lists the folder: on a network file system, ranks may see different listings
    find_newest = partial(checkpoints.latest_checkpoint_until, folder.checkpoints, last_step)
    while (newest := run_on_main(world, find_newest)) is not None:
        problem = load.find_damage(newest)
        if problem is None:
            return Path(newest)
        run_on_main(world, partial(_rename_damaged, folder, newest, problem))
    return None


def _rename_damaged(folder: RunFolder, damaged: Path, problem: str) -> None:
    renamed = checkpoints.rename_damaged_checkpoint(damaged)
    text = (f"{problem}; {damaged.name} is renamed to {renamed.name}, and the run goes on from the "
            "checkpoint before it")
    # a separate log: the records of a starting run are not open yet
    events = EventLog(folder.path / EVENTS)
    warn(text, events.write, step=checkpoints.checkpoint_step(damaged))
    events.write("damaged_checkpoint", path=f"{folder.checkpoints.name}/{damaged.name}", reason=problem,
                 renamed_to=f"{folder.checkpoints.name}/{renamed.name}")
    events.close()


def check_adapter_base(newest: Path, start_from: Path) -> None:
    """Raise `UserError` if an adapter's run would continue with different frozen weights."""
    base = checkpoints.read_adapter_base(newest)
    if base is not None:
        start = (checkpoints.read_adapter_base(start_from)
                 or checkpoints.AdapterBase.from_checkpoint(start_from))
        if start.sha256 != base.sha256:
            raise UserError(f"--from {start_from}: is another model than {base.path}, the base model of "
                            f"{newest}; resume with that, or start a new --run")


def _read_companions(start: Path, data: Path) -> dict[str, bytes]:
    """Return file name -> content for checkpoints to store in addition to `tokenizer.json`.

    Files come from the tokenizer folder `start` of the start weights, with special tokens and chat template
    from the tokenizer folder `data`. Returns {} if their vocabularies differ.
    """
    if find_difference(start, data) is not None:
        return {}
    files = {file.name: file.read_bytes() for file in sorted(start.iterdir())
             if file.is_file() and file.name not in (TOKENIZER_JSON, MANIFEST)}
    if read_chat_fields(data) == read_chat_fields(start):
        return files
    config = read_json(start / CONFIG_JSON) if CONFIG_JSON in files else {}
    defaults = read_json(start / GENERATION_CONFIG) if GENERATION_CONFIG in files else {}
    for name in ("bos_token", "eos_token"):
        text = read_special_token(data, name)
        if text and text != read_special_token(start, name):
            config[name] = text
            defaults.pop(f"{name}_id", None)
    template = read_chat_template(data)
    if template and template != read_chat_template(start):
        config["chat_template"] = template
        files.pop(TEMPLATE_FILE, None)
    changed = {CONFIG_JSON: config}
    if GENERATION_CONFIG in files:
        changed[GENERATION_CONFIG] = defaults
    return files | {name: format_json(content).encode() for name, content in changed.items()}

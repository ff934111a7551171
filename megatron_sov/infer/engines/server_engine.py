"""Servers of vLLM as an `Engine`, started here or at addresses: one fleet for all that is asked."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, apply_changes
from megatron_sov.convert.sources import HfWeights
from megatron_sov.infer.engines.fleet import AddressKeeper, Fleet, Keeper
from megatron_sov.infer.engines.server_process import PROGRAMS, EngineServers, OwnServer, refuse_no_engine
from megatron_sov.infer.request import (
    Bounds, Generated, HeldWeights, NamedTensors, Sampling, StopRule, Tokens, Written, refuse_drafts,
    refuse_rules)
from megatron_sov.train.data.requirements import shape_of
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest

SHARD_BYTES = 1 << 30
"""Of a file of weights: what is held beside the model at a time."""
GROUP, GROUPED_TOKENS = 8, 256
"""Answers of a request at most, and their tokens at most: a request costs as much as some tokens of a small
model, while of long answers each is to make room as soon as it has ended."""
_LOOK_S = 0.2


@dataclass(frozen=True)
class ServerPlaces:
    """Where the servers of a command are."""

    logs: Path
    """Folder of the logs of those that are started here."""
    urls: tuple[str, ...] = ()
    """Of servers that somebody else has started; none: they are started here."""
    python: Path | None = None
    """The interpreter that has the engine; None: as the environment says, or this one."""
    command: tuple[str, ...] = ()
    """That starts one, in the place of the engine's own."""


def server_settings(engine: str, settings: Sequence[str], option: str) -> EngineServers:
    """Return how servers of an engine are started.

    Raises:
        UserError: a setting does not exist, the engine does not know it, or they do not go together.
    """
    found = apply_changes(EngineServers(), list(settings), option)
    if problems := found.problems() + found.problems_of(engine):
        raise SettingsError(option, problems)
    return found


@contextlib.contextmanager
def open_fleet(name: str, folder: Path, vocab_size: int, longest: int, settings: EngineServers,
               places: ServerPlaces, *, with_routes: bool = False, over: threading.Event | None = None
               ) -> Iterator[Fleet]:
    """Give servers at work, which end with the block.

    Args:
        name: of the engine.
        folder: of the model, as Hugging Face has it.
        vocab_size: of the model.
        longest: tokens of the longest sequence, prompt and answer.
        settings: how they are started.
        places: where they are.
        with_routes: whether routes will be asked for.
        over: ends them when it is set, also while they are being started.

    Raises:
        UserError: none of them can be started.
    """
    if not places.command:
        refuse_no_engine(name, places.urls, places.python)
    keepers: list[Keeper] = [
        AddressKeeper(PROGRAMS[name].connect(url, settings), settings.start_s)
        for url in places.urls]
    if not keepers:
        keepers = [OwnServer(name, number, folder, longest, settings, places.logs, with_routes=with_routes,
                             python=places.python, command=places.command)
                   for number in range(settings.servers)]
    with Fleet(keepers, vocab_size, settings.room, settings.restarts, over=over) as fleet:
        yield fleet


class WeightFiles:
    """Weights that servers read, in a folder of shared memory."""

    def __init__(self, folder: Path) -> None:
        """Begin with nothing: what was left there by a killed command goes.

        Args:
            folder: that all servers see, and nobody else uses.
        """
        self._folder = folder
        self._numbers = itertools.count()
        self.remove()

    def write(self, weights: NamedTensors) -> list[str]:
        """Return the files of weights, beside those that were written before."""
        with translate_disk_errors(self._folder):
            own = self._folder / str(next(self._numbers))
            own.mkdir(parents=True)
            files: list[str] = []
            held: dict[str, torch.Tensor] = {}
            size_bytes = 0
            for name, tensor in weights:
                # a copy: experts of a layer may be views of one block, which the format refuses
                held[name] = tensor.detach().to("cpu", copy=True).contiguous()
                size_bytes += held[name].nbytes
                if size_bytes >= SHARD_BYTES:
                    files.append(_save(held, own, len(files)))
                    held, size_bytes = {}, 0
            return [*files, *([_save(held, own, len(files))] if held else [])]

    def forget_others(self, files: Sequence[str]) -> None:
        """Remove all weights but these."""
        kept = {Path(file).parent.name for file in files}
        for own in self._folder.iterdir() if self._folder.is_dir() else ():
            if own.name not in kept:
                shutil.rmtree(own, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _save(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> str:
    file = folder / f"{number:05}.safetensors"
    save_file(tensors, file)
    return str(file)


class ServerEngine:
    """A fleet as an engine."""

    def __init__(self, name: str, fleet: Fleet, folder: Path, weights: Path, room: int, *,
                 with_routes: bool = False) -> None:
        """Take a fleet.

        Args:
            name: of the engine.
            fleet: at work.
            room: responses that its servers write at a time.
            folder: of the model that it has begun with.
            weights: folder of new ones.
            with_routes: whether it tells routes.

        Raises:
            UserError: routes are asked for, and the model has none.
        """
        self._engine, self.fleet, self.room = name, fleet, room
        self._shape = shape_of(HfWeights(folder).model) if with_routes else None
        self._held = HeldWeights(name)
        self._files = WeightFiles(weights)
        self._numbers = itertools.count()
        self._name = uuid.uuid4().hex[:12]

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None, bounds: Bounds | None = None) -> Generated:
        """Continue prompts, see `Engine`; what servers draw depends on what they write beside it, so samples
        are new ones each time.

        Args:
            prompts: token ids.
            sampling: how tokens are chosen.
            stop: what ends a continuation; servers know tokens alone, and strings are looked for afterwards.
            streams: are of no use here.
            bounds: the longest continuation of each prompt, and what ends all of them.

        Raises:
            UserError: a server refuses, or all have died too often.
        """
        refuse_drafts(self._engine, sampling)
        refuse_rules(self._engine, sampling)
        if sampling.with_routes and self._shape is None:
            raise ValueError(f"the engine {self._engine} was started without routes, and they are asked for")
        sampling.check()
        stop, version = stop or StopRule(), self._held.version
        limits = [sampling.max_new_tokens] * len(prompts) if bounds is None else list(bounds.limits)
        asked = self.requests(prompts, [replace(sampling, max_new_tokens=n) for n in limits], stop.ids)
        answers = self._answers(asked, bounds)
        written = [_cut(answer, stop) for answer in answers]
        routes = None
        if sampling.with_routes:
            routes = [self.routes_of(answer, len(prompt) + len(tokens) - 1)
                      for answer, prompt, (tokens, _) in zip(answers, prompts, written, strict=True)]
        return Generated.of(written, sampling, stop, version, routes=routes)

    def requests(self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], end_ids: tuple[int, ...],
                 *, are_joined: bool = False) -> list[TokenRequest]:
        """Return requests of their own names, whose answers together are those of the prompts in order:
        neighbours that are alike go into one.

        Args:
            prompts: token ids, one for each answer.
            samplings: how each is chosen.
            end_ids: tokens that end an answer.
            are_joined: whether other prompts go into one too, see `TokenRequest.others`: one for each server,
                unless they are long.
        """
        found: list[TokenRequest] = []
        for ids, sampling in zip(prompts, samplings, strict=True):
            request = TokenRequest("", [int(token) for token in ids], sampling.max_new_tokens,
                                   sampling.temperature, sampling.top_k, sampling.top_p, end_ids,
                                   sampling.with_routes)
            # vLLM refuses greedy ones, which would all be the same
            most = min(GROUP, self.fleet.requests) if request.temperature else 1
            if (found and request.max_new_tokens <= GROUPED_TOKENS and found[-1].count < most
                    and replace(found[-1], name="", count=1) == request):
                found[-1] = replace(found[-1], count=found[-1].count + 1)
            else:
                found.append(replace(request, name=f"{self._name}-{next(self._numbers)}"))
        if not are_joined:
            return found
        most = min(-(-len(prompts) // self.fleet.num_servers), self.fleet.requests)
        joined: list[TokenRequest] = []
        for request in found:
            if (joined and request.max_new_tokens <= GROUPED_TOKENS and not request.with_routes
                    and joined[-1].num_answers + request.count <= most
                    and replace(joined[-1], name="", ids=(), others=()) == replace(request, name="", ids=())):
                joined[-1] = replace(joined[-1], others=(*joined[-1].others, request.ids))
            else:
                joined.append(request)
        return joined

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Have the servers read other weights out of shared memory, see `Engine`."""
        if weights is None:
            raise ValueError(f"the engine {self._engine} has a model of its own: an update needs its weights")
        with self._held.replaced(version, weights):
            files = self._files.write(weights)
            self.fleet.update(files, version)
            # a server that is started again reads these, and no earlier ones
            self._files.forget_others(files)

    def routes_of(self, answer: TokenAnswer, num_tokens: int) -> np.ndarray:
        """Return the routes of the first tokens of a prompt and its answer.

        Engines tell [prompt + continuation - 1, layers, top_k], with a layer of zeros for each leading dense
        one.

        Raises:
            UserError: it tells others than the model can have.
        """
        assert self._shape is not None, "routes were not asked for"
        # what was ended before it began was not read at all
        if answer.reason == ABORTED and answer.routes is None:
            return self._shape.absent(num_tokens)
        return checked_routes(answer.routes, num_tokens, self._shape)

    def close(self) -> None:
        self._files.remove()

    def _answers(self, asked: Sequence[TokenRequest], bounds: Bounds | None) -> list[TokenAnswer]:
        futures: list[Future[list[TokenAnswer]]] = [self.fleet.submit(request) for request in asked]
        if bounds is not None:
            left, is_ended = set(futures), False
            while left:
                left = wait(left, _LOOK_S).not_done
                if left and not is_ended and bounds.should_stop():
                    is_ended = True
                    self.fleet.abort([request.name for request, future in zip(asked, futures, strict=True)
                                      if future in left])
        return [answer for future in futures for answer in future.result()]


def _cut(answer: TokenAnswer, stop: StopRule) -> Written:
    """Return an answer up to what ends it, which a server may have read past."""
    tokens = stop.cut(answer.tokens)
    return tokens, answer.logprobs[:len(tokens)]


def checked_routes(told: np.ndarray | None, num_tokens: int, shape: RouteShape) -> np.ndarray:
    """Return the routes that a server told of the first tokens; raises as `ServerEngine.routes_of`."""
    why = "nothing"
    if told is not None:
        why = f"shape {list(told.shape)}"
        if told.ndim == 2 and told.shape[1] % shape.top_k == 0:
            told = told.reshape(len(told), -1, shape.top_k)
        # the leading dense layers have no experts: the last `layers` rows are those that route
        if told.ndim == 3 and len(told) >= num_tokens and told.shape[1] >= shape.layers:
            told = told[:num_tokens, told.shape[1] - shape.layers:]
            # before they are narrowed: a number that does not fit would become another one
            if (told < 0).any() or (told >= shape.num_experts).any():
                why = f"experts from {told.min()} to {told.max()}, of {shape.num_experts}"
            elif not (why := shape.problem(told.astype(shape.dtype))):
                return told.astype(shape.dtype)
    raise UserError(f"the engine was to tell the routes of {num_tokens} tokens, {shape.layers} layers and "
                    f"{shape.top_k} experts each, and tells {why}; it records none where experts run in a "
                    "kernel that chooses for itself (vLLM: its moe backends of FlashInfer): choose another, "
                    "or set policy.router_replay=false")


@contextlib.contextmanager
def serving_engine(name: str, folder: Path, vocab_size: int, longest: int, settings: EngineServers,
                   places: ServerPlaces | None = None, *, with_routes: bool = False,
                   over: threading.Event | None = None) -> Iterator[ServerEngine]:
    """Give an engine of servers, which end with the block; arguments as of `open_fleet`, logs in a folder
    that goes unless they are placed."""
    with contextlib.ExitStack() as stack:
        if places is None:
            logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="sov-engines-"))
            places = ServerPlaces(Path(logs))
        fleet = stack.enter_context(open_fleet(name, folder, vocab_size, longest, settings, places,
                                               with_routes=with_routes, over=over))
        room = settings.room * (len(places.urls) or settings.servers)
        # by the run, so that it finds what was left when it was killed
        own = hashlib.sha256(str(places.logs.absolute()).encode()).hexdigest()[:16]
        engine = ServerEngine(name, fleet, folder, settings.weights / f"sov-weights-{own}", room,
                              with_routes=with_routes)
        stack.callback(engine.close)
        yield engine

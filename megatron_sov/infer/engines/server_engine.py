"""Run vLLM servers, started here or reached by address, as an inference engine."""

import contextlib
import hashlib
import itertools
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, apply_changes
from megatron_sov.convert.sources import HfWeights
from megatron_sov.infer.engines.fleet import AddressKeeper, Fleet, ServerKeeper
from megatron_sov.infer.engines.server_process import EngineServers, ServerProcess, check_vllm_program
from megatron_sov.infer.request import (
    VLLM, GenerationBounds, GenerationResult, NamedTensors, Sampling, ScoredTokens, ServerLocations, StopRule,
    Tokens, WeightVersion, check_no_rules)
from megatron_sov.train.data.requirements import build_route_shape
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest

SHARD_BYTES = 1 << 30
"""Bytes per weight file; bounds the host memory for an update."""
GROUP = 8
"""Maximum number of answers to a prompt in a request; fewer requests cost less if answers are short."""
GROUPED_TOKENS = 256
"""Maximum length of an answer that shares a request. A longer one has its own request, so that a server can
begin another request as soon as the answer is complete."""
_POLL_S = 0.2
"""Interval between calls of `GenerationBounds.should_stop`."""


class ServerEngine:
    """Inference engine on a `Fleet`.

    Args:
        fleet: running servers.
        folder: Hugging Face folder of the loaded model.
        weights: folder for weight files.
        room: limit of answers that the servers generate at a time.
        with_routes: the servers return routes.

    Raises:
        UserError: `with_routes` for a model without experts.
    """

    def __init__(self, fleet: Fleet, folder: Path, weights: Path, room: int, *, with_routes: bool = False
                 ) -> None:
        self.fleet, self.room = fleet, room
        self._route_shape = build_route_shape(HfWeights(folder).model) if with_routes else None
        self._weight_version = WeightVersion(VLLM)
        self._files = WeightFiles(weights)
        self._numbers = itertools.count()
        self._request_prefix = uuid.uuid4().hex[:12]

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None,
                 bounds: GenerationBounds | None = None) -> GenerationResult:
        """Continue prompts, see `Engine.generate`; samples depend on concurrent requests and are not
        reproducible.

        Args:
            prompts: token ids.
            sampling: settings for choosing tokens.
            stop: ends continuations; servers handle stop tokens, stop strings are cut afterwards.
            streams: ignored.
            bounds: per-prompt limits and an external stop.

        Raises:
            UserError: a server refuses a request, or servers died too often.
        """
        check_no_rules(VLLM, sampling)
        if sampling.with_routes and self._route_shape is None:
            raise ValueError("the vLLM servers were started without routes, but they are requested")
        sampling.check()
        stop, version = stop or StopRule(), self._weight_version.version
        limits = [sampling.max_new_tokens] * len(prompts) if bounds is None else list(bounds.limits)
        requests = self.requests(prompts, [replace(sampling, max_new_tokens=n) for n in limits], stop.ids)
        answers = self._wait_for_answers(requests, bounds)
        written = [_truncate_answer(answer, stop) for answer in answers]
        routes = None
        if sampling.with_routes:
            routes = [self.extract_routes(answer, len(prompt) + len(tokens) - 1)
                      for answer, prompt, (tokens, _) in zip(answers, prompts, written, strict=True)]
        return GenerationResult.of(written, sampling, stop, version, routes=routes)

    def requests(self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], end_ids: tuple[int, ...],
                 *, are_joined: bool = False) -> list[TokenRequest]:
        """Build uniquely named requests; the concatenated answers follow the order of the prompts.

        Equal consecutive prompts are grouped into one request.

        Args:
            prompts: token ids, one entry per answer.
            samplings: sampling settings of each answer.
            end_ids: stop tokens.
            are_joined: also join requests of different prompts (`TokenRequest.others`), to one request per
                server; requests for long answers stay separate.
        """
        requests: list[TokenRequest] = []
        for ids, sampling in zip(prompts, samplings, strict=True):
            request = TokenRequest("", [int(token) for token in ids], max_new_tokens=sampling.max_new_tokens,
                                   temperature=sampling.temperature, top_k=sampling.top_k,
                                   top_p=sampling.top_p, stop_ids=end_ids, with_routes=sampling.with_routes)
            # vLLM rejects several greedy answers to a prompt, because the answers would be equal
            max_count = min(GROUP, self.fleet.requests) if request.temperature else 1
            is_short = request.max_new_tokens <= GROUPED_TOKENS
            if (is_short and requests and requests[-1].count < max_count
                    # equal in all fields but name and count
                    and replace(requests[-1], name="", count=1) == request):
                requests[-1] = replace(requests[-1], count=requests[-1].count + 1)
            else:
                requests.append(replace(request, name=f"{self._request_prefix}-{next(self._numbers)}"))
        if not are_joined:
            return requests
        # an equal share per server, rounded up, within the number of answers that a server accepts
        answers_per_server = -(-len(prompts) // self.fleet.num_servers)
        return _join_prompts(requests, min(answers_per_server, self.fleet.requests))

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Write weight files and let the servers read them, see `Engine.update`."""
        if weights is None:
            raise ValueError("vLLM has its own model: an update needs weights")
        with self._weight_version.replace_weights(version, weights):
            files = self._files.write(weights)
            self.fleet.update(files, version)
            # a restarted server reads the newest files, so earlier files can go
            self._files.delete_earlier_files(files)

    def extract_routes(self, answer: TokenAnswer, num_tokens: int) -> np.ndarray:
        """Return the expert routes for the first `num_tokens` tokens of prompt and answer.

        Engines return [tokens - 1, layers, top_k], with zeros for leading dense layers. Raises `UserError`:
        the routes do not match the model.
        """
        assert self._route_shape is not None, "routes were not asked for"
        # aborted before a server began the request, so it has no routes
        if answer.reason == ABORTED and answer.routes is None:
            return self._route_shape.build_unrecorded(num_tokens)
        return check_routes(answer.routes, num_tokens, self._route_shape)

    def close(self) -> None:
        self._files.delete_files()

    def _wait_for_answers(self, requests: Sequence[TokenRequest],
                          bounds: GenerationBounds | None) -> list[TokenAnswer]:
        futures: list[Future[list[TokenAnswer]]] = [self.fleet.submit(request) for request in requests]
        if bounds is not None:
            pending, is_aborted = set(futures), False
            while pending:
                pending = wait(pending, _POLL_S).not_done
                if pending and not is_aborted and bounds.should_stop():
                    is_aborted = True
                    self.fleet.abort([request.name for request, future in zip(requests, futures, strict=True)
                                      if future in pending])
        return [answer for future in futures for answer in future.result()]


def parse_server_settings(settings: Sequence[str], option: str) -> EngineServers:
    """Parse `key=value` settings for engine servers. Raises `UserError`: a setting does not exist, or
    contradicts another setting."""
    servers = apply_changes(EngineServers(), list(settings), option)
    if problems := servers.problems():
        raise SettingsError(option, problems)
    return servers


@contextlib.contextmanager
def open_fleet(folder: Path, vocab_size: int, max_tokens: int, settings: EngineServers,
               locations: ServerLocations, *, with_routes: bool = False,
               stop_event: threading.Event | None = None) -> Iterator[Fleet]:
    """Yield running servers as a `Fleet`; the servers stop after the block.

    Args:
        folder: Hugging Face folder of the model.
        vocab_size: vocabulary size of the model.
        max_tokens: tokens of the longest sequence, prompt and answer.
        settings: settings of the servers.
        locations: addresses or programs of the servers, and the folder of their logs.
        with_routes: start servers that return routes.
        stop_event: event that stops the servers, also during their start.

    Raises:
        UserError: no server can be started.
    """
    if not locations.command:
        check_vllm_program(locations.urls, locations.python)
    keepers: list[ServerKeeper] = [AddressKeeper(settings.connect(url), settings.start_s)
                                   for url in locations.urls]
    if not keepers:
        keepers = [ServerProcess(number, folder, max_tokens, settings, locations.logs,
                                 with_routes=with_routes, python=locations.python, command=locations.command)
                   for number in range(settings.servers)]
    with Fleet(keepers, vocab_size, settings.room, settings.restarts, over=stop_event) as fleet:
        yield fleet


class WeightFiles:
    """Weight files in a folder that the servers can read. Files from a killed command are deleted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self.delete_files()

    def write(self, weights: NamedTensors) -> list[str]:
        """Write a set of weight files; earlier files stay."""
        with translate_disk_errors(self._folder):
            version_folder = self._folder / str(next(self._numbers))
            version_folder.mkdir(parents=True)
            files: list[str] = []
            tensors: dict[str, torch.Tensor] = {}
            size_bytes = 0
            for name, tensor in weights:
                # copy: a layer's experts may be views into a shared tensor, which safetensors rejects
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
                size_bytes += tensors[name].nbytes
                if size_bytes >= SHARD_BYTES:
                    files.append(_write_shard(tensors, version_folder, len(files)))
                    tensors, size_bytes = {}, 0
            if tensors:
                files.append(_write_shard(tensors, version_folder, len(files)))
            return files

    def delete_earlier_files(self, files: Sequence[str]) -> None:
        """Delete the files of earlier `write` calls; keep `files`, those of the last call."""
        if not self._folder.is_dir():
            return
        current_folders = {Path(file).parent.name for file in files}
        for version_folder in self._folder.iterdir():
            if version_folder.name not in current_folders:
                shutil.rmtree(version_folder, ignore_errors=True)

    def delete_files(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _write_shard(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> str:
    file = folder / f"{number:05}.safetensors"
    save_file(tensors, file)
    return str(file)


def _truncate_answer(answer: TokenAnswer, stop: StopRule) -> ScoredTokens:
    """Cut an answer at its stop string, beyond which a server may generate."""
    tokens = stop.cut(answer.tokens)
    return tokens, answer.logprobs[:len(tokens)]


def _join_prompts(requests: Sequence[TokenRequest], max_answers: int) -> list[TokenRequest]:
    """Join requests of different prompts, up to `max_answers` answers each; see `ServerEngine.requests`."""
    joined: list[TokenRequest] = []
    for request in requests:
        if (joined and request.max_new_tokens <= GROUPED_TOKENS and not request.with_routes
                and joined[-1].num_answers + request.count <= max_answers
                # equal in all fields but name and prompts
                and replace(joined[-1], name="", ids=(), others=()) == replace(request, name="", ids=())):
            joined[-1] = replace(joined[-1], others=(*joined[-1].others, request.ids))
        else:
            joined.append(request)
    return joined


def check_routes(routes: np.ndarray | None, num_tokens: int, shape: RouteShape) -> np.ndarray:
    """Check the routes from a server; return [num_tokens, layers, top_k]. Raises `UserError` as
    `ServerEngine.extract_routes`."""
    why = "nothing"
    if routes is not None:
        why = f"shape {list(routes.shape)}"
        if routes.ndim == 2 and routes.shape[1] % shape.top_k == 0:  # [tokens, layers * top_k]
            routes = routes.reshape(len(routes), -1, shape.top_k)
        if routes.ndim == 3 and len(routes) >= num_tokens and routes.shape[1] >= shape.layers:
            # leading dense layers have no experts: keep the last `shape.layers` layers
            routes = routes[:num_tokens, routes.shape[1] - shape.layers:]
            # check before casting to a narrower dtype, which would wrap around
            if (routes < 0).any() or (routes >= shape.num_experts).any():
                why = f"experts from {routes.min()} to {routes.max()}, of {shape.num_experts}"
            else:
                routes = routes.astype(shape.dtype)
                why = shape.problem(routes)
                if not why:
                    return routes
    raise UserError(f"the engine must return routes of {num_tokens} tokens with {shape.layers} layers and "
                    f"{shape.top_k} experts each, but returned {why}; it records none if its expert kernel "
                    "chooses experts itself (vLLM: FlashInfer moe backends): choose another backend, "
                    "or set policy.router_replay=false")


@contextlib.contextmanager
def open_server_engine(folder: Path, vocab_size: int, max_tokens: int, settings: EngineServers,
                       locations: ServerLocations | None = None, *, with_routes: bool = False,
                       stop_event: threading.Event | None = None) -> Iterator[ServerEngine]:
    """Yield a `ServerEngine` whose servers stop after the block; see `open_fleet`. Without `locations`, logs
    are temporary."""
    with contextlib.ExitStack() as stack:
        if locations is None:
            logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="sov-engines-"))
            locations = ServerLocations(Path(logs))
        fleet = stack.enter_context(open_fleet(folder, vocab_size, max_tokens, settings, locations,
                                               with_routes=with_routes, stop_event=stop_event))
        room = settings.room * (len(locations.urls) or settings.servers)
        # named after the log folder: a restarted run deletes files left by the killed run
        folder_id = hashlib.sha256(str(locations.logs.absolute()).encode()).hexdigest()[:16]
        engine = ServerEngine(fleet, folder, settings.weights / f"sov-weights-{folder_id}", room,
                              with_routes=with_routes)
        stack.callback(engine.close)
        yield engine

"""A run as a cluster's jobs: an array of workers that ask, on Slurm a server of the model beside it where one
is wanted, and a last job that finishes the source.  The same command, typed again, tells how far they are or
goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from data_prep.synth.budget import Most
from data_prep.synth.engine import Tally
from data_prep.synth.journal import read_done
from data_prep.synth.running import Order, finished, items_of, make, open_items, ready, refuse_unanswered
from data_prep.synth.shares import Share, merge_answers
from data_prep.synth.work_folder import ANSWERS, settle
from megatron_sov.artifacts import atomic_write, disk_errors
from megatron_sov.clusters import client
from megatron_sov.clusters.cluster import ClusterProfile
from megatron_sov.clusters.kubernetes import KubernetesProfile
from megatron_sov.endpoints.cache import EndpointCache
from megatron_sov.errors import StopRequested, UserError
from megatron_sov.work.arrays import (
    FINISH,
    FINISH_CPUS,
    Arrays,
    ClusterOptions,
    Jobs,
    TaskFailed,
    profile_of,
    refuse_many_restarts,
    refuse_unquotable,
    tell_failures,
)
from megatron_sov.work.locks import holding

ADDRESS, ARRAY, SCRIPT = "slurm/server.json", "slurm/array.job", "slurm/server.sbatch"
KEY_ENV = "VLLM_API_KEY"
"""What `vllm serve` reads its key from, and workers send it by."""
ASK, SERVER = "ask", "server"
_NAME = re.compile(r"[A-Za-z0-9._/-]+")
SERVER_WAIT_S, LOOK_S = 3 * 3600.0, 5.0


@dataclass(frozen=True)
class Server:
    """A server of the model, as a job beside the array."""

    model: Path
    """Folder that `vllm serve` takes."""
    arguments: tuple[str, ...] = ()
    """More of its arguments."""
    program: str = "vllm"
    """What is called."""


@dataclass(frozen=True)
class MakeShare:
    """The work of the array: the items of each worker."""

    order: Order
    """What was asked for; its limits are those of one worker."""
    num_workers: int
    """Of the array."""
    has_server: bool
    """Whether the model is served by a job beside it."""

    def __call__(self, task: int) -> None:
        """Make the items of one worker."""
        refuse_many_restarts("sov-data synth", "take more --workers")
        make_share(served(self.order) if self.has_server else self.order, Share(task, self.num_workers))


@dataclass(frozen=True)
class FinishSource:
    """The work of the last job."""

    order: Order

    def __call__(self, task: int) -> None:
        """Finish the source."""
        with holding(self.order.output, self.order.output):
            merge_answers(self.order.output)
            code = finished(replace(self.order, workers=len(os.sched_getaffinity(0))), Tally())
            if code:
                raise UserError(f"{self.order.output}: the checks end with {int(code)}; see its report.html")


def make_share(order: Order, share: Share) -> None:
    """Make the items of one worker that are not done.

    Raises:
        StopRequested: a limit, a signal, an endpoint that is away, or items without an answer.
    """
    made, done = ready(order), read_done(order.output)
    todo = {item.id for number, item in items_of(made.generator, order.inputs, order.limit)
            if share.holds(number) and item.id not in done}
    tally = Tally()
    if todo:
        make(made, order, todo, tally, share)
    if tally.defects:
        raise TaskFailed("; ".join(tally.defects[:3]))
    refuse_unanswered(tally)


def served(order: Order) -> Order:
    """Return an order whose model is where its server says that it is, once it answers.

    Raises:
        StopRequested: it has not answered for long.
    """
    began_s = time.monotonic()
    while time.monotonic() - began_s < SERVER_WAIT_S:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads((order.output / ADDRESS).read_text(encoding="utf-8"))
            with contextlib.suppress(urllib.error.HTTPError):  # it answers, be it with a refusal
                urllib.request.urlopen(said["url"].removesuffix("/v1") + "/health", timeout=10).close()
            was = order.writer
            writer = replace(was, engine=said["url"], model=said["model"], key_env=KEY_ENV,
                             known_as=was.identity())
            return replace(order, writer=writer, judge=writer if order.judge == was else order.judge)
        time.sleep(LOOK_S)
    raise StopRequested(f"{order.output / ADDRESS}: the server of the model has not answered for "
                        f"{SERVER_WAIT_S / 3600:g} h; see its log in {order.output / 'slurm'}")


def submit_order(order: Order, where: ClusterOptions, num_workers: int, server: Server | None) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        order: what was asked for; its output is on a disk that all nodes see.
        where: it is submitted to.
        num_workers: jobs of the array.
        server: of the model; None: it is at an address.

    Raises:
        UserError: the profile, the order or the cluster are in the way.
        StopRequested: the budget is used up.
    """
    output = order.output.absolute()
    refuse_unquotable(output)
    order = replace(order, output=output, inputs=tuple(path.absolute() for path in order.inputs),
                    prompts=order.prompts.absolute() if order.prompts else None)
    if order.writer.is_local and server is None:
        raise UserError("--engine: with --cluster a folder is served by --serve-vllm, or by a server of your "
                        "own whose address you pass")
    if server is not None and not _NAME.fullmatch(order.writer.name):
        raise UserError(f"--model {order.writer.name}: must have letters, digits and ._/- alone, to be the "
                        "name of a served model")
    profile = profile_of(where)
    if server is not None and isinstance(profile, KubernetesProfile):
        raise UserError("--serve-vllm: puts a server into Slurm, and --cluster names a profile of kind k8s; "
                        "start a server there yourself, and pass its address with --engine")
    made = ready(order)
    with holding(output, output), disk_errors(output):
        jobs = Jobs.read(output)
        if living := jobs.living():
            print(f"{output}: {jobs.told(living)} are at work; {len(read_done(output)):,} items are done")
            return
        settle(output, made.identity, order.redo)
        (output / "slurm").mkdir(exist_ok=True)
        merge_answers(output)
        todo = open_items(made.generator, order, Tally())
        tell_failures(output, (ASK, FINISH))
        order = replace(order, most=share_of(order, num_workers))
        _submit(order, profile, min(num_workers, max(1, len(todo))), server if todo else None)


def share_of(order: Order, num_workers: int) -> Most:
    """Return what each worker may use up of what is left.

    Raises:
        StopRequested: nothing is left.
    """
    cache = EndpointCache(order.output / ANSWERS)
    used, most = cache.usage(), order.most
    cache.close()
    tokens, cost = most.tokens - used.input_tokens - used.output_tokens, most.cost - used.cost
    if (most.tokens and tokens < num_workers) or (most.cost and cost <= 0):
        raise StopRequested(f"{used.input_tokens + used.output_tokens:,} tokens and {used.cost:.4f} are used "
                            "up; raise --max-tokens-total or --max-cost")
    return Most(tokens // num_workers if most.tokens else 0, cost / num_workers if most.cost else 0.0,
                most.time_s)


def _submit(order: Order, profile: ClusterProfile | KubernetesProfile, num_workers: int,
            server: Server | None) -> None:
    output = order.output
    with Arrays(output, "synth", profile) as arrays:
        (output / ARRAY).unlink(missing_ok=True)
        (output / ADDRESS).unlink(missing_ok=True)
        if server is not None and isinstance(profile, ClusterProfile):
            os.environ[KEY_ENV] = secrets.token_urlsafe(32)  # Slurm hands the environment to its jobs
            (output / SCRIPT).write_text(server_script(server, order, profile))
            client.check_script((output / SCRIPT).read_text())
            arrays.note(SERVER, client.submit(output / SCRIPT, after=[]))
        number = arrays.submit(ASK, MakeShare(order, num_workers, server is not None), num_workers)
        atomic_write(output / ARRAY, number)
        arrays.submit(FINISH, FinishSource(order), cpus=min(profile.cpus_per_node, FINISH_CPUS))
    print(f"{output}: submitted {arrays.told()}; the same command tells how far they are")


def server_script(server: Server, order: Order, profile: ClusterProfile) -> str:
    """Return the script of the server's job."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True,
                                                lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["sh"] = shlex.quote
    text = (files("slurm") / "templates" / "vllm.sbatch.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        profile=profile, output=str(order.output), address=str(order.output / ADDRESS),
        array=str(order.output / ARRAY), name=order.writer.name, key_env=KEY_ENV,
        # without generation-config vLLM puts the model's own top_k and penalties beside what is asked for
        command=[server.program, "serve", str(server.model.absolute()), "--host", "0.0.0.0",
                 "--served-model-name", order.writer.name, "--generation-config", "vllm", *server.arguments])

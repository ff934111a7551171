"""A run as Slurm's jobs: an array of workers that ask, a server of the model beside it where one is wanted,
and a last job that finishes the source.  The same command, typed again, tells how far they are or goes on."""

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

from data_prep.synth.candidates import ANSWERS
from data_prep.synth.known import is_file
from data_prep.synth.models import Most
from data_prep.synth.options import SynthOptions
from data_prep.synth.running import GeneratorOrder, begun_run, finished, make, open_items, order_of, ready
from megatron_sov.base.errors import StopRequested, UserError
from megatron_sov.work.clusters import client
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.progress.journal import items_on_record, slurm_folder, work_folder
from megatron_sov.work.submit.arrays import (
    FINISH_CPUS, Arrays, SharedWork, TaskFailed, profile_of, refuse_many_restarts, submit_shares)

ADDRESS, SCRIPT = "server.json", "server.sbatch"
KEY_ENV = "VLLM_API_KEY"
"""What `vllm serve` reads its key from, and workers send it by."""
ASK, SERVER = "ask", "server"
DEFAULT_WORKERS = 4
_NAME = re.compile(r"[A-Za-z0-9._/-]+")
SERVER_WAIT_S, LOOK_S = 3 * 3600.0, 5.0


@dataclass(frozen=True)
class MakeShare:
    """The work of the array: each worker makes every `num_workers`-th item."""

    order: GeneratorOrder
    """What was asked for; its limits are those of one worker."""
    num_workers: int

    def __call__(self, task: int) -> None:
        """Make the items of one worker that are not done.

        Raises:
            StopRequested: a limit, a signal, an endpoint that is away, or items without an answer.
        """
        refuse_many_restarts("sov-data synth", "take more --workers")
        made = ready(self.order if self.order.options.serve_vllm is None else served(self.order))
        tally = open_items(made)
        # by the number in the whole input: a worker has the same items after a restart, and no two share one
        tally.todo &= {item.id for number, item in made.items() if number % self.num_workers == task}
        if tally.todo:
            make(made, tally, f"{task:04}")
        if tally.defects:
            raise TaskFailed("; ".join(tally.defects[:3]))
        tally.refuse_unanswered()


@dataclass(frozen=True)
class FinishSource:
    """The work of the last job."""

    order: GeneratorOrder

    def __call__(self, task: int) -> None:
        made = ready(self.order)
        with begun_run(made) as tally:
            if code := finished(made, tally, len(os.sched_getaffinity(0))):
                raise UserError(f"{self.order.output}: the checks end with {int(code)}; see its report.html")


def served(order: GeneratorOrder) -> GeneratorOrder:
    """Return an order whose model is where its server says that it is, once it answers.

    Raises:
        StopRequested: it has not answered for long.
    """
    address = slurm_folder(order.output) / ADDRESS
    began_s = time.monotonic()
    while time.monotonic() - began_s < SERVER_WAIT_S:
        # no file yet, half a file, or a server that still loads: each means to wait
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(address.read_text(encoding="utf-8"))
            with contextlib.suppress(urllib.error.HTTPError):  # it answers, be it with a refusal
                urllib.request.urlopen(said["url"].removesuffix("/v1") + "/health", timeout=10).close()
            was = order.writer
            # `known_as` stays that of the folder: answers are kept by the model, not by where a job runs
            writer = replace(was, engine=said["url"], model=said["model"], key_env=KEY_ENV,
                             known_as=was.identity())
            return replace(order, writer=writer, judge=writer if order.judge == was else order.judge)
        time.sleep(LOOK_S)
    raise StopRequested(f"{address}: the server of the model has not answered for "
                        f"{SERVER_WAIT_S / 3600:g} h; see its log in {address.parent}")


def submit_order(options: SynthOptions) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.  All nodes see the output's disk.

    Raises:
        UserError: the profile, what was asked for or Slurm are in the way.
        StopRequested: the budget is used up.
    """
    assert options.output is not None
    # jobs run in other folders, so paths are absolute; `redo` in the last job would delete what workers made
    order = order_of(replace(
        options, redo=False, output=options.output.absolute(),
        generator=str(Path(options.generator).absolute())
        if is_file(options.generator) else options.generator,
        input=tuple(path.absolute() for path in options.input),
        prompts=options.prompts.absolute() if options.prompts else None))
    if order.writer.is_local and options.serve_vllm is None:
        raise UserError("--engine: with --cluster a folder is served by --serve-vllm, or by a server of your "
                        "own whose address you pass")
    if options.serve_vllm is not None and not _NAME.fullmatch(order.writer.name):
        raise UserError(f"--model {order.writer.name}: must have letters, digits and ._/- alone, to be the "
                        "name of a served model")
    profile = profile_of(options)
    first = replace(order, options=replace(order.options, redo=options.redo))
    made = ready(first)

    def begin() -> None:
        if options.serve_vllm is not None:
            os.environ[KEY_ENV] = secrets.token_urlsafe(32)  # Slurm hands the environment to its jobs
            (slurm_folder(order.output) / ADDRESS).unlink(missing_ok=True)
        with begun_run(made):
            return

    def serve(arrays: Arrays, array: str) -> None:
        if options.serve_vllm is not None:
            folder = slurm_folder(order.output)
            (folder / SCRIPT).write_text(server_script(order, profile, array))
            client.check_script((folder / SCRIPT).read_text())
            arrays.note(SERVER, client.submit(folder / SCRIPT, after=[]))

    submit_shares(order.output, SharedWork(
        ASK, "synth", sum(1 for _ in made.items()), "items",
        num_done=lambda: len(items_on_record(work_folder(order.output))), begin=begin,
        share=lambda num: MakeShare(replace(order, most=share_of(order, num)), num),
        finish=FinishSource(order), finish_cpus=min(profile.cpus_per_node, FINISH_CPUS), beside=serve),
        profile, options.workers or DEFAULT_WORKERS)


def share_of(order: GeneratorOrder, num_workers: int) -> Most:
    """Return what each worker may use up of what is left.

    Raises:
        StopRequested: nothing is left.
    """
    cache = EndpointCache(order.output / ANSWERS)
    used, most = cache.usage(), order.most
    cache.close()
    # workers do not see what the others spend, so each gets a part of what is left
    tokens, cost = most.tokens - used.input_tokens - used.output_tokens, most.cost - used.cost
    if (most.tokens and tokens < num_workers) or (most.cost and cost <= 0):
        raise StopRequested(f"{used.input_tokens + used.output_tokens:,} tokens and {used.cost:.4f} are used "
                            "up; raise --max-tokens-total or --max-cost")
    return Most(tokens // num_workers if most.tokens else 0, cost / num_workers if most.cost else 0.0,
                most.time_s)


def server_script(order: GeneratorOrder, profile: ClusterProfile, array: str, program: str = "vllm") -> str:
    """Return the script of the job that serves the model as long as an array of that number lives."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True,
                                                lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["sh"] = shlex.quote
    text = (files("slurm") / "templates" / "vllm.sbatch.j2").read_text(encoding="utf-8")
    folder = slurm_folder(order.output)
    return environment.from_string(text).render(
        profile=profile, logs=str(folder), address=str(folder / ADDRESS), array=array,
        name=order.writer.name, key_env=KEY_ENV,
        # without generation-config vLLM puts the model's own top_k and penalties beside what is asked for
        command=[program, "serve", str(Path(order.writer.engine).absolute()), "--host", "0.0.0.0",
                 "--served-model-name", order.writer.name, "--generation-config", "vllm",
                 *shlex.split(order.options.vllm_args)])

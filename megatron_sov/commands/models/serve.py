"""`megatron-sov serve TARGET [TARGET ...]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, ProblemCode, SettingsProblem, add_options, read_options
from megatron_sov.commands.shared_options import TARGET_HELP, words_of
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import refuse_missing, refuse_no_model
from megatron_sov.runs.launch_environment import num_ranks, under_launcher
from megatron_sov.serve.settings import ServeSettings
from megatron_sov.work.endpoints.local_server import serving


@dataclass(frozen=True, kw_only=True)
class ServeOptions(PluginOptions, RankOptions):
    """Which models are served, how each is split over this machine's processes, and to whom."""

    targets: Annotated[tuple[Path, ...], Flag("TARGET", help=f"{TARGET_HELP} Each further one has "
                                                             "processes of its own.")]
    serving: ServeSettings = field(default_factory=ServeSettings)
    name: Annotated[tuple[str, ...], Flag(value="MODEL")] = ()
    """The model's name in requests (default: that of the folder); with several models repeat it."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key that requests must bring."""

    @property
    def model_names(self) -> list[str]:
        """The models' names in requests."""
        return list(self.name) or distinct_names(self.targets)

    def problems(self) -> list[SettingsProblem]:
        """Return a name that no request can say, and what would leave the model open to all."""
        found = []
        if not self.serving.is_local and self.api_key_env is None:
            found.append(SettingsProblem(
                ProblemCode.RULE, "serving.host", "others than this machine reach it, and would need no key",
                self.serving.host, "name an environment variable that holds one with --api-key-env, or take "
                "127.0.0.1"))
        names = self.model_names
        found += [SettingsProblem(ProblemCode.BOUND, "name", "must be 1 to 200 printable characters", name)
                  for name in names if not (name.strip() and name.isprintable() and len(name) <= 200)]
        if len(names) != len(self.targets):
            found.append(SettingsProblem(ProblemCode.RULE, "name", f"there are {len(self.targets)} "
                                         f"models and {len(names)} names",
                                         way_out="repeat it, once for each model"))
        elif len(set(names)) != len(names):
            found.append(SettingsProblem(ProblemCode.RULE, "name", "two models have one name",
                                         next(name for name in names if names.count(name) > 1),
                                         "give each model a name of its own"))
        return found

    @property
    def of_every_model(self) -> list[str]:
        """The words of a command line that serves another model the same way: memory, layout, plugins."""
        own = ServeSettings(batching=self.serving.batching, max_waiting=self.serving.max_waiting,
                            max_length_tokens=self.serving.max_length_tokens)
        return words_of(dataclasses.replace(self, targets=(), name=(), api_key_env=None, serving=own))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each path: its last part, with as many parts before it as tell all apart."""
    # as they are typed: a link has a name of its own
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(found[-length:]) for found in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(map(str, paths))


add_arguments = partial(add_options, cls=ServeOptions)


def run(args: argparse.Namespace) -> int:
    options = read_options(ServeOptions, args)
    load_plugins(options.plugins)
    first, *more = options.targets
    first_name, *names = options.model_names
    settings = dataclasses.replace(options.serving, name=first_name, api_key=_key(options.api_key_env))
    # refuses a wrong --nproc before a model is read
    num_ranks(options.nproc)
    if more and under_launcher():
        raise UserError(f"TARGET: torchrun or Slurm has started this process, which serves one model; "
                        f"{more[0]} needs a command of its own")
    for target in options.targets:
        refuse_missing(target)
        refuse_no_model(target)
    check_output("--address-file", settings.address_file)

    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    # aiohttp is optional; its absence is told before weights are loaded
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UserError("aiohttp, which speaks HTTP, is not installed for this Python; "
                        f"{how_to_install('serve')}") from None
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.serve.run import serve

    found = find_target(first)
    with contextlib.ExitStack() as stack:
        others = {name: stack.enter_context(serving([target], f"{target}: ", names=[name],
                                                    options=options.of_every_model))
                  for target, name in zip(more, names, strict=True)}
        serve(found, settings, options.settings, options.nproc, others)
    return 0


def _key(variable: str | None) -> str:
    """Return the key that a variable of the environment holds; "" where none is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-env {variable}: the environment has no key there; set it to ASCII "
                        "characters without line breaks, which no command line shows")
    return key

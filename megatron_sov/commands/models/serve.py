"""Options and checks of `megatron-sov serve TARGET`."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError, format_install_command
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import DeclaredCommand, Flag, ProblemCode, SettingsProblem
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.engine import PRECISION_KEY
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model_folder, check_model_path
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.serve.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class ServeOptions(PluginOptions, RankOptions):
    """Which model is served, how it is split over this machine's processes, and to whom."""

    target: ModelPath
    serving: ServeSettings = field(default_factory=ServeSettings)
    name: Annotated[str | None, Flag(value="MODEL")] = None
    """The model's name in requests (default: that of the folder)."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key that requests must bring."""

    @property
    def model_name(self) -> str:
        # as it is typed: a link has a name of its own
        return os.path.basename(os.path.abspath(self.target)) if self.name is None else self.name

    def problems(self) -> list[SettingsProblem]:
        """Return a name that no request can say, and what would leave the model open to all."""
        found, name = [], self.model_name
        if not self.serving.is_local and self.api_key_env is None:
            found.append(SettingsProblem(
                ProblemCode.RULE, "serving.host", "others than this machine reach it, and would need no key",
                self.serving.host, "name an environment variable that holds one with --api-key-env, or take "
                "127.0.0.1", fix=Fix(options=("--host", "127.0.0.1"))))
        if not (name.strip() and name.isprintable() and len(name) <= 200):
            found.append(SettingsProblem(ProblemCode.BOUND, "name", "must be 1 to 200 printable characters",
                                         name))
        return found


@dataclass(frozen=True)
class ServeRequest:
    """Checked input of `serve_run.serve_target`."""

    target: Path
    settings: ServeSettings
    changes: tuple[str, ...]
    """`--set` of the engine."""
    nproc: int | None


def check_serve(options: ServeOptions) -> ServeRequest:
    load_plugins(options.plugins)
    settings = dataclasses.replace(options.serving, name=options.model_name,
                                   api_key=_read_api_key(options.api_key_env))
    num_ranks(options.nproc)
    check_model_path(options.target)
    check_model_folder(options.target)
    _refuse_layout(options)
    check_output("--address-file", settings.address_file)
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("aiohttp, which speaks HTTP, is not installed for this Python; "
                        f"{format_install_command('serve')}")
    return ServeRequest(options.target, settings, options.settings, options.nproc)


def _refuse_layout(options: ServeOptions) -> None:
    """Raise `UserError` for processes and settings of our own decoder, which does not run Hugging Face
    folders."""
    given = [f"--nproc {options.nproc}"] if options.nproc is not None else []
    given += [f"--set {one}" for one in options.settings if one.partition("=")[0] != PRECISION_KEY]
    if is_hf_folder(options.target) and (given or num_ranks(options.nproc) > 1):
        raise UserError(f"{', '.join(given) or 'several processes'}: {options.target} is a Hugging Face "
                        "folder, which transformers runs in one process; leave it out, or serve a checkpoint "
                        "that `megatron-sov convert from-hf` makes of it", Fix(left_out=tuple(given)))


SERVE = DeclaredCommand(ServeOptions, check_serve, "megatron_sov.commands.models.serve_run:serve_target")


def _read_api_key(variable: str | None) -> str:
    """Return the value of an environment variable, "" for `None`."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-env {variable}: the environment has no key there; set it to ASCII "
                        "characters without line breaks, which no command line shows")
    return key

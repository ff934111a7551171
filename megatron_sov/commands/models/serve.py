"""Options and checks for `megatron-sov serve TARGET`."""

import dataclasses
import importlib.util
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError, choose_free_path, format_install_command
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import DeclaredCommand, Flag, ProblemCode, SettingsProblem
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.engine import PRECISION_KEY
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.serve.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class ServeOptions(PluginOptions, RankOptions):
    """Model, layout and network address for `megatron-sov serve`."""

    target: ModelPath
    serving: ServeSettings = field(default_factory=ServeSettings)
    name: Annotated[str | None, Flag(value="MODEL")] = None
    """Model name in requests (default: the folder's name)."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Environment variable with the API key that requests must send."""

    @property
    def model_name(self) -> str:
        # not resolved: the name of a link counts
        return os.path.basename(os.path.abspath(self.target)) if self.name is None else self.name

    def problems(self) -> list[SettingsProblem]:
        """Return problems with the model name, and with an open port without an API key."""
        violations, name = [], self.model_name
        if not self.serving.is_local and self.api_key_env is None:
            violations.append(SettingsProblem(
                ProblemCode.RULE, "serving.host", "is reachable from other machines without an API key",
                self.serving.host, "pass --api-key-env VARIABLE, or use 127.0.0.1",
                fix=Fix(options=("--api-key-env", "VARIABLE"))))
        if not (name.strip() and name.isprintable() and len(name) <= 200):
            violations.append(SettingsProblem(ProblemCode.BOUND, "name",
                                              "must be 1 to 200 printable characters", name))
        return violations


@dataclass(frozen=True)
class ServeRequest:
    """Checked input for `serve_run.serve_target`."""

    target: Path
    settings: ServeSettings
    changes: tuple[str, ...]
    """`--set` values for the engine."""
    nproc: int | None


def check_serve(options: ServeOptions) -> ServeRequest:
    load_plugins(options.plugins)
    num_ranks(options.nproc)
    check_model(options.target, options.settings, options.nproc)
    _refuse_layout(options)
    settings = dataclasses.replace(options.serving, name=options.model_name,
                                   api_key=_read_api_key(options.api_key_env))
    check_output("--address-file", settings.address_file)
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("aiohttp, the HTTP server, is not installed for this Python; "
                        f"{format_install_command('serve')}")
    return ServeRequest(options.target, settings, options.settings, options.nproc)


def _refuse_layout(options: ServeOptions) -> None:
    """Raise `UserError` for processes and settings that transformers ignores, if TARGET is its folder."""
    refused_words = [f"--nproc {options.nproc}"] if options.nproc is not None else []
    refused_words += [f"--set {setting}" for setting in options.settings
                      if setting.partition("=")[0] != PRECISION_KEY]
    if is_hf_folder(options.target) and (refused_words or num_ranks(options.nproc) > 1):
        target = choose_free_path(f"{options.target.name}-checkpoint")
        conversion = shlex.join(["megatron-sov", "convert", "from-hf", str(options.target), target])
        is_split = any(setting.startswith("parallel.tp=") for setting in options.settings)
        needs_sp = is_split and "parallel.sp=true" not in options.settings
        raise UserError(f"{', '.join(refused_words) or 'several processes'}: {options.target} is a Hugging "
                        "Face folder, which transformers runs in one process; a checkpoint runs in several",
                        Fix(words={str(options.target): target}, before=(conversion,),
                            options=("--set", "parallel.sp=true") if needs_sp else ()))


SERVE = DeclaredCommand(ServeOptions, check_serve, "megatron_sov.commands.models.serve_run:serve_target")


def _read_api_key(variable: str | None) -> str:
    """Return the value of an environment variable, "" for `None`."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-env {variable}: the variable is unset or invalid; set it to printable "
                        "ASCII characters")
    return key

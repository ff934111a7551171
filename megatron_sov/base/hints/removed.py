"""Commands, options, settings and folders of earlier versions that this one has no part for.

Each is refused by its name, with what serves in its place. An entry stays for one release.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError

COMMANDS = {
    "megatron-sov audit": "`megatron-sov inspect RUN --verify` checks the hashes of a run's manifests",
    "megatron-sov counterfactual": "train a second run on shards that `sov-data pack` makes without the "
                                   "documents, and compare with `megatron-sov report RUN RUN`",
    "megatron-sov card": "`megatron-sov convert to-hf` writes a README.md with the model's origins",
    "megatron-sov convert deepen": "use mergekit's passthrough method on the folder of `convert to-hf`",
    "megatron-sov convert to-gguf": "use convert_hf_to_gguf.py of llama.cpp on the folder of `convert to-hf`",
    "megatron-sov convert upcycle": "use mergekit-moe on the folder of `convert to-hf`",
    "megatron-sov ladder": "train the sizes with `megatron-sov pretrain` and fit their losses yourself",
    "megatron-sov reproduce": "python benchmarks/paper_claims.py runs the claims in a checkout",
    "megatron-sov rl replay": "type the command of `rl run` again with another --run and --store",
    "megatron-sov rl why": "`megatron-sov rl store show` prints responses and their rewards",
    "megatron-sov watch": "`megatron-sov status RUN --follow` prints each step; --set obs.tensorboard=true "
                          "draws curves",
    "sov-data card": "manifest.json and summary.json of the output have sources, counts and hashes",
    "sov-tokenizer graft": "resize the model with transformers' `resize_token_embeddings`; `sov-tokenizer "
                           "media` adds tokens of pictures and sounds",
}
"""Program and command -> what to use in its place."""
OPTIONS = {
    "megatron-sov convert to-hf --quantize": "quantize the folder with llm-compressor",
    **dict.fromkeys((f"megatron-sov submit --{name}" for name in ("job-name", "manifest", "apply")),
                    "submit to a Slurm cluster; Kubernetes is not supported"),
    "sov-data mix --search": "set the shares with --blend",
    **dict.fromkeys(("sov-data synth --labels", "sov-data synth --min-kappa"),
                    "compare kept.jsonl and rejected.jsonl with scikit-learn's `cohen_kappa_score`"),
}
"""Program, command and option -> what to use in its place."""
_CURVES = "set obs.tensorboard or obs.wandb for curves"
SETTINGS: dict[str, tuple[Any, str]] = {
    "data.without": ([], "pack shards without the documents"),
    "obs.mlflow": (False, _CURVES),
    "obs.mlflow_experiment": ("megatron-sov", _CURVES),
    "obs.otlp_endpoint": ("", _CURVES),
    "obs.prometheus_host": ("127.0.0.1", _CURVES),
    "obs.prometheus_port": (0, _CURVES),
    "obs.prometheus_textfile": ("", _CURVES),
    "obs.telemetry_every_s": (15.0, _CURVES),
}
"""Setting of a run -> its default, and what to use in its place."""
VALUES = {
    "code": "take prompts with tests from a data set, or write a generator file of your own (docs/synth.md)",
    "mcp": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "nemo_gym": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "openenv": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "sglang": "use vllm",
}
"""Value of an option or setting, such as an engine or a tool environment -> what to use in its place."""
KINDS = {
    "mixture": "its file blend.yaml is a blend for `sov-data mix --blend`",
}
"""Kind of artifact -> what to use in its place."""
FOLDERS = {
    "begun.json": ("audit or a replay", "train the run again with another --run to compare it"),
    "ladder.json": ("a ladder", "open its runs, the folders inside, one by one"),
    "reproduce.html": ("`megatron-sov reproduce`", "open the runs inside one by one"),
    "removal.json": ("a counterfactual run", "open its folder `run` as any run"),
}
"""File that a folder of a removed command holds -> what made the folder, and what to use in its place."""


def check_command(program: str, words: Sequence[str]) -> None:
    """Refuse a command line of a removed command or option.

    Args:
        program: e.g. "megatron-sov".
        words: the words after it, as they were typed.

    Raises:
        UserError: the command or option was removed; the message says what serves in its place.
    """
    for count in (2, 1):
        typed = " ".join([program, *words[:count]])
        if instead := COMMANDS.get(typed):
            raise UserError(f"{typed}: was removed in this version; {instead}")
        for word in words[count:]:
            option = word.partition("=")[0]
            if instead := OPTIONS.get(f"{typed} {option}"):
                raise UserError(f"{typed} {option}: was removed in this version; {instead}")


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of saved settings of a run without removed settings that have their default: the run
    did not use them."""
    kept = copy.deepcopy(dict(raw))
    for name, (default, _) in SETTINGS.items():
        *groups, last = name.split(".")
        block: Any = kept
        for group in groups:
            block = block.get(group) if isinstance(block, dict) else None
        if isinstance(block, dict) and last in block and block[last] == default:
            del block[last]
    return kept


def check_folder(path: Path) -> None:
    """Refuse a folder that a removed command wrote.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    for name, (maker, instead) in FOLDERS.items():
        if (path / name).is_file():
            raise UserError(f"{path}: holds {name} of {maker}, which was removed in this version; {instead}")


def check_kind(path: str | Path, kind: str) -> None:
    """Refuse an artifact of a kind that only a removed command made.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    if instead := KINDS.get(kind):
        raise UserError(f"{path}: is a '{kind}' artifact, which this version cannot read; {instead}")


def was_removed(value: str) -> str:
    """Return the end of a sentence about a value that an earlier version took; "" for others."""
    return f"; it was removed in this version: {VALUES[value]}" if value in VALUES else ""

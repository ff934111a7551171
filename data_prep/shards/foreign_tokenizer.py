"""Explain why `--tokenizer` needs `sov-tokenizer import` or a download first, and propose the command."""

import shlex
from pathlib import Path

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import Fix, choose_free_path, fix_missing, suggest_download
from megatron_sov.base.hints.kinds import list_run_tokenizers
from megatron_sov.chat.folder import TOKENIZER_JSON

SUFFIXES = (".json", ".tiktoken", ".model")
PATTERNS = (TOKENIZER_JSON, "*.tiktoken", "*.model")
"""Tokenizer files that `sov-tokenizer import` reads."""


def explain_foreign_tokenizer(path: Path) -> str:
    """Return the problem and the commands for a tokenizer that is not an artifact yet; "" for an artifact, or
    a path without tokenizer files.

    `sov-tokenizer import` proves that the artifact gives the same ids as the tokenizer's own library.
    """
    if (path / MANIFEST).is_file() and read_manifest(path).kind == "tokenizer":
        return ""
    if suggest_download(path, is_bare=True) and not path.exists():
        return (f"does not exist; check the path, or run `hf download {path}` if it is a model on the hub, "
                "then `sov-tokenizer import`")
    foreign, output = _plan_import(path)
    if foreign is None:
        return ""
    command = shlex.join(["sov-tokenizer", "import", str(foreign), "--output", output])
    return f"holds a tokenizer that is not imported yet; run `{command}`, and pass its output"


def fix_foreign_tokenizer(path: Path) -> Fix | None:
    """Return the fix for a tokenizer that must be imported first, perhaps after a download; None: unknown."""
    fix = None if path.exists() else fix_missing(path, is_bare=True)
    if not path.exists() and (fix is None or not fix.before):
        return fix
    foreign, output = _plan_import(path)
    source = foreign or (path if path.exists() else path.name)
    words = ["sov-tokenizer", "import", str(source), "--output", output]
    return Fix(words={str(path): output}, before=(*(fix.before if fix else ()), shlex.join(words)))


def _plan_import(path: Path) -> tuple[Path | None, str]:
    """Return the file or folder with a tokenizer at a path (None: no tokenizer), and a free output folder.

    For a run, it is the tokenizer of the newest checkpoint; config.json or another JSON file beside
    tokenizer.json stands for the folder.
    """
    if path.suffix == ".json" and path.is_file() and (path.parent / TOKENIZER_JSON).is_file():
        path = path if path.name == TOKENIZER_JSON else path.parent
    if path.is_file():
        return (path if path.suffix in SUFFIXES else None), choose_free_path(f"{path.stem}-tokenizer")
    folders = (path, path / "tokenizer", *list_run_tokenizers(path)[-1:])
    foreign = next((folder for folder in folders for pattern in PATTERNS if any(folder.glob(pattern))), None)
    return foreign, choose_free_path(f"{path.resolve().name}-tokenizer")

"""Weight files in Hugging Face folders, and loading them with transformers or diffusers.

These libraries initialise missing tensors at random and ignore unknown tensors. Commands load models through
this module, which rejects both.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import Fix, UserError, choose_free_path, format_error

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"
"""Weight files written by `torch.save`."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
RECOMPUTED = re.compile(r"(.*\.)?(rotary_emb\.(original_)?(inv_freq|(cos|sin)_cached)|rope\.freqs"
                        r"|(attn|attention|self_attn)\.(masked_)?bias)")
"""Rotary frequencies and causal masks, saved by older programs and always recomputed."""
ADAPTER_CONFIG = "adapter_config.json"
OTHER_WEIGHTS = "transformers_weights"
"""Key of config.json that redirects transformers to another weight file."""
DAMAGED_HF = "copy or download it again"
NAMES_SHOWN = 5
MAX_FULL_BYTES, BLOCK_BYTES, NUM_BLOCKS = 1 << 22, 1 << 16, 1024
"""`hash_model_folder` reads files up to `MAX_FULL_BYTES` completely, and about `NUM_BLOCKS` blocks of larger
files together."""


def format_names(names: Sequence[str]) -> str:
    """Return the first names, and the number of further names."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; `UserError` for other content."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read as JSON ({e}); restore it from its source") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__}, not an object; restore it from its source")
    return value


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder holds a Hugging Face model; a run folder has a config.json, but no weights."""
    return (path / CONFIG).is_file() and any(
        next(path.glob(pattern), None) for pattern in ("*.safetensors", PICKLED))


def hash_model_folder(folder: Path) -> str:
    """Hash names, sizes and contents of the files in a checkpoint or Hugging Face folder.

    Large files count by evenly spaced blocks, so that a large model takes seconds. Hidden files do not count.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    blocks_per_file = max(2, NUM_BLOCKS // max(1, len(names)))
    digest = hashlib.sha256()
    for name in names:
        size_bytes = (folder / name).stat().st_size
        # with names: files that swap places give another model
        digest.update(f"{name}\0{size_bytes}\0".encode())
        with open(folder / name, "rb") as f:
            if size_bytes <= MAX_FULL_BYTES:
                digest.update(f.read())
                continue
            for number in range(blocks_per_file):
                f.seek(number * (size_bytes - BLOCK_BYTES) // (blocks_per_file - 1))
                digest.update(f.read(BLOCK_BYTES))
    return digest.hexdigest()


def find_hub_name(folder: Path) -> str:
    """Return the model name of a folder: the hub name inside the hub cache, else the folder name."""
    folder = folder.absolute()
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else folder.resolve().name


def find_weight_files(folder: Path) -> dict[str, list[str]]:
    """Return weight file -> tensor names from the index ([] without an index). Raises `UserError`: no
    weights, a damaged index or an index with outside paths, or ambiguous weights."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: holds {ADAPTER_CONFIG} next to a model's weights, and transformers adds "
                        "the adapter to the weights; merge it with PEFT, or move it to another folder")
    # The checks below reject folders from which two readers could load different weights.
    read = INDEX if (folder / INDEX).is_file() else SINGLE_FILE
    named = read_json(folder / CONFIG).get(OTHER_WEIGHTS, read) if (folder / CONFIG).is_file() else read
    if named not in (read, None):
        raise UserError(f"{folder / CONFIG}: {OTHER_WEIGHTS} = {named!r} makes transformers read that file, "
                        f"and other programs read {read}; remove the key, and rename the intended weights to "
                        f"{SINGLE_FILE}")
    if not (folder / read).is_file():
        if pickled := sorted(folder.glob(PICKLED)):
            new = choose_free_path(f"{folder.name}-safetensors")
            code = ("from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [x."
                    f"from_pretrained({str(folder)!r}).save_pretrained({new!r}) for x in (M, T)]")
            raise UserError(f"{pickled[0]}: is a pickle, and pickles can run code; if you trust it, convert "
                            "the folder to safetensors",
                            Fix(words={str(folder): new}, before=(shlex.join(["python", "-c", code]),)))
        raise UserError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX}; save the model with safetensors")
    if read == SINGLE_FILE:
        return {SINGLE_FILE: []}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: lacks a weight_map from tensor names to files; "
                        "restore it from its source")
    # The index is hostile input: "../x" would read files outside of the folder.
    outside = [f"{name} to {file}" for name, file in weight_map.items() if not isinstance(file, str)
               or Path(file).name != file or Path(file).suffix != ".safetensors"]
    if outside:
        raise UserError(f"{folder / INDEX}: weight_map must name .safetensors files in the same folder, "
                        f"but it maps {format_names(outside)}; restore it from its source")
    files = sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).is_file() and files != [SINGLE_FILE]:
        raise UserError(f"{folder}: holds {SINGLE_FILE} and {INDEX}, which names other files: two sets of "
                        "weights, of which transformers reads only the first; remove one of them")
    return {file: [name for name, place in weight_map.items() if place == file] for file in files}


def find_tensor_files(folder: Path, names_in: Callable[[Path, str], Iterable[str]]) -> dict[str, str]:
    """Return tensor name -> file; index and files must agree.

    Args:
        folder: Hugging Face folder.
        names_in: (file, fix for a damaged file) -> tensor names.

    Raises:
        UserError: as `find_weight_files`; a tensor is in two files, or index and files disagree.
    """
    files = find_weight_files(folder)
    file_of: dict[str, str] = {}
    for file, names in files.items():
        remedy = f"it should hold {format_names(names)}; {DAMAGED_HF}" if names else DAMAGED_HF
        for name in names_in(folder / file, remedy):
            if name in file_of:
                raise UserError(f"{folder / file}: holds {name}, which {file_of[name]} holds as well; "
                                "remove one of them")
            file_of[name] = file
    # A tied output head may be in the index but not in a file; the config decides whether it is missing.
    indexed = {name: file for file, names in files.items() for name in names
               if name in file_of or not name.endswith(HEAD)}
    if indexed and indexed != file_of:
        differing = sorted(name for name in {*file_of, *indexed} if indexed.get(name) != file_of.get(name))
        raise UserError(f"{folder}: the index disagrees with the files about {format_names(differing)}; "
                        "restore it from its source")
    return file_of


def load_pretrained(model_class: Any, folder: str | Path, *, left_out: Sequence[str] = (),
                    **options: Any) -> Any:
    """Load a model with exactly the weights of a local folder; code in the folder is not run.

    Args:
        model_class: auto class of transformers, or model class of diffusers.
        folder: folder with config.json and safetensors files.
        left_out: see `load_and_compare`.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: transformers or diffusers cannot load the folder, or tensors are missing, unexpected or
            mismatched.
    """
    model, names_by_problem = load_and_compare(model_class, folder, left_out=left_out, **options)
    if problems := [f"{len(names)} {problem} ({format_names(names)})"
                    for problem, names in names_by_problem.items() if names]:
        raise UserError(f"{folder}: its tensors are not those of the {type(model).__name__} that its "
                        f"{CONFIG} describes: {'; '.join(problems)}; compare the two, or {DAMAGED_HF}")
    return model


def load_and_compare(model_class: Any, folder: str | Path, *, left_out: Sequence[str] = (),
                     **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """Load a model from a local folder, and return it with lists of "missing", "unexpected" and "mismatched"
    tensors.

    Tensors that the class declares as optional (buffers in older files, tied heads) are not listed.

    Args:
        model_class: see `load_pretrained`.
        folder: see `load_pretrained`.
        left_out: name prefixes of tensors that the class does not use.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: transformers or diffusers cannot load the folder.
    """
    folder = Path(folder)
    is_transformers = model_class.__module__.startswith("transformers.")
    if is_transformers:
        find_tensor_files(folder, _read_tensor_names)
        # Report all mismatched sizes below instead of raising for the first.
        options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
    try:
        with _silence_library(model_class.__module__.partition(".")[0]):
            model, info = model_class.from_pretrained(
                str(folder), output_loading_info=True, local_files_only=True, use_safetensors=True, **options)
    # Libraries raise many types: missing packages, unknown fields, truncated files.
    except Exception as e:
        if is_transformers:
            _refuse_unknown_type(folder)
        library = "transformers" if is_transformers else "diffusers"
        raise UserError(f"{folder}: {library} cannot load it ({format_error(e)}); "
                        "restore it from its source") from None
    mismatched = [name if isinstance(name, str) else f"{name[0]} {list(name[1])} instead of {list(name[2])}"
                  for name in info["mismatched_keys"]]
    unexpected = [name for name in map(str, info["unexpected_keys"])
                  if not name.startswith(tuple(left_out)) and not RECOMPUTED.fullmatch(name)]
    return model, {"missing": sorted(map(str, info["missing_keys"])), "unexpected": sorted(unexpected),
                   "mismatched": sorted(mismatched)}


def _refuse_unknown_type(folder: Path) -> None:
    """Raise `UserError` if the installed transformers does not know the folder's `model_type`."""
    from transformers import CONFIG_MAPPING, __version__  # not at the top: it is slow to import

    kind = read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise UserError(f"{folder}: transformers {__version__} has no class for model_type = {kind!r} of "
                        f"{CONFIG}; install a later release, or avoid transformers "
                        "(`convert verify --no-load`, `--engine megatron`)")


def find_low_bit_options(folder: Path) -> dict[str, Any]:
    """Return `from_pretrained` arguments that dequantise low-bit weights to bfloat16; {} for other folders.
    Raises `UserError`: the package that reads the folder is not installed."""
    quantised = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(quantised, dict):
        return {}
    if quantised.get("quant_method") != "compressed-tensors":
        return {"dtype": "bfloat16"}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(f"{folder}: transformers needs the package compressed-tensors for these weights; "
                        "install it (`pip install compressed-tensors`), or avoid transformers "
                        "(`convert verify --no-load`)")
    from transformers import CompressedTensorsConfig  # not at the top: it is slow to import

    return {"dtype": "bfloat16", "quantization_config": CompressedTensorsConfig(dequantize=True)}


@contextlib.contextmanager
def _silence_library(library: str) -> Iterator[None]:
    """Suppress a library's messages about a folder, and progress bars outside terminals."""
    logging = importlib.import_module(f"{library}.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read_tensor_names(file: Path, remedy: str) -> list[str]:
    from safetensors import SafetensorError, safe_open  # not at the top: plans read no weights

    try:
        with safe_open(file, "np") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read as a safetensors file ({e}); {remedy}") from None

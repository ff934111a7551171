"""Hugging Face folders of models: which files hold the weights, and the one place that loads a model with
transformers or diffusers.

A library makes up at random what a folder lacks, and passes over what it does not know.  Every command that
runs such a model loads it here, where both are refused.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, format_error

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"
"""Pattern of weights that `torch.save` wrote."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
RECOMPUTED = re.compile(r"(.*\.)?(rotary_emb\.(original_)?(inv_freq|(cos|sin)_cached)|rope\.freqs"
                        r"|(attn|attention|self_attn)\.(masked_)?bias)")
"""Rotary frequencies and causal masks, which older programs saved and every program computes anew."""
ADAPTER_CONFIG = "adapter_config.json"
OTHER_WEIGHTS = "transformers_weights"
"""Key of config.json by which transformers reads another file of weights."""
DAMAGED_HF = "copy or download it again"
NAMES_SHOWN = 5


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; `UserError` where it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read as JSON ({e}); restore it from its source") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__} where an object is needed; "
                        "restore it from its source")
    return value


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder holds a Hugging Face model (a run folder has a config.json as well, but no
    weights beside it)."""
    return (path / CONFIG).is_file() and any(
        next(path.glob(pattern), None) for pattern in ("*.safetensors", PICKLED))


def hub_name(folder: Path) -> str:
    """Return what a model's folder calls the model: its name on the hub where it lies in the hub's cache,
    else the folder's own."""
    folder = folder.absolute()
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else folder.resolve().name


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Return the files of weights in a model's folder -> the tensors that the index says are in each ([]:
    there is no index).

    Raises:
        UserError: there are none, the index is damaged or names files elsewhere, or two readers would take
            different weights.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: holds {ADAPTER_CONFIG} beside a model's weights, and transformers adds "
                        "such an adapter to them; merge it with PEFT, or move it to a folder of its own")
    # Two readers must never take different weights: all below refuses a folder where they could.
    read = INDEX if (folder / INDEX).is_file() else SINGLE_FILE
    named = read_json(folder / CONFIG).get(OTHER_WEIGHTS, read) if (folder / CONFIG).is_file() else read
    if named not in (read, None):
        raise UserError(f"{folder / CONFIG}: {OTHER_WEIGHTS} = {named!r} has transformers read that file, "
                        f"and everything else reads {read}; take the key out, and call the weights that are "
                        f"wanted {SINGLE_FILE}")
    if not (folder / read).is_file():
        if pickled := sorted(folder.glob(PICKLED)):
            raise UserError(f"{pickled[0]}: is a pickle, which is not read; if you trust it, write the "
                            "folder with safetensors (transformers: from_pretrained(FOLDER)"
                            ".save_pretrained(NEW))")
        raise UserError(f"{folder}: has neither {SINGLE_FILE} nor the index of several such files; save the "
                        "model with safetensors")
    if read == SINGLE_FILE:
        return {SINGLE_FILE: []}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: lacks a weight_map from tensor names to files; "
                        "restore it from its source")
    # The index is hostile input: "../x" would read files outside of the folder.
    outside = [f"{name} to {file}"
               for name, file in weight_map.items() if not isinstance(file, str)
               or Path(file).name != file or Path(file).suffix != ".safetensors"]
    if outside:
        raise UserError(f"{folder / INDEX}: weight_map must name .safetensors files in the same folder, "
                        f"but it sends {listed(outside)}; restore it from its source")
    files = sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).is_file() and files != [SINGLE_FILE]:
        raise UserError(f"{folder}: holds {SINGLE_FILE} and {INDEX}, which names other files: two sets of "
                        "weights, and transformers reads the first alone; remove the one that is not wanted")
    return {file: [name for name, place in weight_map.items() if place == file] for file in files}


def tensor_files(folder: Path, names_in: Callable[[Path, str], Iterable[str]]) -> dict[str, str]:
    """Return for each tensor of a model's folder the file that holds it; index and files must agree in both
    directions.

    Args:
        folder: with the files of `weight_files`.
        names_in: (file, what to do where it is damaged) -> the names of its tensors.

    Raises:
        UserError: as `weight_files`; a tensor is in two files, or index and files disagree.
    """
    files = weight_files(folder)
    file_of: dict[str, str] = {}
    for file, held in files.items():
        remedy = f"it should hold {listed(held)}; {DAMAGED_HF}" if held else DAMAGED_HF
        for name in names_in(folder / file, remedy):
            if name in file_of:
                raise UserError(f"{folder / file}: holds {name}, which {file_of[name]} holds as well; "
                                "remove one of them")
            file_of[name] = file
    # Without an index `told` is empty, and the files alone say what there is.
    # A tied head may be named and not saved: whether it is missing is for the config to say.
    told = {name: file for file, held in files.items() for name in held
            if name in file_of or not name.endswith(HEAD)}
    if told and told != file_of:
        differing = sorted(name for name in {*file_of, *told} if told.get(name) != file_of.get(name))
        raise UserError(f"{folder}: the index disagrees with the files about {listed(differing)}; "
                        "restore it from its source")
    return file_of


def load_pretrained(model_class: Any, folder: str | Path, *, left_out: Sequence[str] = (),
                    **options: Any) -> Any:
    """Return a library's model with exactly the weights of a local folder; no code of the folder is run.

    Args:
        model_class: an auto class of transformers, or a model class of diffusers.
        folder: config.json and safetensors files.
        left_out: as `load_and_compare`.
        options: more for `from_pretrained`.

    Raises:
        UserError: the library cannot load the folder, or its tensors are not those of the model.
    """
    model, found = load_and_compare(model_class, folder, left_out=left_out, **options)
    if problems := [f"{len(names)} {what} ({listed(names)})" for what, names in found.items() if names]:
        raise UserError(f"{folder}: its tensors are not those of the {type(model).__name__} that its "
                        f"{CONFIG} describes: {'; '.join(problems)}; compare the two, or {DAMAGED_HF}")
    return model


def load_and_compare(model_class: Any, folder: str | Path, *, left_out: Sequence[str] = (),
                     **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """Return a library's model of a local folder, and the names of tensors that are "missing", "unexpected"
    or "mismatched".

    What a library's class says that it does without (buffers that older files hold, tied heads) is none of
    them.

    Args:
        model_class: as `load_pretrained`.
        folder: as `load_pretrained`.
        left_out: beginnings of the names of tensors that the class has no place for, and need not have.
        options: more for `from_pretrained`.

    Raises:
        UserError: the library cannot load the folder.
    """
    folder = Path(folder)
    is_transformers = model_class.__module__.startswith("transformers.")
    if is_transformers:
        tensor_files(folder, _names_in)
        # Mismatched sizes are reported below, together with all else, not one at a time by an exception.
        options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
    try:
        with _quiet(model_class.__module__.partition(".")[0]):
            model, info = model_class.from_pretrained(
                str(folder), output_loading_info=True, local_files_only=True, use_safetensors=True, **options)
    # a missing package, a field that is not read, a file that is cut off: it fails in many ways
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
    """Raise `UserError` where the installed transformers has no class of a folder's model type: nothing is
    wrong with the folder."""
    from transformers import CONFIG_MAPPING, __version__

    kind = read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise UserError(f"{folder}: transformers {__version__} has no class of {CONFIG}'s model_type = "
                        f"{kind!r}; install a later release that has one, or do without transformers "
                        "(`convert verify --no-load`, `--engine megatron`)")


def low_bit_options(folder: Path) -> dict[str, Any]:
    """Return what transformers' `from_pretrained` is told for a folder with weights in few bits, so that it
    makes bfloat16 of them; {} for others.

    Raises:
        UserError: the package that reads the folder is not installed.
    """
    quantised = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(quantised, dict):
        return {}
    if quantised.get("quant_method") != "compressed-tensors":
        return {"dtype": "bfloat16"}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(f"{folder}: transformers reads its weights with the package compressed-tensors, "
                        "which is not installed; install it (`pip install compressed-tensors`), or do "
                        "without transformers (`convert verify --no-load`)")
    from transformers import CompressedTensorsConfig

    return {"dtype": "bfloat16", "quantization_config": CompressedTensorsConfig(dequantize=True)}


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep back what a library says of a folder, which is said here, and its bars where they would fill a
    log."""
    logging = importlib.import_module(f"{library}.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _names_in(file: Path, remedy: str) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read as a safetensors file ({e}); {remedy}") from None

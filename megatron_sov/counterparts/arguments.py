"""Reading the arguments of Megatron-LM out of a command line or a shell script, which is read and never run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

MAX_CHARS = 1 << 20
_ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=([^\s()]+|\"[^\"]*\"|'[^']*')\s*(?:#.*)?$",
                       re.MULTILINE)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)(?::-([^}]*))?\}?")
_OPTION = re.compile(r"--[a-z][a-z0-9_-]*\Z")
_BOUNDS = re.compile(r"[()\[\]]")
NEGATED = {"no_position_embedding": "add_position_embedding", "no_rope_fusion": "apply_rope_fusion",
           "no_masked_softmax_fusion": "masked_softmax_fusion",
           "no_async_tensor_model_parallel_allreduce": "",
           "no_bias_swiglu_fusion": "bias_swiglu_fusion", "no_gradient_accumulation_fusion": ""}
SPELLED = {"fp8_format": "fp8"}
"""Arguments whose place in the Namespace is called otherwise."""
LISTS = ("data_path", "train_data_path", "valid_data_path", "rampup_batch_size", "recompute_modules",
         "moe_aux_loss_coeff", "moe_router_load_balancing_type")


@dataclass
class Arguments:
    """What a text says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Name, as in Megatron-LM's Namespace -> value; True where the option stands alone."""
    unresolved: dict[str, str] = field(default_factory=dict)
    """Name -> a value with a variable that the text does not set."""


def read_arguments(text: str) -> Arguments:
    """Return the arguments in a command line or shell script.

    Comments are passed over, lines that end in a backslash joined, and variables put in that the text itself
    sets to a plain value (or that have a default); nothing is run.
    """
    plain = text[:MAX_CHARS].replace("\\\n", " ")
    variables = {name: value.strip("\"'") for name, value in _ASSIGNED.findall(plain)}
    words = [word for line in plain.splitlines() for word in _words(line)]
    found = Arguments()
    name, given = "", list[str]()
    for word in [*words, "--end"]:
        if not _OPTION.match(word):
            given.append(word)
            continue
        if name:
            _enter(found, name, [_put_in(value, variables) for value in given])
        name, given = word[2:].replace("-", "_"), []
    return found


def _words(line: str) -> list[str]:
    """Return the words of a line; an option quoted with its value ("--split '99,1,0'") is several."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split("#")[0].split()
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if " " in word and (word.startswith("--") or value.lstrip().startswith("--")):
            # an option quoted with its value, or a variable of options: GPT_ARGS="--num-layers 32 ..."
            found += _words(word) if word.startswith("--") else [*_words(value.strip()), "--end"]
        elif _OPTION.match(option) and equals:
            found += [option, value]
        elif word in ("(", ")", ";", "\\", "&&", "|") or re.match(r"\w+\+?=\(", word):
            found.append("--end")
        else:
            found.append(word if word.startswith(("[", "(")) else word.rstrip(")"))
    # what stands behind the last option of a line that does not go on is another command's
    return [*found, "--end"] if found and not found[0].startswith("-") and "--" not in line else found


def _put_in(value: str, variables: dict[str, str]) -> str:
    for _ in range(4):
        value = _VARIABLE.sub(lambda m: variables.get(m[1], m[2] if m[2] is not None else m[0]), value)
    return value


def _enter(found: Arguments, name: str, given: list[str]) -> None:
    if name == "end":
        return
    name = SPELLED.get(name, name)
    if name in NEGATED:
        found.values[NEGATED[name] or name] = not NEGATED[name]
        return
    values = [value for value in given if value]
    if any("$" in value for value in values):
        found.unresolved[name] = " ".join(values)
    elif not values:
        found.values[name] = True
    elif name in LISTS and (len(values) > 1 or name.endswith("data_path")):
        found.values[name] = [_value(value) for value in values]
    else:
        found.values[name] = _value(values[0])


def _value(text: str) -> Any:
    """Return a number where a text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)

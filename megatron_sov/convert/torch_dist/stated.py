"""The settings that a checkpoint of Megatron-LM carries: the `args` in its `common.pt`."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from megatron_sov.convert.torch_dist import allowed
from megatron_sov.convert.torch_dist.inert import Items, Made, Name, fields, read, text_keys

MAX_PICKLE_BYTES = 256 << 20
MAX_VALUES = 200_000
"""Of all settings together, lists counted out."""
MAX_DEPTH = 6


def read_settings(raw: bytes) -> dict[str, Any]:
    """Return `args` and `iteration` of a common.pt as JSON values; what is none is told as text.

    Raises:
        ValueError: it is no file of torch.save, or holds names that settings do not have.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            names = [name for name in file.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1:
                raise ValueError("it has no data.pkl, so torch.save did not write it")
            info = file.getinfo(names[0])
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its data.pkl is compressed, or larger than {MAX_PICKLE_BYTES} bytes")
            top = text_keys(read(file.read(info), allowed.in_settings))
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as e:
        raise ValueError(f"it is no file of torch.save ({e})") from None
    plain = _Plain()
    args = fields(top["args"], allowed.NAMESPACE) if "args" in top else {}
    return {"args": {name: plain.value(value, 0) for name, value in args.items()},
            "iteration": plain.value(top.get("iteration"), 0)}


class _Plain:
    """Turns values into JSON ones, and counts them."""

    def __init__(self) -> None:
        self._num_values = 0

    def value(self, value: Any, depth: int) -> Any:
        """Return a JSON value; ValueError where there are too many."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError("its settings hold more values than settings have")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Name):
            return str(value).removeprefix("torch.")
        if isinstance(value, Items):
            return {str(key): self.value(item, depth + 1) for key, item in value
                    if isinstance(key, (str, int, float, bool))}
        if isinstance(value, (list, tuple)):
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, Made):  # an enumeration's member, a path, a duration
            return {"class": str(value.name), "of": self.value(value.arguments, depth + 1)}
        return f"<{type(value).__name__}>"

"""What a network that another's settings describe may reserve while it is made."""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MAX_ELEMENTS = 1 << 29
"""Of all tensors together: 2 GiB in float32, several times what published codecs have."""
MAX_TENSORS = 100_000


class Bounded(TorchDispatchMode):
    """While it is entered, tensors beyond the bounds raise `MemoryError` before they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        """What was asked for, where it was too much: what made the network may have told it otherwise."""
        self._num_elements = self._num_tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Count what an operation makes that begins with sizes (`empty`, `zeros`, ...) or a range."""
        asked = args[0] if args else None
        if isinstance(asked, (list, tuple)) and asked and all(isinstance(n, int) for n in asked):
            self._num_elements += math.prod(asked)
            self._num_tensors += 1
        elif isinstance(asked, (int, float)):
            self._num_elements += int(max(abs(n) for n in args if isinstance(n, (int, float))))
        if self._num_elements > MAX_ELEMENTS or self._num_tensors > MAX_TENSORS:
            self.problem = (f"asks for {self._num_elements:,} numbers in {self._num_tensors:,} tensors, and "
                            f"at most {MAX_ELEMENTS:,} in {MAX_TENSORS:,} are reserved")
            raise MemoryError(self.problem)
        return func(*args, **kwargs or {})

"""Compile functions over arrays with numba at the first call.

Machine code is cached next to the source or in the user's cache folder; if neither is writable, every process
compiles again. The cache is keyed by the function's own file, so a compiled function may call only functions
of that file.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def jit_compile(function: Function) -> Function:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no writable cache folder
        return numba.njit(nogil=True)(function)

"""Loops over bytes and places, compiled by numba as they are first called.

The machine code is kept beside the source, or else in the user's cache folder, and compiled anew in every
process where neither can be written.  What is kept is known again by the file of the function alone, so a
compiled function calls only those of its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba's word for: no place to keep it
        return numba.njit(nogil=True)(function)

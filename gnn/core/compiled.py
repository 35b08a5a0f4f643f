"""Compiled loops, with their machine code kept between runs where there is a place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, **options)`; without the cache where neither the package's folder nor the home can be
    written, as in many containers: each run then compiles anew, for some seconds.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder
            return numba.njit(**options)(function)

    return decorate

"""Errors that tell little of what to do, in other words: memory that runs out, a compiler that is missing."""

from __future__ import annotations

import errno

from common.config import BaseConfig, flatten

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")
HEAVY = ("microbatch", "batch_size", "rollout", "count")  # last words of settings that memory grows with
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")  # packages behind torch.compile


def remedy(error: BaseException, arguments: tuple[object, ...]) -> str:
    """What a person can do about an error, to stand before it; empty where nothing is known.

    Args:
        arguments: of the program's main function; a config among them tells which settings there are.
    """
    config = next((item for item in arguments if isinstance(item, BaseConfig)), None)
    if is_out_of_memory(error):
        keys = [] if config is None else [key for key in flatten(config) if key.rsplit(".")[-1] in HEAVY]
        smaller = f", try a smaller {', '.join(keys)} or model" if keys else ""
        return f"out of memory{smaller}: "
    if config is not None and config.compile and type(error).__module__.startswith(COMPILERS):
        return "torch.compile does not work here: set compile=false, or install a C++ compiler (gcc or clang): "
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says, in whichever library's words, that there is no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)

"""For every test: one thread, no network needed, and nothing that an in-process training run leaves behind."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import signal

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _process_state():
    """A `Run` installs signal handlers and sets the default dtype; the next test must not see them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_default_dtype(torch.float32)

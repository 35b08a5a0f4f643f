"""For every test: one thread, no network needed, and nothing that an in-process training run leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
os.environ["GRPC_VERBOSITY"] = "NONE"  # its threads outlive a test and would write into what another one reads
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes must not write one cache of compiled loops
    caches = Path(__file__).resolve().parent.parent / ".cache"
    os.environ.setdefault("NUMBA_CACHE_DIR", str(caches / f"numba-{os.environ['PYTEST_XDIST_WORKER']}"))

import signal

import pytest
import torch

from tests.helpers import stop_in_step, tiny, train

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background ignores Ctrl-C, and so would programs
    signal.signal(signal.SIGINT, signal.default_int_handler)
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With pytest-xdist the tests of a file stay together, for they share fixtures; those that measure time form a
    group across the files, so that no two of them run side by side.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(autouse=True)
def _process_state():
    """A `Run` installs signal handlers and sets the default dtype; the next test must not see them."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a tiny run from its first step to its last."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(run_dir)) == 0
    return run_dir


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run stopped after step 3, and its folder."""
    with monkeypatch.context() as context:
        stop_in_step(context, 3)
        assert train(tiny(tmp_path / "run")) == 143
    return tmp_path / "run"

"""One small base for all tests."""

from __future__ import annotations

import pytest

from tests.lora.small import train, write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a small model; nothing may be written there."""
    return write_base(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """The folder of a finished run of four steps; nothing may be written there."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert train(base, run_dir, "train.lr=0.01") == 0
    return run_dir

"""1, 2 and 4 processes have the loss and the gradients of one process that sees the whole batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from clip.contrastive import contrastive_loss
from tests.clip import small
from tests.clip.gathered import LOSSES, WAYS, WORLDS
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    # `tests` said to be ours, for other packages bring one of that name
    code = f"""
import sys, types
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [{str(ROOT / "tests")!r}]
from tests.clip import gathered
gathered.main({str(folder)!r})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_processes_equal_one(folder, loss_name: str, way: str) -> None:
    model = small.build(loss=loss_name)
    images, ids, image_ids, text_ids = small.batch(8, captions=1 if way == "pairs" else 2)
    image_ids[6] = image_ids[3]
    text_ids[text_ids == 6] = 3
    output = model(images, ids)
    loss = contrastive_loss(output) if way == "pairs" else contrastive_loss(output, image_ids, text_ids)
    loss.backward()
    expected = {"loss": loss.detach(), **small.gradients(model)}
    for world in WORLDS:
        found = torch.load(folder / f"{world}_{loss_name}_{way}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)

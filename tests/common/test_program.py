"""Networks as files: what comes out is what the network gives, no code is needed but `common/program.py`, and a file
can do nothing but compute.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.checkpoint import export_weights, read_weights
from common.errors import ProjectError
from common.program import OPERATIONS, find_operation, load_program, save_program
from tests.helpers import ROOT, environment


class Net(nn.Module):
    """Convolutions, a residual, a split and a mean: what decoders are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.unused = nn.Linear(3, 5)
        self.register_buffer("shift", torch.tensor(0.25))
        self.start = nn.Parameter(torch.randn(3))

    def forward(self, z):
        z = z + self.start.expand(z.shape[0], -1)
        h = nn.functional.silu(self.first(z)).unflatten(1, (4, 2, 2))
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        a, b = self.second(h).split((4, 4), 1)
        return torch.sigmoid(nn.functional.pixel_shuffle(a + b, 2)[:, :, :3] + self.shift).clamp(0, 0.9)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A file, and the network that it was made from."""
    torch.manual_seed(0)
    net = Net().eval()
    path = tmp_path_factory.mktemp("program") / "net.safetensors"
    save_program(path, net, torch.zeros(2, 3), {"who": "a test"})
    return path, net


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_file_computes_what_the_network_does(program, count):
    path, net = program
    loaded = load_program(path)
    z = torch.randn(count, 3)
    assert torch.equal(loaded(z), net(z))
    assert loaded.input_shape == (3,)
    assert loaded.output_shape == (1, 3, 4)
    assert loaded.facts["who"] == "a test"
    assert not any("unused" in name for name in loaded.weights), "what is not computed with is not stored"


def test_results_are_let_go(program):
    """Each result is dropped right after its last use, and the output is not."""
    loaded = load_program(program[0])
    made = [name for name, *_ in loaded.steps]
    dropped = [name for names in loaded.done for name in names]
    assert len(dropped) == len(set(dropped))
    assert set(made) - set(dropped) == {loaded.output}


def test_another_shape(program):
    with pytest.raises(ValueError, match=r"reads \(B, 3\), not \(2, 4\)"):
        load_program(program[0])(torch.zeros(2, 4))


def test_what_cannot_be_recorded(tmp_path):
    class Odd(nn.Module):
        def forward(self, z):
            return torch.erf(z)

    with pytest.raises(ProjectError, match="may not use aten"):
        save_program(tmp_path / "odd", Odd(), torch.zeros(2, 3), {})
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    "name", ["aten.from_file.default", "os.system", "aten.add.out", "torch.load", "aten.__class__."]
)
def test_only_harmless_operations(name):
    with pytest.raises(ProjectError, match="may not use"):
        find_operation(name)


def test_every_operation_exists():
    for name in sorted(OPERATIONS):
        assert callable(find_operation(f"aten.{name}"))


def change(path, target, alter):
    """The file with another graph, its hash made good."""
    weights, facts = read_weights(path)
    graph = json.loads(facts["program"])
    alter(graph)
    del facts["sha256"]
    export_weights(target, weights, facts | {"program": json.dumps(graph)})
    return target


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (lambda graph: graph["nodes"][0].update(op="aten.from_file.default"), "may not use aten.from_file"),
        (lambda graph: graph.pop("nodes"), "no program that can be read"),
        (lambda graph: graph["nodes"].pop(0), "which nothing makes"),
        (lambda graph: graph.update(output="nowhere"), "nothing makes nowhere"),
        (lambda graph: graph.update(input_shape="x"), "no program that can be read"),
    ],
)
def test_bad_programs(program, tmp_path, alter, says):
    with pytest.raises(ProjectError, match=says):
        load_program(change(program[0], tmp_path / "bad.safetensors", alter))


def test_damage(program, tmp_path):
    with pytest.raises(ProjectError, match="cannot be read"):
        load_program(tmp_path / "absent")
    weights, facts = read_weights(program[0])
    save_file(weights, tmp_path / "graph", facts | {"program": facts["program"].replace("silu", "relu")})
    with pytest.raises(ProjectError, match="damaged"):
        load_program(tmp_path / "graph")
    save_file(weights, tmp_path / "plain")
    with pytest.raises(ProjectError, match="no program"):
        load_program(tmp_path / "plain")
    del facts["sha256"]
    export_weights(tmp_path / "newer", weights, facts | {"program_format": "9"})
    with pytest.raises(ProjectError, match="format 9"):
        load_program(tmp_path / "newer")
    other = {name: value + 1 for name, value in load_file(program[0]).items()}
    save_file(other, tmp_path / "weights", read_weights(program[0])[1])
    with pytest.raises(ProjectError, match="damaged"):
        load_program(tmp_path / "weights")


def test_no_project_is_needed(program, tmp_path):
    """In a process that can import nothing of ours but `common`."""
    path, net = program
    z = torch.randn(5, 3)
    save_file({"z": z, "x": net(z)}, tmp_path / "case")
    code = f"""
import sys
for name in ("vae", "diffusion", "clip", "gnn", "ppo", "tests"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
from common.program import load_program
case = load_file({str(tmp_path / "case")!r})
assert torch.equal(load_program({str(path)!r})(case["z"]), case["x"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr

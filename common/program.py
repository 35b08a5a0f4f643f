"""Networks as files that run without the code they were written in: one project writes a decoder, another runs it.

A program is a safetensors file. Its tensors are the weights; among its metadata is the list of tensor operations that
`torch.export` has recorded, as JSON. Why not PyTorch's own file of such a program: `torch.export.load` unpickles what
it finds in it, so that a file from somebody else could do anything. Here only the operations below are carried out, and
none of them touches anything but tensors.

Legend: B batch, of any size when the program runs.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import export_weights, read_weights
from common.errors import ProjectError

FORMAT = "1"
# checks by the recorder, and what it has worked out already
SKIPPED = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.promote_types.default")
# what decoders consist of; all are functions of their arguments alone. (`aten` as a whole is not: it can map files)
# fmt: off
OPERATIONS = frozenset((
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg.default", "exp.default", "log.default",
    "sqrt.default", "clamp.default", "clamp_min.default", "clamp_max.default", "sum.dim_IntList", "mean.dim",
    "linear.default", "conv2d.default", "matmul.default", "addmm.default", "mm.default", "relu.default",
    "tanh.default", "silu.default", "gelu.default", "sigmoid.default", "softplus.default", "dropout.default",
    "softmax.int", "log_softmax.int", "layer_norm.default", "group_norm.default", "reshape.default", "view.default",
    "flatten.using_ints", "unflatten.int", "expand.default", "permute.default", "transpose.int", "squeeze.dim",
    "unsqueeze.default", "select.int", "slice.Tensor", "split.Tensor", "split_with_sizes.default", "chunk.default",
    "stack.default", "cat.default", "contiguous.default", "to.dtype", "pixel_shuffle.default",
    "upsample_nearest2d.vec", "sym_size.int",
))
# fmt: on
NUMBERS: dict[str, Callable[..., Any]] = {  # of sizes, and of what an operation with several results returns
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class Program:
    """A network from a file.

    Attributes:
        facts: what its writer said of it.
        input_shape, output_shape: of one example, without the batch.
    """

    def __init__(self, weights: dict[str, Tensor], graph: dict[str, Any], facts: dict[str, str]) -> None:
        self.weights = weights
        self.facts = facts
        self.input_shape = tuple(int(size) for size in graph["input_shape"])
        self.output_shape = tuple(int(size) for size in graph["output_shape"])
        self.input = str(graph["input"])
        self.output = str(graph["output"])
        self.steps = [
            (str(node["name"]), find_operation(node["op"]), node["args"], node["kwargs"]) for node in graph["nodes"]
        ]
        known = {*weights, self.input}
        for name, _, args, kwargs in self.steps:
            if missing := set(references([args, kwargs])) - known:
                raise ValueError(f"{name} asks for {sorted(missing)[0]}, which nothing makes")
            known.add(name)
        if self.output not in known:
            raise ValueError(f"nothing makes {self.output}")
        last = {name: i for i, (_, _, args, kwargs) in enumerate(self.steps) for name in references([args, kwargs])}
        # after each step, the results that no later one asks for: memory is that of a network, not of all its layers
        self.done: list[list[str]] = [[] for _ in self.steps]
        for name, i in last.items():
            if name != self.output and name not in weights:
                self.done[i].append(name)

    def to(self, device: torch.device) -> Program:
        """The same program, its weights on another device; returns itself."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, *output_shape), in float32. `ValueError` for another shape."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"the program reads (B, {shown(self.input_shape)}), not {tuple(x.shape)}")
        values: dict[str, Any] = {**self.weights, self.input: x.float()}
        for (name, operation, args, kwargs), done in zip(self.steps, self.done, strict=True):
            values[name] = operation(*decode(args, values), **decode(kwargs, values))
            for old in done:
                del values[old]
        return values[self.output]


def save_program(path: Path, network: nn.Module, example: Tensor, facts: dict[str, str]) -> None:
    """Record what a network does to one tensor, and write that with its weights, whole or not at all.

    Args:
        network: in evaluation mode, in float32 on the CPU; whatever it decides by an input's values is decided by the
            example's.
        example: (B, ...) with B at least 2; the program takes any B.
        facts: plain text that goes into the file.
    Raises:
        ProjectError: the network does something that is not in `OPERATIONS`.
    """
    batch = torch.export.Dim("batch", min=1)
    recorded = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    signature = recorded.graph_signature
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owned |= signature.inputs_to_lifted_tensor_constants
    stored = {**recorded.state_dict, **recorded.constants}
    nodes = []
    for node in recorded.graph.nodes:
        if node.op != "call_function" or str(node.target) in SKIPPED:
            continue
        name = node.target.__name__ if node.target in NUMBERS.values() else str(node.target)
        find_operation(name)
        nodes.append({"name": node.name, "op": name, "args": encode(node.args), "kwargs": encode(node.kwargs)})
    (result,) = recorded.graph.output_node().args[0]
    graph = {
        "input": signature.user_inputs[0],
        "output": result.name,
        "input_shape": list(example.shape[1:]),
        "output_shape": list(result.meta["val"].shape[1:]),
        "nodes": nodes,
    }
    used = set(references([node["args"] for node in nodes] + [node["kwargs"] for node in nodes]))
    weights = {name: stored[target] for name, target in owned.items() if name in used}
    export_weights(path, weights, facts | {"program": json.dumps(graph), "program_format": FORMAT})


def load_program(path: Path) -> Program:
    """A program from its file. `ProjectError` for one that is missing, damaged or not such a file."""
    weights, facts = read_weights(path)
    text = facts.pop("program", "")
    if not text:
        raise ProjectError(f"{path} holds no program; give the decoder that vae.encode has written")
    if facts.get("program_format") != FORMAT:
        raise ProjectError(f"{path} is a program in format {facts.get('program_format')}, not {FORMAT}; write it anew")
    try:
        return Program(weights, json.loads(text), facts)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ProjectError(f"{path} is no program that can be read: {type(error).__name__} {error}") from None


def find_operation(name: str) -> Callable[..., Any]:
    """The function of that name. `ProjectError` for one that is not known to be harmless."""
    if name in NUMBERS:
        return NUMBERS[name]
    known, _, overload = name.removeprefix("aten.").partition(".")
    if not name.startswith("aten.") or f"{known}.{overload}" not in OPERATIONS:
        raise ProjectError(f"a program may not use {name[:80]}; the operations it may use are in common/program.py")
    return getattr(getattr(torch.ops.aten, known), overload)


def encode(value: Any) -> Any:
    """Arguments of a recorded operation in JSON types: {"of": name} is the result of another."""
    if isinstance(value, torch.fx.Node):
        return {"of": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"map": {name: encode(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ProjectError(f"a program cannot hold an argument of type {type(value).__name__}")


def decode(value: Any, values: dict[str, Any]) -> Any:
    """The inverse of `encode`, given the results so far."""
    if isinstance(value, list):
        return [decode(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    if "of" in value:
        return values[value["of"]]
    if "dtype" in value:
        return DTYPES[value["dtype"]]
    return {name: decode(item, values) for name, item in value["map"].items()}


def references(value: Any) -> list[str]:
    """Names of the results that encoded arguments refer to."""
    if isinstance(value, list):
        return [name for item in value for name in references(item)]
    if not isinstance(value, dict):
        return []
    return [value["of"]] if "of" in value else references(list(value.get("map", {}).values()))


def shown(shape: tuple[int, ...]) -> str:
    """A shape without its brackets."""
    return ", ".join(map(str, shape))

"""Many adapters on one base: each row of a batch has its own (`router.py` chooses it by the prompt).

Of n adapters every layer keeps A and B in two stacked tensors. The rows of a batch pick theirs by index, and two
batched products do the rest, however many adapters take part:

    y[i] = W x[i] + B[k_i] A[k_i] x[i]        k_i: the adapter of row i; 0 is the base, whose A and B are zero

(The idea of Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023, in plain PyTorch.) s is in B already, and so is
DoRA's m / |W + s B A|, a constant when nothing learns. Smaller ranks are padded with zeros, which add nothing.

For answers, not for training.

Legend: N rows, T positions, r the largest rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ProjectError
from lora.adapters.files import SavedAdapter, check_fit, read_adapter
from lora.adapters.layers import LinearLoRA, LoRALayer, Wrapper
from lora.adapters.targets import kind_of

BASE = "base"  # the name that rows without an adapter have


@dataclass
class Rows:
    """Which adapter each row of the batch uses: one object that all layers of a model look at."""

    index: Tensor | None = None  # (N,) int64; None: all rows use the base


class MultiLinear(Wrapper):
    """A frozen linear layer with many updates. (N, ..., in) -> (N, ..., out)

    Attributes:
        a: (slots, in, r); slot 0 is the base.
        b: (slots, r, out).
        change: (slots, out), DoRA's m / |W + s B A| - 1; None while no adapter has it.
    """

    def __init__(self, base: Any, rows: Rows, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        (_, inputs), (outputs, _) = layer_kind(base).shapes(base, 0)
        self.a = torch.zeros(slots, inputs, 0, dtype=dtype, device=device)
        self.b = torch.zeros(slots, 0, outputs, dtype=dtype, device=device)
        self.change: Tensor | None = None
        self.chosen: tuple[Tensor, ...] | None = None  # what the rows picked, until they or the adapters change

    def resize(self, slots: int, rank: int) -> None:
        """Make room; what is there stays."""
        more, wider = max(0, slots - len(self.a)), max(0, rank - self.a.shape[2])
        self.a = F.pad(self.a, (0, wider, 0, 0, 0, more))
        self.b = F.pad(self.b, (0, 0, 0, wider, 0, more))
        if self.change is not None:
            self.change = F.pad(self.change, (0, 0, 0, more))

    def put(self, slot: int, layer: LoRALayer | None) -> None:
        """Take over an adapter's numbers, or clear its place."""
        self.chosen = None
        for stacked in (self.a, self.b, self.change):
            if stacked is not None:
                stacked[slot] = 0
        if layer is None:
            return
        rank = layer.config.rank
        self.resize(len(self.a), rank)
        scaled = layer.scaling * layer.lora_B
        if layer.lora_magnitude is not None:
            gain = layer.gain()
            scaled = gain[:, None] * scaled
            if self.change is None:
                self.change = self.b.new_zeros(len(self.b), self.b.shape[2])
            self.change[slot] = gain - 1
        self.a[slot, :, :rank] = layer.lora_A.T
        self.b[slot, :rank] = scaled.T

    def pick(self, index: Tensor) -> tuple[Tensor, ...]:
        """A and B (and `change`) of each row; without a copy where the rows use all slots in order."""
        stacks = (self.a, self.b) if self.change is None else (self.a, self.b, self.change)
        first = int(index[0])
        if torch.equal(index, torch.arange(first, first + len(index), device=index.device)):
            return tuple(stacked[first : first + len(index)] for stacked in stacks)
        return tuple(stacked[index] for stacked in stacks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        index = self.rows.index
        if index is None:
            return y
        if len(x) != len(index):
            raise ProjectError(f"adapters are named for {len(index)} rows, and the batch has {len(x)}")
        if self.chosen is None:
            self.chosen = self.pick(index)
        a, b, *change = self.chosen
        flat = y.reshape(len(y), -1, y.shape[-1])  # (N, T, out)
        hidden = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(a.dtype), a)  # (N, T, r)
        result = torch.baddbmm(flat.to(a.dtype), hidden, b)
        if change:
            bias = getattr(self.base, "bias", None)
            result += change[0][:, None] * (flat if bias is None else flat - bias)
        return result.view(y.shape).to(y.dtype)


def layer_kind(base: nn.Module) -> type[LinearLoRA]:
    """The adapter of a linear layer. `ProjectError` for another kind of layer."""
    kind = kind_of(base)
    if kind is None or not issubclass(kind, LinearLoRA):
        raise ProjectError(f"many adapters at once need linear layers, not {type(base).__name__}")
    return kind


class Bank:
    """A base model with adapters by name, any of which answers any row.

        bank = Bank(model)
        bank.add("sql", "runs/sql/adapter")
        with bank.use(["sql", "base"]):
            model(two_rows)

    Args:
        model: the frozen base; its linear layers are wrapped in place as adapters need them.
        dtype: of the stacked adapters and of their products; the base's by default.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        if any(isinstance(module, Wrapper) for module in model.modules()):
            raise ProjectError("the model has adapters already: merge and unload them first, or load the base anew")
        self.model = model.requires_grad_(False)
        first = next(model.parameters())
        self.dtype = dtype or first.dtype
        self.device = first.device
        self.rows = Rows()
        self.layers: dict[str, MultiLinear] = {}
        self.slots: list[str | None] = [BASE]  # the name in each place

    @property
    def names(self) -> list[str]:
        """Of the adapters that are there."""
        return [name for name in self.slots[1:] if name is not None]

    @torch.no_grad()
    def add(self, name: str, adapter: SavedAdapter | Path | str, check_base: bool = True) -> None:
        """Make an adapter available, also between two batches.

        Raises:
            ProjectError: the name is taken, or the adapter is for another base, or is more than linear layers.
        """
        saved = adapter if isinstance(adapter, SavedAdapter) else read_adapter(Path(adapter))
        if name in self.slots:
            raise ProjectError(f"there is an adapter named {name} already: remove it first, or choose another name")
        check_fit(self.model, saved, check_base)
        if saved.head or any(settings.init == "pissa" for settings in saved.settings.values()):
            raise ProjectError(f"{saved.folder} changes more of its base than an update adds: it cannot share the base")
        bases = {layer: self.base_of(layer) for layer in saved.settings}
        built = {layer: as_layer(base, layer, saved) for layer, base in bases.items()}
        if None not in self.slots:
            self.slots += [None] * len(self.slots)  # twice the room, so that many additions copy little
        slot = self.slots.index(None)
        for layer in built:
            if layer not in self.layers:
                self.layers[layer] = MultiLinear(bases[layer], self.rows, len(self.slots), self.dtype, self.device)
                self.model.set_submodule(layer, self.layers[layer])
        for layer, stacked in self.layers.items():
            stacked.resize(len(self.slots), 0)
            stacked.put(slot, built.get(layer))
        self.slots[slot] = name

    def base_of(self, name: str) -> nn.Module:
        """The frozen layer of a name. `ProjectError` if it is no linear one."""
        module = self.model.get_submodule(name)
        base = module.base if isinstance(module, Wrapper) else module
        layer_kind(base)
        return base

    def remove(self, name: str) -> None:
        """Forget an adapter; its place is free for another. `ProjectError` for an unknown name."""
        slot = self.slot_of(name)
        if slot == 0:
            raise ProjectError("the base cannot be removed")
        for layer in self.layers.values():
            layer.put(slot, None)
        self.slots[slot] = None

    def slot_of(self, name: str) -> int:
        """Where an adapter is. `ProjectError`, with the names there are, for an unknown one."""
        if name not in self.slots:
            raise ProjectError(f"no adapter is named {name}; there are: {', '.join([BASE, *self.names])}")
        return self.slots.index(name)

    @contextlib.contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, row i of every batch is answered by the adapter `names[i]`, or by the base where that is "base"."""
        slots = [self.slot_of(name) for name in names]
        before = self.rows.index
        self.choose(torch.tensor(slots, device=self.device) if any(slots) else None)
        try:
            yield
        finally:
            self.choose(before)

    def follow(self, rows: Tensor) -> None:
        """The batch goes on with these of its rows only, in this order."""
        if self.rows.index is not None:
            self.choose(self.rows.index[rows])

    def choose(self, index: Tensor | None) -> None:
        """Point all layers at these slots, one a row."""
        self.rows.index = index
        for layer in self.layers.values():
            layer.chosen = None

    def close(self) -> None:
        """Give the model its own layers back."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)
        self.layers = {}
        self.slots = [BASE]


def as_layer(base: Any, name: str, saved: SavedAdapter) -> LoRALayer:
    """One layer's adapter with the saved numbers, not a part of the model."""
    layer = layer_kind(base)(base, saved.settings[name], torch.Generator())
    for part in ("lora_A", "lora_B", "lora_magnitude"):
        if f"{name}.{part}" in saved.tensors:
            getattr(layer, part).copy_(saved.tensors[f"{name}.{part}"])
    return layer

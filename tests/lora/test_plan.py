"""The plan of the memory against what training steps of small models are measured to take."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config import resolve
from lora.adapters.inject import parameter_groups
from lora.adapters.quantize import quantize_model
from lora.config import Config
from lora.data import Tokens, collate
from lora.loss import TuningLoss
from lora.model import Llama, LlamaShape, initialise, set_checkpointing
from lora.plan import KNOWN, Plan, base_bytes, make_plan, remarks, skeleton
from lora.settings import AdapterConfig
from lora.tuning import build_optimizer, prepare
from lora.tuning.base import Base
from tests.lora.small import config_of

# wide enough for activations to weigh as much as the weights
SHAPE = LlamaShape(
    vocab_size=2048, width=128, layers=3, heads=4, kv_heads=2, head_width=32, mlp_width=352, context=512, tied=True
)
CASES = {
    "all layers": [],
    "checkpointing": ["train.checkpointing=true"],
    "queries and values, rank 2": ["adapter.targets=[q_proj,v_proj]", "adapter.rank=2"],
    "one row at once": ["train.microbatch=1"],
    "packed": ["data.pack=true"],
    "dropout": ["adapter.dropout=0.1"],
    "4 bits": ["model.quantize=nf4"],
    "bfloat16": ["precision=bf16"],
    "long chunks": ["train.loss_chunk=4096"],
    "large rank": ["adapter.rank=64"],
    "large rank in parts": ["adapter.rank=64", "train.microbatch=1"],
    "large rank in bfloat16": ["adapter.rank=64", "precision=bf16"],
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from when they are made until nothing holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.alive.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def measured(config: Config) -> int:
    """Peak bytes of the second of two training steps: parameters, gradients, moments, activations, everything."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = Llama(SHAPE)
    initialise(model, 0)
    model.to(dtype).requires_grad_(False)
    if config.model.quantize == "nf4":
        quantize_model(model)
    model.tie()
    prepare(Base(model, None, None, dtype), config)
    if config.train.checkpointing:
        set_checkpointing(model)
    model.train()
    optimizer = build_optimizer(parameter_groups(model, 1e-3, config.adapter), config.train)
    length = config.data.max_length
    example = Tokens([5], [6] * (length // 4 - 1))  # a plan is for the worst case: every token has a label
    rows = [[example] * 4] * config.train.batch_size
    if not config.data.pack:
        rows = [[Tokens([5], [6] * (length - 1))]] * config.train.batch_size
    objective = TuningLoss(model, config.train.loss, config.train.loss_chunk)
    with LiveBytes() as live:
        for tensor in [*model.parameters(), *model.buffers()]:
            live.add(tensor)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            size = config.train.microbatch or len(rows)
            for start in range(0, len(rows), size):
                objective(collate(rows[start : start + size], length)).backward()
            optimizer.step()
    return live.peak


def planned(tmp_path, monkeypatch, *words: str) -> tuple[Plan, Config]:
    from lora.model.files import settings_of

    monkeypatch.setitem(KNOWN, "test/model", settings_of(SHAPE))
    words = ("model.name=test/model", "data.max_length=256", "train.batch_size=4", "data.pack=false", *words)
    config = config_of("test/model", tmp_path, *words)
    return make_plan(config), config


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_the_plan_is_what_is_measured(words, tmp_path, monkeypatch):
    plan, config = planned(tmp_path, monkeypatch, *words)
    assert plan.exact
    assert plan.peak == pytest.approx(measured(config), rel=0.05)


def test_weights_in_four_bits_are_counted_to_the_byte(tmp_path, monkeypatch):
    for words in (["model.quantize=nf4"], ["model.quantize=nf4", "model.double_quant=false"]):
        plan, config = planned(tmp_path, monkeypatch, *words)
        model = Llama(SHAPE)
        quantize_model(model, config.model.double_quant)
        model.tie()
        own = {id(p): p for p in [*model.parameters(), *model.buffers()]}.values()
        held = sum(tensor.numel() * tensor.element_size() for tensor in own)
        assert plan.base == pytest.approx(held, abs=200)  # each layer's one offset


def test_parts_follow_the_settings(tmp_path, monkeypatch):
    plain, _ = planned(tmp_path, monkeypatch)
    eight, _ = planned(tmp_path, monkeypatch, "train.optimizer=adamw8bit")
    assert eight.optimizer == plain.optimizer / 4
    double, _ = planned(tmp_path, monkeypatch, "adapter.rank=8")
    assert double.adapters == 2 * plain.adapters
    dora, _ = planned(tmp_path, monkeypatch, "adapter.dora=true")
    rows = SHAPE.layers * (2 * 128 + 2 * 64 + 2 * 352 + 128)  # q, o, k, v, gate, up, down
    assert dora.adapters - plain.adapters == 4 * rows
    full, _ = planned(tmp_path, monkeypatch, "train.method=full")
    assert full.gradients == 4 * sum(p.numel() for p in Llama(SHAPE).parameters())
    assert full.adapters == 0


def test_a_7b_model_in_four_bits_fits_where_it_is_known_to():
    """QLoRA (Dettmers et al. 2023): 7B in about 5 GB of weights; LLaMA's 6.74 billion parameters."""
    config = resolve(
        Config,
        None,
        [
            "model.name=meta-llama/Llama-2-7b-hf",
            "model.quantize=nf4",
            "device=cpu",
            "precision=bf16",
            "train.checkpointing=true",
            "train.microbatch=1",
        ],
    )
    model = skeleton(KNOWN["meta-llama/Llama-2-7b-hf"], config)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    weights = base_bytes(model, config, 2) / 2**30
    assert 3.3 < weights < 4.0
    plan = make_plan(config)
    small = replace(config, plan=replace(config.plan, device_memory=4.0))
    assert any("does not fit" in line for line in remarks(plan, small))
    large = replace(config, plan=replace(config.plan, device_memory=12.0))
    assert any("fits into 12 GiB" in line for line in remarks(plan, large))


def test_the_program_needs_no_weights(capsys, tmp_path):
    from common.config import load
    from lora.plan import main
    from tests.helpers import status

    path = tmp_path / "c.yaml"
    path.write_text("model:\n  name: mistralai/Mistral-7B-v0.3\n  quantize: nf4\n")
    words = ["--config", str(path), "--device-memory", "8", "device=cpu"]
    short = {"device-memory": "plan.device_memory"}
    config, options = load(Config, "lora", "plan", words, short=short, takes="config")
    assert status(main, config, options) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["base"] > 3.5 * 2**30
    assert "8 GiB" in out


def test_other_architectures_are_estimated_and_said():
    config = resolve(Config, None, ["model.name=openai-community/gpt2-medium", "model.code=transformers", "device=cpu"])
    plan = make_plan(config)
    assert not plan.exact
    assert 354e6 * 2 <= plan.base <= 356e6 * 4
    assert any("estimate" in line for line in remarks(plan, config))


def test_adapters_of_gpt2_are_counted(tmp_path):
    config = replace(
        resolve(Config, None, ["model.name=openai-community/gpt2-medium", "model.code=transformers", "device=cpu"]),
        adapter=AdapterConfig(rank=4, targets=("c_attn",)),
    )
    assert make_plan(config).adapters == 4 * 24 * 4 * (1024 + 3072)

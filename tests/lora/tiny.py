"""Tiny models, and peft's adapters with the same numbers as ours."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora.adapters.inject import adapters_of, inject
from lora.adapters.layers import EmbeddingLoRA
from lora.settings import AdapterConfig

VOCABULARY = 64


def tiny_llama(tied: bool = False, seed: int = 0, hidden: int = 64) -> nn.Module:
    """Two layers, grouped-query attention, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


class TinyConv(nn.Module):
    """A convolution with stride, padding and dilation, then the mean of each channel."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.conv(x).tanh().mean((2, 3)))


def tokens(rows: int = 3, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 5) -> None:
    """Adapters as if trained: nothing is left at zero, where a wrong factor would not show."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters_of(model).values():
            for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude):
                if part is not None:
                    part += 0.05 * torch.randn(part.shape, generator=rng).to(part)


def with_peft(base: nn.Module, config: AdapterConfig, random: bool = True):
    """(ours, peft's) on copies of `base`, with equal adapters."""
    import peft

    ours = copy.deepcopy(base)
    names = inject(ours, config)
    if random:
        randomise(ours)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=names,
        use_rslora=config.rslora,
        use_dora=config.dora,
        lora_dropout=config.dropout,
        init_lora_weights="pissa" if config.init == "pissa" else True,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    ours.eval()
    if random:
        with torch.no_grad():
            for name, parameter in peft_parameters(ours, theirs).items():
                source = dict(ours.named_parameters())[name]
                parameter.copy_(source.view(parameter.shape))
    return ours, theirs


def peft_parameters(ours: nn.Module, theirs) -> dict[str, nn.Parameter]:
    """peft's adapter parameters under our names."""
    named = {}
    for name, layer in adapters_of(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        if isinstance(layer, EmbeddingLoRA):
            named[f"{name}.lora_A"] = other.lora_embedding_A["default"]
            named[f"{name}.lora_B"] = other.lora_embedding_B["default"]
        else:
            named[f"{name}.lora_A"] = other.lora_A["default"].weight
            named[f"{name}.lora_B"] = other.lora_B["default"].weight
        if layer.lora_magnitude is not None:
            named[f"{name}.lora_magnitude"] = other.lora_magnitude_vector["default"].weight
    return named


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = model(x)
    return getattr(result, "logits", result)

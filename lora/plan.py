"""How much memory a finetuning needs, worked out before anything is loaded:

    python -m lora.plan --config configs/qlora_llama7b_alpaca.yaml --device-memory 24 [key=value ...]

Five things take memory. The base: each weight's bytes, 16 bits or 4.13. The adapters and their gradients: 32 bits a
number. The optimizer: two moments a number that learns. The activations: what the forward pass keeps for the backward
pass, which grows with the tokens of a microbatch. And what exists for a moment only: logits of a chunk, or what the
backward pass of one layer makes. The peak is at the end of the forward pass or right after it, when all activations
are there and the first of these moments comes.

For lora/model/llama.py the terms below are counted from its code, tensor by tensor, as if every token had a label; a
test holds them against measured peaks. For other architectures activations are an estimate: 34 bytes a token, layer and
unit of width in 16 bits (Korthikanti et al. 2022, section 4.1, without the scores of attention, never held here).
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from lora.config import PRETRAINED_HERE, Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora", "plan", short={"device-memory": "plan.device_memory"}, takes="config")

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from common.errors import ProjectError, exits_cleanly
from common.pretrained import find
from common.runtime import choose_device, choose_precision
from lora.adapters.targets import find_targets, kind_of
from lora.model import Llama, LlamaShape, read_settings, read_shape
from lora.model.files import settings_of
from lora.model.frugal import LONGEST
from lora.pretrain import shape_of
from lora.adapters.quantize import BLOCK, SCALES, linear_names
from lora.tuning.base import weight_type

GIB = 2**30
# settings of well-known bases, for plans on machines where they are not: from their published config.json
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": settings_of(LlamaShape(32000, 4096, 32, 32, 32, 128, 11008, 4096)),
    "mistralai/Mistral-7B-v0.3": settings_of(LlamaShape(32768, 4096, 32, 32, 8, 128, 14336, 32768, 1e6)),
    "openai-community/gpt2-medium": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
    },
}
KNOWN["huggyllama/llama-7b"] = KNOWN["meta-llama/Llama-2-7b-hf"]


@dataclass(frozen=True)
class Plan:
    """Bytes of each part of a training step.

    Attributes:
        base: the frozen weights, or all of them where all learn.
        adapters: what learns beside the base.
        gradients: of what learns.
        optimizer: its moments.
        activations: kept from the forward to the backward pass.
        moment: the most that exists for a moment only.
        accumulates: whether gradients of earlier microbatches are there while a later one is at its peak.
        exact: whether activations are counted from the code, and not estimated.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    moment: int
    accumulates: bool
    exact: bool

    @property
    def peak(self) -> int:
        """The most there is at once. In a step of one microbatch gradients come as activations go: only the larger
        of the two counts.
        """
        both = self.activations + self.gradients if self.accumulates else max(self.activations, self.gradients)
        return self.base + self.adapters + self.optimizer + both + self.moment

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: value for name, value in asdict(self).items() if name not in ("accumulates", "exact")}


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Print the plan of a config as a table, then as JSON on one line."""
    plan = make_plan(config)
    table = Table("part", "GiB", title=f"one step of {config.model.name}, {config.model.quantize} weights")
    for name, value in plan.parts.items():
        table.add_row(name, f"{value / GIB:.2f}")
    table.add_row("peak", f"{plan.peak / GIB:.2f}", style="bold")
    console = Console()
    console.print(table)
    for line in remarks(plan, config):
        console.print(line)
    print(json.dumps({**asdict(plan), "peak": plan.peak}), flush=True)


def describe_memory(config: Config) -> list[str]:
    """The plan in a few lines, for --dry-run."""
    try:
        plan = make_plan(config)
    except ProjectError as error:
        return [f"no plan of the memory: {error}"]
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in plan.parts.items())
    return [f"memory in GiB: {parts}; peak {plan.peak / GIB:.2f}", *remarks(plan, config)]


def remarks(plan: Plan, config: Config) -> list[str]:
    """What a person should know of a plan."""
    lines = []
    if not plan.exact:
        lines.append("activations are an estimate for this architecture or method")
    available = config.plan.device_memory * GIB
    if available and plan.peak <= available:
        lines.append(
            f"fits into {config.plan.device_memory:g} GiB, with {(available - plan.peak) / GIB:.1f} left; a GPU's own "
            "context takes about half of one"
        )
    elif available:
        ways = {
            "model.quantize=nf4": config.model.quantize == "none" and config.train.method == "lora",
            "train.checkpointing=true": not config.train.checkpointing,
            "a smaller train.microbatch": rows_at_once(config) > 1,
            "a smaller data.max_length": True,
            "train.optimizer=adamw8bit": config.train.optimizer == "adamw" and plan.optimizer > plan.activations,
        }
        lines.append(
            f"does not fit into {config.plan.device_memory:g} GiB: {(plan.peak - available) / GIB:.1f} too many; try "
            + ", ".join(way for way, possible in ways.items() if possible)
        )
    return lines


def make_plan(config: Config) -> Plan:
    """The memory of one step on one device. `ProjectError` where the base's architecture is not known."""
    settings = base_settings(config)
    model = skeleton(settings, config)
    compute = choose_precision(config.precision, choose_device(config.device))
    dtype = weight_type(config, compute)
    size = (compute or dtype).itemsize if config.train.method == "full" else dtype.itemsize
    base = base_bytes(model, config, dtype.itemsize)
    adapters = adapter_numbers(model, config)
    learning = count(model) if config.train.method == "full" else adapters
    tokens = rows_at_once(config) * config.data.max_length
    moments = 2 * (1 if "8bit" in config.train.optimizer else 4)
    if isinstance(model, Llama):
        kept, moment = llama_activations(model, config, tokens, size)
    else:
        kept, moment = estimated_activations(settings, config, tokens, size)
    if config.train.method == "full" and size < 4:
        kept += count(model) * size  # autocast keeps its copy of the weights until the step's end
    if config.train.method == "lora" and size < 4:  # A and B as they are multiplied, rounded to the type of the rest
        layers = model.shape.layers if isinstance(model, Llama) and config.train.checkpointing else 1
        kept += adapters * size // layers
    counted = isinstance(model, Llama) and config.train.method == "lora" and not config.adapter.dora
    return Plan(
        base=base,
        adapters=4 * adapters,
        gradients=4 * learning,
        optimizer=moments * learning,
        activations=kept,
        moment=moment,
        accumulates=rows_at_once(config) < config.train.batch_size,
        exact=counted,
    )


def base_settings(config: Config) -> dict[str, Any]:
    """The base's config.json: from its folder, without its weights, or what is known of it here."""
    if config.model.name == PRETRAINED_HERE:
        return settings_of(shape_of(config.pretrain, config.pretrain.vocab_size))
    if config.model.name in KNOWN:
        return KNOWN[config.model.name]
    return read_settings(find(config.model.name))


def skeleton(settings: dict[str, Any], config: Config) -> Any:
    """The model without memory for its weights, to count them by layer."""
    with torch.device("meta"):
        if not config.classifies and config.model.code == "ours":
            return Llama(read_shape(settings, config.model.name))
        import transformers

        known = transformers.AutoConfig.for_model(**settings)
        if config.classifies:
            return transformers.AutoModelForSequenceClassification.from_config(known)
        return transformers.AutoModelForCausalLM.from_config(known)


def count(module: nn.Module) -> int:
    """Numbers of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def base_bytes(model: Any, config: Config, itemsize: int) -> int:
    """Weights as they are kept. NF4 (QLoRA): half a byte a number, and a scale for each block of 64."""
    total = count(model) * itemsize
    if config.model.quantize == "nf4":
        for name in linear_names(model):
            numbers = model.get_submodule(name).weight.numel()
            blocks = -(numbers // -BLOCK)
            scales = blocks + 4 * -(blocks // -SCALES) if config.model.double_quant else 4 * blocks
            total += -(numbers // -2) + scales - numbers * itemsize
    return total


def adapter_numbers(model: Any, config: Config) -> int:
    """Numbers that learn beside the base's: A and B of each adapted layer, DoRA's magnitudes, a classifier's head."""
    head = getattr(model, "classifier", None) or getattr(model, "score", None)
    total = count(head) if config.classifies and isinstance(head, nn.Module) else 0
    if config.train.method != "lora":
        return total
    for name in find_targets(model, config.adapter):
        layer = model.get_submodule(name)
        kind = kind_of(layer)
        assert kind is not None
        for shape in kind.shapes(layer, config.adapter.rank):
            total += int(torch.Size(shape).numel())
        if config.adapter.dora:
            total += kind.shapes(layer, config.adapter.rank)[1][0]
    return total


def rows_at_once(config: Config) -> int:
    """Rows of a microbatch."""
    return config.train.microbatch or config.train.batch_size


# -- activations -------------------------------------------------------------------------------------------------------


def llama_activations(model: Llama, config: Config, tokens: int, size: int) -> tuple[int, int]:
    """Bytes that lora/model/llama.py keeps for the backward pass, and the most it needs for a moment.

    Args:
        tokens: of a microbatch.
        size: bytes of a number that is computed with.
    """
    shape = model.shape
    queries = shape.heads * shape.head_width
    full = config.train.method == "full"
    adapted = {} if full else adapted_parts(model, config)
    dropout = 0.0 if full or not config.adapter.dropout else mask_size(config, size)
    block = round(block_numbers(shape, adapted, config.adapter.rank, dropout, full) * size * tokens)
    block += tokens * 4 * (shape.heads + 2)  # float32: attention's log-sums, the norms' scales
    # what one layer's backward pass makes beside what is kept: the gated layer's, or attention's, whichever is more
    length = config.data.max_length
    backward = 3 * shape.mlp_width * size * tokens
    masks = tokens * length * size if config.data.pack else 0
    if choose_device(config.device).type == "cpu":
        masks = max(masks, length * length * size)
        if length <= LONGEST:  # the scores of attention, twice in float32; the gated layer's tensors have gone by then
            gone = ((3 if "down_proj" in adapted else 2) * shape.mlp_width + 2 * shape.width) * size
            backward = max(backward, (8 * shape.heads * length + 2 * queries * size - gone) * tokens)
    once = tokens * (2 * shape.head_width * size + 3 * shape.width * size + 8 * 4) + masks
    if config.model.quantize == "nf4":
        widest = max(shape.mlp_width, queries) * shape.width
        backward += widest * size  # one layer's weight, dequantised
    logits = min(config.train.loss_chunk, tokens) if config.train.loss != "full" else tokens
    # in float32, and as they come and are multiplied back
    loss = logits * shape.vocab_size * (4 if size >= 4 else 4 + size)
    if config.train.checkpointing:
        return shape.layers * shape.width * size * tokens + once, max(block + backward, loss)
    return shape.layers * block + once, max(backward, loss)


def adapted_parts(model: Llama, config: Config) -> dict[str, int]:
    """How many of the layers q_proj, k_proj, ... of one block are adapted, as a share of the blocks."""
    names = [name.rsplit(".")[-1] for name in find_targets(model, config.adapter)]
    return {name: names.count(name) for name in set(names)}


def mask_size(config: Config, size: int) -> float:
    """What PyTorch's dropout keeps to know what it dropped, over the number it is about: on a CPU a number of the same
    type, on a GPU a byte.
    """
    return 1.0 if choose_device(config.device).type == "cpu" else 1 / size


def block_numbers(shape: LlamaShape, adapted: dict[str, int], rank: int, dropout: float, full: bool) -> float:
    """Numbers a token that one block keeps; layers that few blocks adapt count as if all did.

    dropout: of `mask_size`; 0 without dropout.
    """
    queries = shape.heads * shape.head_width
    keys = shape.kv_heads * shape.head_width
    numbers = 2.0 * shape.width  # what enters the two norms
    numbers += 2 * queries + 2 * keys  # attention's queries and result, keys and values
    numbers += 2 * shape.mlp_width  # both inputs of the gated product
    inputs = {
        "q_proj": shape.width,
        "k_proj": shape.width,
        "v_proj": shape.width,
        "o_proj": 0,  # attention's result is kept anyway
        "gate_proj": shape.width,
        "up_proj": shape.width,
        "down_proj": shape.mlp_width,
    }
    shared = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for group in shared:
        users = [name for name in group if full or name in adapted]
        if dropout:
            # every adapter drops other inputs: each keeps its own, and which they are
            wide = [queries if name == "o_proj" else inputs[name] for name in users]
            numbers += (1 + dropout) * sum(wide)
        elif users:
            numbers += inputs[group[0]]
        numbers += 0 if full else rank * len(users)
    return numbers


def estimated_activations(settings: dict[str, Any], config: Config, tokens: int, size: int) -> tuple[int, int]:
    """The same for other architectures, roughly."""
    width = settings.get("hidden_size") or settings.get("n_embd") or settings.get("d_model") or 0
    layers = settings.get("num_hidden_layers") or settings.get("n_layer") or settings.get("num_layers") or 0
    if not width or not layers:
        raise ProjectError(f"the config.json of {config.model.name} does not say how wide and deep it is")
    block = 17 * width * size * tokens
    logits = 0
    if not config.classifies:
        chunk = min(config.train.loss_chunk, tokens) if config.train.loss != "full" else tokens
        logits = chunk * settings["vocab_size"] * (4 + size)
    if config.train.checkpointing:
        return layers * width * size * tokens, max(block, logits)
    return layers * block, max(8 * width * size * tokens, logits)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)

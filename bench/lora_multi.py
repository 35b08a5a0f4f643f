"""Answers from 32 adapters in one batch: our bank against peft's mixed batches (`adapter_names=`):

    python -m bench.lora_multi

The model has the shape of SmolLM2-135M with random weights; every row of the batch has an adapter of its own, on all
linear layers. First the logits of ours, of peft's and of the rows one by one must agree in float32; otherwise nothing
is timed. Then all weights become bfloat16 (`--dtype`), adapters included, and each round times, in one process, one
thread, by CPU time: ours, the peer, the base without adapters, and ours again. `answer` is transformers' `generate`, as
both libraries are used: prompts of `--tokens`, then `--new` tokens a row from a cache. `read` is one forward pass over
the prompts.

`ratio` is the peer's time over ours for an answer, `ratio_read` for reading, `overhead` ours over the base alone for an
answer. Ours again over ours is the A/A control, whose spread says which differences are noise. The last line of stdout
is one JSON object: the ratios, ours and peer (tokens written a CPU-second), circumstances.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.rounds import circumstances, ours_of, ratio, report
from common.runtime import use_threads
from lora.adapters.files import SavedAdapter
from lora.adapters.layers import LinearLoRA
from lora.adapters.multi import Bank
from lora.adapters.targets import find_targets
from lora.settings import AdapterConfig

TOLERANCE = 1e-4  # of float32 logits, relative to the largest
SHAPE = {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152}
TINY = {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "groups": 2, "vocabulary": 256}


def build_base(shape: dict[str, int]) -> nn.Module:
    """A LLaMA of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_adapters(model: nn.Module, count: int, rank: int) -> dict[str, SavedAdapter]:
    """Adapters with random numbers, large enough to show in the logits."""
    config = AdapterConfig(rank=rank, alpha=2 * rank)
    names = find_targets(model, config)
    adapters = {}
    for index in range(count):
        rng = torch.Generator().manual_seed(index)
        tensors = {}
        for name in names:
            a, b = LinearLoRA.shapes(model.get_submodule(name), rank)
            tensors[f"{name}.lora_A"] = torch.randn(a, generator=rng) / a[1] ** 0.5
            tensors[f"{name}.lora_B"] = 0.05 * torch.randn(b, generator=rng)
        settings = {name: config for name in names}
        adapters[f"adapter{index}"] = SavedAdapter(Path("random"), "", settings, tensors, (), "")
    return adapters


def make_bank(base: nn.Module, adapters: dict[str, SavedAdapter]) -> Bank:
    """Ours."""
    bank = Bank(base)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    return bank


def make_peer(base: nn.Module, adapters: dict[str, SavedAdapter]) -> Any:
    """peft's model with the same adapters. SystemExit without peft."""
    try:
        import peft
    except ImportError:
        raise SystemExit("bench.lora_multi compares with peft: pip install peft") from None
    model: Any = None
    for name, adapter in adapters.items():
        first = next(iter(adapter.settings.values()))
        config = peft.LoraConfig(
            r=first.rank, lora_alpha=int(first.alpha), target_modules=list(adapter.settings), init_lora_weights=False
        )
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for layer in adapter.settings:
                theirs = model.base_model.model.get_submodule(layer)
                for part in ("lora_A", "lora_B"):
                    getattr(theirs, part)[name].weight.copy_(adapter.tensors[f"{layer}.{part}"])
    return model.eval()


# -- equal first, then timed -------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_difference(bank: Bank, peer: Any, names: list[str], prompts: Tensor) -> dict[str, float]:
    """Of the last logits of each row, relative to the largest: ours against peft's, and against the rows one by one."""
    with bank.use(names):
        ours = bank.model(input_ids=prompts, logits_to_keep=1).logits
    theirs = peer(input_ids=prompts, logits_to_keep=1, adapter_names=names).logits
    largest = float(theirs.abs().max())
    single = 0.0
    for row in (0, len(names) // 2, len(names) - 1):
        with bank.use([names[row]]):
            alone = bank.model(input_ids=prompts[row : row + 1], logits_to_keep=1).logits
        single = max(single, float((ours[row : row + 1] - alone).abs().max()))
    return {"peer": float((ours - theirs).abs().max()) / largest, "one_by_one": single / largest}


class Work:
    """The ways of answering, each by name."""

    def __init__(self, bank: Bank, peer: Any, base: nn.Module, names: list[str], prompts: Tensor, new: int) -> None:
        self.bank, self.peer, self.base = bank, peer, base
        self.names = names
        self.inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
        self.settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def run(self, side: str, work: str) -> None:
        """An answer to every prompt, or one forward pass over the prompts."""
        more: dict[str, Any] = self.settings if work == "answer" else {"logits_to_keep": 1}
        if side == "ours":
            with self.bank.use(self.names):
                self.call(self.bank.model, work, more)
        elif side == "peer":
            self.call(self.peer, work, more | {"adapter_names": self.names})
        else:
            self.call(self.base, work, more)

    def call(self, model: Any, work: str, more: dict[str, Any]) -> None:
        (model.generate if work == "answer" else model)(**self.inputs, **more)


def interleave(work: Work, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU-seconds by kind of work, side and round; `again` is ours a second time, at the end of the round."""
    sides = ("ours", "peer", "base", "again")
    times: dict[str, dict[str, list[float]]] = {kind: {side: [] for side in sides} for kind in ("answer", "read")}
    for index in range(-1, rounds):  # the first is warm-up
        for kind, by_side in times.items():
            for side, seconds in by_side.items():
                start = time.process_time()
                work.run("ours" if side == "again" else side, kind)
                if index >= 0:
                    seconds.append(time.process_time() - start)
        if index >= 0:
            shown = "  ".join(f"{side} {values[-1]:.2f}" for side, values in times["answer"].items())
            print(f"round {index + 1}/{rounds}, CPU-s an answer: {shown}", flush=True)
    return times


def summarise(times: dict[str, dict[str, list[float]]], tokens: int) -> dict[str, Any]:
    """Medians of the per-round ratios, with quartiles, and of the rates; `tokens` were written in each answer."""
    ours = {kind: ours_of(sides) for kind, sides in times.items()}
    answer, read = times["answer"], times["read"]
    result: dict[str, Any] = {}
    for name, above, below in (
        ("ratio", answer["peer"], ours["answer"]),
        ("ratio_read", read["peer"], ours["read"]),
        ("overhead", ours["answer"], answer["base"]),
        ("aa_ratio", answer["again"], answer["ours"]),
    ):
        result |= ratio(name, above, below)
    for name, values in (("ours", ours["answer"]), ("peer", answer["peer"]), ("base", answer["base"])):
        result[name] = round(tokens / statistics.median(values), 2)
    return result | {"unit": "tokens written per CPU-second"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_multi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=32, help="and rows (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of each prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens to write (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of what is timed")
    parser.add_argument("--layers", type=int, default=SHAPE["layers"], help="of the model (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the program works")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    for name in ("adapters", "rank", "tokens", "new", "rounds", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(1)
    load = os.getloadavg()[0]
    base = build_base(TINY if args.tiny else SHAPE | {"layers": args.layers})
    adapters = make_adapters(base, args.adapters, args.rank)
    names = list(adapters)
    shape = (args.adapters, args.tokens)
    prompts = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    bank = make_bank(copy.deepcopy(base), adapters)
    peer = make_peer(copy.deepcopy(base), adapters)
    differences = largest_difference(bank, peer, names, prompts)
    print(f"largest relative difference in float32: {differences}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"ours and the peer differ by more than {TOLERANCE}: nothing was timed")
    if args.dtype == "bfloat16":
        base = base.bfloat16()
        bank = make_bank(copy.deepcopy(base), adapters)
        peer = peer.bfloat16()
    times = interleave(Work(bank, peer, base, names, prompts, args.new), args.rounds)
    result = {
        "bench": f"{args.adapters} adapters of rank {args.rank} in one batch, prompts of {args.tokens} tokens",
        **summarise(times, args.adapters * args.new),
        "layers": base.config.num_hidden_layers,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "new_tokens": args.new,
        "threads": 1,
        "difference": differences,
        **circumstances(load, "torch", "peft", "transformers"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()

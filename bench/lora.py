"""A training step against peft and transformers, and decoding against transformers' `generate`:

    python -m bench.lora [--tiny] [--rounds 9] [--dtype float32]

SmolLM2-135M with adapters on all linear layers, the same A and B on both sides, 16 examples shaped like E2E's: a prompt
of 32 tokens, an answer of 24. The peer pads them to one length and computes transformers' own loss. Ours is timed on
the same padded rows (`ratio`) and on the same examples packed (`ratio_packed`). First the losses and the gradients of
every A and B must agree in float32, and the written tokens of both sides be the same; otherwise nothing is timed. Then
both models are bfloat16 with adapters in float32 (the peer under autocast, as it is used), and each round times, in one
process, one thread, by CPU time: ours, ours packed, the peer, and ours again.

`memory_ratio` is ours over the peer's largest resident memory, each of a process of its own that loads the model and
takes two steps. `ratio_write` is the peer's time over ours for writing `--new` tokens after 16 prompts. The last line
of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.rounds import circumstances, ours_of, peak_memory, ratio, report
from common.pretrained import find
from common.runtime import use_threads
from lora.adapters.inject import adapters_of, inject
from lora.config import SMOLLM, GenerateConfig
from lora.data import Tokens, collate, pack
from lora.data.batches import Batch
from lora.loss import TuningLoss
from lora.model.decoding import write_answers
from lora.model.load import load_llama
from lora.settings import AdapterConfig

TOLERANCE = 1e-4  # of float32 losses and gradients, relative to the largest
ROWS, PROMPT, ANSWER = 16, 32, 24
ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "packed", "peer", "again")


def make_folder(tiny: bool, place: Path) -> Path:
    """SmolLM2's folder, or that of a tiny model with random weights."""
    if not tiny:
        return find(SMOLLM)
    from lora.config import PretrainConfig
    from lora.data.slots import pretraining_text
    from lora.model import Llama, initialise, write_folder
    from lora.pretrain import shape_of, train_tokenizer

    tokenizer = train_tokenizer(pretraining_text(20, 0), 300)
    model = Llama(shape_of(PretrainConfig(width=32, mlp_width=48), 300))
    initialise(model, 0)
    write_folder(place, model, tokenizer, torch.float32)
    return place


def make_examples(vocabulary: int) -> list[Tokens]:
    """Random tokens in the shape of E2E's examples: lengths vary by a third."""
    rng = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        size = int(torch.randint(length * 2 // 3, length * 4 // 3, (), generator=rng))
        return torch.randint(3, vocabulary, (size,), generator=rng).tolist()

    return [Tokens(draw(PROMPT), draw(ANSWER)) for _ in range(ROWS)]


class Ours:
    """Our model, loss and optimizer."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int) -> None:
        self.model = load_llama(folder, dtype, torch.device("cpu"))
        inject(self.model, AdapterConfig(rank=rank, alpha=2.0 * rank))
        self.model.train()
        self.loss = TuningLoss(self.model)
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=True)

    def step(self, batch: Batch, update: bool = True) -> float:
        """Forward, backward, and the optimizer's step; returns the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch) / len(batch.labels)
        loss.backward()
        if update:
            self.optimizer.step()
        return float(loss.detach())


class Peer:
    """peft on transformers' model, with its own loss. SystemExit without peft."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int) -> None:
        try:
            import peft
        except ImportError:
            raise SystemExit("bench.lora compares with peft: pip install peft") from None
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
        self.model: Any = peft.get_peft_model(base, settings)
        self.model.train()
        self.mixed = dtype == torch.bfloat16
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=True)

    def step(self, padded: dict[str, Tensor], update: bool = True) -> float:
        """The same as ours."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            loss = self.model(**padded).loss
        loss.backward()
        if update:
            self.optimizer.step()
        return float(loss.detach())

    def adapter(self, name: str, part: str) -> nn.Parameter:
        """A or B of a layer by our name."""
        weight: nn.Parameter = getattr(self.model.base_model.model.get_submodule(name), part)["default"].weight
        return weight


def pad(examples: list[Tokens]) -> dict[str, Tensor]:
    """The examples as transformers takes them: filled up behind, -100 where nothing is learnt."""
    length = max(map(len, examples))
    inputs = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    mask = torch.zeros_like(inputs)
    for row, example in enumerate(examples):
        inputs[row, : len(example)] = torch.tensor([*example.prompt, *example.answer])
        labels[row, len(example.prompt) : len(example)] = torch.tensor(example.answer)
        mask[row, : len(example)] = 1
    return {"input_ids": inputs, "labels": labels, "attention_mask": mask}


def batches(examples: list[Tokens]) -> tuple[Batch, Batch]:
    """The same examples one a row, and packed into rows of 256."""
    rows = pack([len(example) for example in examples], 256)
    return collate([[example] for example in examples]), collate([[examples[i] for i in row] for row in rows], 256)


# -- equal first -------------------------------------------------------------------------------------------------------


def copy_adapters(ours: Ours, peer: Peer) -> None:
    """Random numbers into every A and B, the same on both sides."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in adapters_of(ours.model).items():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=rng))
            for part in ("lora_A", "lora_B"):
                peer.adapter(name, part).copy_(getattr(layer, part))


def largest_difference(ours: Ours, peer: Peer, examples: list[Tokens]) -> dict[str, float]:
    """Relative to the largest: of the losses, and of the gradients of all A and B; padded rows and packed ones."""
    single, packed = batches(examples)
    expected = peer.step(pad(examples), update=False)
    found: dict[str, float] = {}
    for kind, batch in (("padded", single), ("packed", packed)):
        found[f"loss_{kind}"] = abs(ours.step(batch, update=False) - expected) / expected
        worst = largest = 0.0
        for name, layer in adapters_of(ours.model).items():
            for part in ("lora_A", "lora_B"):
                grad, other = getattr(layer, part).grad, peer.adapter(name, part).grad
                assert other is not None
                worst = max(worst, float((grad - other).abs().max()))
                largest = max(largest, float(other.abs().max()))
        found[f"gradient_{kind}"] = worst / largest
    return found


def writers(ours: Ours, peer: Peer, examples: list[Tokens], new: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Greedy answers of so many tokens, by each side; prompts of one length."""
    prompts = [example.prompt[: PROMPT * 2 // 3] for example in examples]
    inputs = torch.tensor(prompts)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def theirs() -> list[list[int]]:
        with torch.no_grad():
            written = peer.model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)
        return [row[inputs.shape[1] :] for row in written.tolist()]

    def own() -> list[list[int]]:
        return write_answers(ours.model, prompts, GenerateConfig(max_tokens=new), ())

    return {"ours": own, "peer": theirs}


# -- then timed --------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """CPU-seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interleave(ours: Ours, peer: Peer, examples: list[Tokens], new: int, rounds: int) -> dict[str, list[float]]:
    """CPU-seconds by side and round; `write_` ones are of decoding."""
    single, packed = batches(examples)
    padded = pad(examples)
    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.step(single),
        "packed": lambda: ours.step(packed),
        "peer": lambda: peer.step(padded),
        "again": lambda: ours.step(single),
    }
    writing = writers(ours, peer, examples, new)
    times: dict[str, list[float]] = {name: [] for name in (*SIDES, "write_ours", "write_peer")}
    for index in range(-1, rounds):  # the first is warm-up
        found = {name: timed(steps[name]) for name in SIDES}
        for side in (ours, peer):
            side.model.eval()
        found |= {f"write_{name}": timed(work) for name, work in writing.items()}
        for side in (ours, peer):
            side.model.train()
        if index >= 0:
            for name, seconds in found.items():
                times[name].append(seconds)
            shown = "  ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
            print(f"round {index + 1}/{rounds}, CPU-s: {shown}", flush=True)
    return times


def summarise(times: dict[str, list[float]], num_tokens: int, written: int) -> dict[str, Any]:
    """Medians of the per-round ratios, with quartiles, and of the rates."""
    ours = ours_of(times)
    result: dict[str, Any] = {}
    for name, above, below in (
        ("ratio", times["peer"], ours),
        ("ratio_packed", times["peer"], times["packed"]),
        ("ratio_write", times["write_peer"], times["write_ours"]),
        ("aa_ratio", times["again"], times["ours"]),
    ):
        result |= ratio(name, above, below)
    for name, seconds in (("ours", ours), ("packed", times["packed"]), ("peer", times["peer"])):
        result[name] = round(num_tokens / statistics.median(seconds), 2)
    for name in ("write_ours", "write_peer"):
        result[name] = round(written / statistics.median(times[name]), 2)
    return result | {"unit": "tokens per CPU-second"}


def measure_memory(args: argparse.Namespace) -> None:
    """One side in this process alone: load, two steps, and print the largest resident memory in GiB."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(args.tiny, Path(place) / "model")
        examples = make_examples(300 if args.tiny else 49152)
        kind: type[Ours] | type[Peer] = Ours if args.memory_of == "ours" else Peer
        side: Any = kind(folder, getattr(torch, args.dtype), args.rank)
        data: Any = batches(examples)[0] if args.memory_of == "ours" else pad(examples)
        for _ in range(2):
            side.step(data)
    print(json.dumps(peak_memory() / 1024))


def memory_of(side: str, argv: list[str]) -> float:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "bench.lora", *argv, "--memory-of", side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="tokens to write (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of what is timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the program works")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--memory-of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("rank", "new", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    use_threads(1)
    if args.memory_of:
        return measure_memory(args)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(args.tiny, Path(place) / "model")
        examples = make_examples(300 if args.tiny else 49152)
        ours, peer = (kind(folder, torch.float32, args.rank) for kind in (Ours, Peer))
        assert isinstance(ours, Ours)
        assert isinstance(peer, Peer)
        copy_adapters(ours, peer)
        differences = largest_difference(ours, peer, examples)
        print(f"largest relative difference in float32: {differences}")
        if max(differences.values()) > TOLERANCE:
            raise SystemExit(f"ours and the peer differ by more than {TOLERANCE}: nothing was timed")
        ours.model.eval()
        peer.model.eval()
        answers = {name: work() for name, work in writers(ours, peer, examples, 8).items()}
        if answers["ours"] != answers["peer"]:
            raise SystemExit("ours and the peer write different answers in float32: nothing was timed")
        if args.dtype == "bfloat16":
            ours, peer = Ours(folder, torch.bfloat16, args.rank), Peer(folder, torch.bfloat16, args.rank)
            copy_adapters(ours, peer)
        times = interleave(ours, peer, examples, args.new, args.rounds)
        num_tokens = sum(map(len, examples))
        result = {
            "bench": f"a LoRA step of rank {args.rank}, {ROWS} examples of {num_tokens / ROWS:.0f} tokens",
            **summarise(times, num_tokens, ROWS * args.new),
            **memory(words),
            "dtype": args.dtype,
            "rounds": args.rounds,
            "threads": 1,
            "difference": differences,
            **circumstances(load, "torch", "peft", "transformers"),
        }
    report(result, args.out)


def memory(words: list[str]) -> dict[str, float]:
    """Largest resident memory of both sides in GiB, and ours over the peer's."""
    found = {side: memory_of(side, words) for side in ("ours", "peer")}
    return {
        "memory_ratio": round(found["ours"] / found["peer"], 4),
        **{f"memory_{side}": round(value, 3) for side, value in found.items()},
    }


if __name__ == "__main__":
    main()

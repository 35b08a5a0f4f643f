"""Our CLIP against OpenCLIP's: one training step, same architecture, weights and batch.:

    python -m bench.clip [--size small|resnet|tiny]

First the two must agree in float32, on loss and on the gradient of every parameter; otherwise nothing is timed. Then
each round times blocks of steps in one process, one thread, by CPU time. Both sides run as their training programs do,
with AdamW, gradients clipped to a norm of 1, in bf16 where the CPU multiplies in it.

Ours cuts a batch of captions to its longest, which changes no result (the causal tower never looks behind the end of a
text), and writes attention out in bf16 on a CPU. OpenCLIP always computes the whole context of 77 tokens. Captions are
as long as those of Flickr8k: 14.1 ids on the average, with a standard deviation of 4.0.

`ratio` is the throughput of ours over that of OpenCLIP with the fused AdamW that ours has. `ratio_default`: over
OpenCLIP with AdamW as its program makes it. `ratio_fp32`: both in float32. `ratio_padded`: ours without the cut, so
that both compute the same tokens. Ours again over ours is the A/A control, whose spread says which differences are
noise. `pipeline_ratio`: how many times faster than ours the data pipeline makes batches, in CPU time of one core. The
last line of stdout is one JSON object.

Legend: B pairs, S pixels of a side, T tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.rounds import circumstances, interleave, ours_of, ratio, report
from clip.config import Config
from clip.contrastive import contrastive_loss
from clip.model import CLIP, parameter_groups
from clip.model.pretrained import build, translate
from clip.model.tokenizer import trim
from common import runtime
from common.checkpoint import Checkpoints
from common.config import resolve
from common.finite import FiniteCheck
from common.runtime import use_threads

CONTEXT = 77
VOCABULARY = 49_408
LENGTH = (14.1, 4.0, 4, 42)  # ids of a caption of Flickr8k: mean, standard deviation, least, most
FLOOR = 1e-3  # entries below this share of the largest gradient of all count as zero
TOLERANCE = 1e-4  # float32, relative to the largest entry; a wrong weight is off by far more than rounding


@dataclass(frozen=True)
class Size:
    """An architecture in OpenCLIP's terms."""

    batch: int
    embed_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]


def _text(width: int, layers: int) -> dict[str, Any]:
    heads = width // 64  # as all of CLIP's models
    return {
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": width, "heads": heads, "layers": layers
    }  # fmt: skip


SIZES = {
    "tiny": Size(4, 32, {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}, _text(64, 1)),
    "small": Size(64, 256, {"image_size": 128, "layers": 6, "width": 256, "patch_size": 16}, _text(256, 6)),
    "resnet": Size(
        64, 256, {"image_size": 128, "layers": [3, 4, 6, 3], "width": 16, "patch_size": None}, _text(256, 6)
    ),
}


def build_pair(size: Size, seed: int = 0) -> tuple[CLIP, nn.Module]:
    """Ours and the peer with equal random weights. SystemExit without OpenCLIP."""
    try:
        from open_clip.model import CLIP as PeerCLIP
    except ImportError:
        raise SystemExit("bench.clip compares with OpenCLIP: pip install open_clip_torch") from None
    torch.manual_seed(seed)
    peer = PeerCLIP(size.embed_dim, size.vision, size.text)
    with torch.no_grad():  # no bias is left at zero and no gain at one, where a wrong one would not show
        for parameter in peer.parameters():
            if parameter.ndim < 2:
                parameter += 0.02 * torch.randn_like(parameter)
    return build(peer.state_dict(), "gelu"), peer


def make_batch(size: Size, count: int) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, S, S) and texts (B, 77) with the lengths of captions."""
    rng = torch.Generator().manual_seed(1)
    mean, spread, least, most = LENGTH
    lengths = (mean + spread * torch.randn(count, generator=rng)).round().clamp(least, most).long()
    ids = torch.randint(1, VOCABULARY - 2, (count, CONTEXT), generator=rng)
    place = torch.arange(CONTEXT)
    ids[place.expand(count, -1) >= lengths[:, None]] = 0
    ids[:, 0] = VOCABULARY - 2
    ids[torch.arange(count), lengths - 1] = VOCABULARY - 1
    side = size.vision["image_size"]
    return torch.randn(count, 3, side, side, generator=rng), ids


def peer_loss(peer: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    """The loss as OpenCLIP's program computes it, on one process."""
    from open_clip.loss import ClipLoss

    image, text, scale = peer(images, ids)
    return ClipLoss()(image, text, scale)


def largest_difference(ours: CLIP, peer: nn.Module, images: Tensor, ids: Tensor) -> dict[str, float]:
    """Of the losses, and of the gradients of any parameter relative to the peer's largest entry, in float32; ours of
    texts cut to the longest.
    """
    for model in (ours, peer):
        model.train()
        model.zero_grad(set_to_none=True)
    mine = contrastive_loss(ours(images, trim(ids, VOCABULARY - 1)))
    mine.backward()
    theirs = peer_loss(peer, images, ids)
    theirs.backward()
    gradients = translate({name: parameter.grad for name, parameter in peer.named_parameters()})
    # a key's bias moves all scores of a query alike and has a gradient of zero: there is rounding on both sides
    least = FLOOR * max(float(gradient.abs().max()) for gradient in gradients.values())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        expected = gradients.pop(name)
        difference = float((parameter.grad - expected).abs().max())
        worst = max(worst, difference / max(least, float(expected.abs().max())))
    assert not gradients, f"ours has no {sorted(gradients)[0]}"
    return {"loss": float((mine - theirs).detach().abs() / theirs.detach().abs()), "gradient": worst}


# -- a training step ---------------------------------------------------------------------------------------------------


class Ours:
    """Our model with its optimizer, and the step of `clip.train` without its log and its files."""

    def __init__(self, config: Config, model: CLIP, cut: bool = True) -> None:
        self.config = config
        self.cut = cut
        self.model = model.train()
        self.machine = runtime.start(config)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.finite = FiniteCheck(self.machine.device, scaler, Checkpoints(Path(config.run_dir)))
        train = config.train
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay), lr=train.lr, betas=train.betas, eps=train.eps, fused=True
        )

    def step(self, images: Tensor, ids: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.machine.autocast():
            output = self.model(images, trim(ids, VOCABULARY - 1) if self.cut else ids)
        loss = contrastive_loss(output)
        loss.backward()
        self.finite.gradients(1, self.optimizer, loss, self.config.train.grad_clip)
        self.optimizer.step()
        self.model.clamp_scale()


class Peer:
    """OpenCLIP's model, loss and optimizer, and the step of its training program."""

    def __init__(self, config: Config, model: nn.Module, fused: bool) -> None:
        self.model = model.train()
        self.machine = runtime.start(config)
        train = config.train
        self.clip = train.grad_clip
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": train.weight_decay}]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=fused or None)

    def step(self, images: Tensor, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        with self.machine.autocast():
            loss = peer_loss(self.model, images, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)  # type: ignore[operator]  # a parameter


def make_sides(config: Config, size: Size) -> dict[str, Ours | Peer]:
    """What a round times, each with a model of its own that starts from the same weights."""
    fp32 = replace(config, precision="fp32")
    return {
        "ours": Ours(config, build_pair(size)[0]),
        "ours_padded": Ours(config, build_pair(size)[0], cut=False),
        "ours_fp32": Ours(fp32, build_pair(size)[0]),
        "peer": Peer(config, build_pair(size)[1], fused=True),
        "peer_default": Peer(config, build_pair(size)[1], fused=False),
        "peer_fp32": Peer(fp32, build_pair(size)[1], fused=True),
    }


def summarise(times: dict[str, list[float]], pairs: int) -> dict[str, Any]:
    """Medians of the per-round ratios, with quartiles, and of the rates; `pairs` were seen in each block."""
    ours = ours_of(times)
    result: dict[str, Any] = ratio("ratio", times["peer"], ours)
    result |= ratio("ratio_default", times["peer_default"], ours)
    result |= ratio("ratio_fp32", times["peer_fp32"], times["ours_fp32"])
    result |= ratio("ratio_padded", times["peer"], times["ours_padded"])
    result |= ratio("aa_ratio", times["again"], times["ours"])
    for name, values in (times | {"ours": ours}).items():
        if name != "again":
            result[name] = round(pairs / statistics.median(values), 2)
    return result | {"unit": "pairs per CPU-second"}


# -- the data pipeline -------------------------------------------------------------------------------------------------


def pipeline_rate(config: Config, batch: int, batches: int, side: int) -> float:
    """Pairs per CPU-second that one process decodes or draws, crops and tokenises, as `clip.train` does."""
    from clip.data import batches as make_batches
    from clip.data import load_splits
    from clip.model.images import Preprocess
    from clip.model.pretrained import IMAGE_MEAN, IMAGE_STD
    from clip.model.towers import build_tokenizer

    pairs = load_splits(config).train
    preprocess = Preprocess(side, IMAGE_MEAN, IMAGE_STD)
    data = make_batches(pairs, build_tokenizer(config), preprocess, first_step=1, batch_size=batch, seed=0, workers=0)
    preprocess.normalise(next(data).images)  # warm-up
    start = time.process_time()
    for _ in range(batches):
        preprocess.normalise(next(data).images)
    return batch * batches / (time.process_time() - start)


def compare_pipeline(root: Path, size: Size, batches: int, consumed: float) -> dict[str, Any]:
    """The pipeline's rate on the photographs of Flickr8k where they are, else on drawn scenes, over `consumed`, the
    model's.
    """
    photographs = (root / "flickr8k").is_dir()
    words = ["data.dataset=flickr8k", "data.tokenizer=clip"] if photographs else ["data.dataset=scenes"]
    if not photographs:
        words += [f"model.text.vocab_size={scene_vocabulary()}"]
    config = resolve(Config, None, [*words, f"data_root={root}", "run_dir=unused"])
    rate = pipeline_rate(config, size.batch, batches, size.vision["image_size"])
    return {
        "pipeline": round(rate, 1),
        "pipeline_ratio": round(rate / consumed, 2),
        "pipeline_data": "flickr8k" if photographs else "scenes",
    }


def scene_vocabulary() -> int:
    """Ids of the tokenizer of drawn scenes."""
    from clip.data import scene_words
    from clip.model.tokenizer import WordTokenizer

    return WordTokenizer(scene_words.vocabulary(), 8).vocab_size


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.clip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, help="pairs (default: of the size)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of each block (default: %(default)s)")
    parser.add_argument("--pipeline-batches", type=int, default=5, help="0 = leave the data pipeline out")
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DATA_ROOT") or "data"))
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.batch is not None and args.batch < 2:
        parser.error("--batch must be at least 2: a pair alone has nothing to differ from")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(1)
    load = os.getloadavg()[0]
    size = SIZES[args.size]
    size = replace(size, batch=args.batch or size.batch)
    config = Config(device="cpu", run_dir="unused")
    images, ids = make_batch(size, size.batch)
    differences = largest_difference(*build_pair(size), images, ids)
    print(f"largest relative difference in float32: {differences}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"ours and the peer differ by more than {TOLERANCE}: nothing was timed")
    sides = make_sides(config, size)
    steps: dict[str, Callable[[], None]] = {name: partial(side.step, images, ids) for name, side in sides.items()}
    result = summarise(interleave(steps, args.rounds, args.steps), args.steps * size.batch)
    if args.pipeline_batches:
        result |= compare_pipeline(args.data_root, size, args.pipeline_batches, result["ours"])
    result = {
        "bench": f"CLIP {args.size}, {size.vision['image_size']} pixels, batch {size.batch}",
        **result,
        "precision": str(sides["ours"].machine.amp_dtype or torch.float32).removeprefix("torch."),
        "tokens": {"ours": trim(ids, VOCABULARY - 1).shape[1], "peer": CONTEXT},
        "rounds": args.rounds,
        "steps": args.steps,
        "threads": 1,
        "difference": differences,
        **circumstances(load, "torch", "open_clip_torch"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()

"""Train two towers to agree on which images and captions belong together:

    python -m clip.train --config configs/clip_scenes.yaml [key=value ...] [--resume] [--dry-run]

Legend: B images a step over all processes, K captions of each, S pixels of a side, T tokens, E numbers of an embedding.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from clip.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "clip")

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clip.contrastive import cached_backward, contrastive_loss
from clip.data import Batch, FilePairs, Pairs, Splits, batches, load_splits
from clip.data.features import FeaturePairs, cache_features
from clip.data.pairs import Crop
from clip.embed import embed, encode_texts, measure
from clip.load import Locked
from clip.model import CLIP, Output, parameter_groups
from clip.model.heads import standards, start_from_classes
from clip.model.tokenizer import Tokenizer
from clip.model.towers import Towers, build_towers
from common.checkpoint import export_weights
from common.config import require
from common.ema import EMA
from common.errors import exits_cleanly
from common.images.memory import started
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine, count_parameters

MEASURED = 2_000  # images whose features are measured before the first step
CHECKED = 20_000  # captions of which the length is looked at before a run


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and `model.safetensors`."""
    if options.dry_run:
        return describe(config)
    splits = load_splits(config)
    run = Run.start(config, options)
    with run:
        check_processes(config, run.world)
        for note in splits.notes:
            run.display.say(f"note: {note}")
        towers = build_towers(config)
        model = towers.model.to(run.device)
        optimizer = torch.optim.AdamW(
            optimizer_groups(model, config),
            lr=config.train.lr,
            betas=config.train.betas,
            eps=config.train.eps,
            fused=run.device.type != "mps",
        )
        ema = EMA(model, config.train.ema)
        locked = Locked(towers)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema, "locked": locked}
        done = run.resume(**parts)  # 0 when fresh
        train_pairs, val_pairs = prepare_data(config, splits, towers, run)
        if done == 0:
            measure_features(train_pairs, config, towers, run)
            if config.model.start_heads == "classes":
                start_heads(towers, config, run)
        data = started(open_batches(train_pairs, config, towers, run, done + 1))
        net = run.prepare(model)  # the same weights, compiled or spread over processes
        run.display.say(sizes(config, train_pairs, towers))

        for step in run.steps(done, config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train) * group["scale"]
            batch = next(data)  # images, crops and captions are functions of (seed, step)
            images, ids = inputs(batch, towers, run)
            loss_of = partial(
                contrastive_loss,
                image_ids=batch.image_ids.to(run.device),
                text_ids=batch.text_ids.to(run.device),
                block=config.train.block,
                smoothing=config.train.label_smoothing,
            )

            model.train()
            optimizer.zero_grad(set_to_none=True)
            loss = backward(net, images, ids, loss_of, config.train.microbatch, run)
            grad_norm = run.check_gradients(optimizer, loss, config.train.grad_clip)
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()
            model.clamp_scale()
            ema.update(model, step)

            shown: dict[str, Tensor | float] = {"loss": loss.detach(), "scale": model.log_scale.detach().exp()}
            shown |= {"grad_norm": grad_norm, "lr": learning_rate(step, config.train)}
            if run.due(step, config.train.eval_every):
                with run.interruptible():
                    found = embed(val_pairs, towers._replace(model=ema.model), config, run)
                    shown |= {f"val_{name}": value for name, value in measure(found, config).items()}
            run.log(step, config.train.log_every, {"images": config.train.batch_size}, **shown)
            if run.save_due(step, config.train.save_every):
                run.save(step, **parts)
        if run.is_main:
            export(run, config, ema, locked)


def backward(
    net: nn.Module, images: Tensor, ids: Tensor, loss_of: Callable[[Output], Tensor], microbatch: int, run: Run
) -> Tensor:
    """Add the gradients of a batch's loss, at once or with `microbatch` images in the towers; returns the loss."""
    if 0 < microbatch < len(images):
        scale = run.scaler.scale(torch.ones((), device=run.device))
        assert isinstance(net, CLIP | nn.parallel.DistributedDataParallel)
        return cached_backward(net, images, ids, loss_of, microbatch, run.autocast, scale)
    with run.autocast():
        output = net(images, ids)
    loss = loss_of(output)
    run.scaler.scale(loss).backward()
    return loss


# -- data --------------------------------------------------------------------------------------------------------------


def prepare_data(
    config: Config, splits: Splits, towers: Towers, run: Run
) -> tuple[Pairs | FeaturePairs, Pairs | FeaturePairs]:
    """Training and validation data: as features where the image tower has a locked part."""
    if towers.image_base is None:
        if towers.text_base is not None:
            towers.text_base.to(run.device)
        return splits.train, splits.val
    assert isinstance(splits.train, FilePairs)
    assert isinstance(splits.val, FilePairs)
    val = cache_features(splits.val, towers, config, run)
    return cache_features(splits.train, towers, config, run, config.data.views), val


def open_batches(
    pairs: Pairs | FeaturePairs, config: Config, towers: Towers, run: Run, first_step: int
) -> Iterator[Batch]:
    """This process's share of the batches from step `first_step` on."""
    if isinstance(pairs, FeaturePairs):
        return pairs.batches(config, towers.tokenizer, first_step, run.rank, run.world)
    return batches(
        pairs,
        towers.tokenizer,
        towers.preprocess,
        first_step=first_step,
        batch_size=config.train.batch_size,
        seed=config.seed,
        captions=config.data.captions,
        crop=Crop(config.data.crop, config.data.flip),
        workers=config.data.workers,
        rank=run.rank,
        world=run.world,
        family=config.data.family,
        whole_context=config.model.text.pool == "last",
    )


def inputs(batch: Batch, towers: Towers, run: Run) -> tuple[Tensor, Tensor]:
    """What the model reads, on the device: images or features, and ids or features."""
    images = batch.images.to(run.device)
    ids = batch.ids.to(run.device)
    if images.dtype == torch.uint8:
        images = towers.preprocess.normalise(images)
    if towers.text_base is not None and not ids.is_floating_point():
        with torch.no_grad(), run.autocast():
            ids = towers.text_base(ids).float()
    return images, ids


@torch.no_grad()
def start_heads(towers: Towers, config: Config, run: Run) -> None:
    """Both heads begin with the classes that the image tower was trained on: see `heads.start_from_classes`."""
    assert towers.classifier is not None
    weights, names = towers.classifier
    model = towers.model.eval()
    texts = [f"a photo of a {name}" for name in names]
    found = torch.cat(list(encode_texts(texts, model.text_encoder, towers, config, run)))
    start_from_classes(model.image_head, model.text_head, weights.to(run.device), found)


@torch.no_grad()
def measure_features(pairs: Pairs | FeaturePairs, config: Config, towers: Towers, run: Run) -> None:
    """Mean and deviation of the towers' features, where a head wants them: see `heads.Standard`. Of the first batches,
    as many as give `MEASURED` images.
    """
    model = towers.model.eval()
    of_images = standards(model.image_head)
    of_texts = standards(model.text_head)
    if not of_images and not of_texts:
        return
    image_features: list[Tensor] = []
    text_features: list[Tensor] = []
    data = open_batches(pairs, config, towers, run, 1)
    for _ in range(-(-MEASURED // config.train.batch_size)):
        images, ids = inputs(next(data), towers, run)
        with run.autocast():
            image_features.append(model.image_encoder(images))
            text_features.append(model.text_encoder(ids))
    for part in of_images:
        part.measure(torch.cat(image_features))
    for part in of_texts:
        part.measure(torch.cat(text_features))


# -- what is trained ---------------------------------------------------------------------------------------------------


def optimizer_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
    """`parameter_groups`, those of pretrained layers apart: they learn at `train.tower_lr` times the rate."""
    pretrained = {
        id(parameter)
        for encoder, kind in (
            (model.image_encoder, config.model.image.kind),
            (model.text_encoder, config.model.text.kind),
        )
        if kind == "pretrained"
        for name, parameter in encoder.named_parameters()
        if not name.startswith("pooling.") and ".pooling." not in name
    }
    groups = []
    for group in parameter_groups(model, config.train.weight_decay):
        parameters: Any = group["params"]
        old = [p for p in parameters if id(p) in pretrained]
        new = [p for p in parameters if id(p) not in pretrained]
        groups.append({**group, "params": new, "scale": 1.0})
        groups.append({**group, "params": old, "scale": config.train.tower_lr})
    return [group for group in groups if group["params"]]


def export(run: Run, config: Config, ema: EMA[CLIP], locked: Locked) -> None:
    """`model.safetensors`: the trained weights that evaluation uses."""
    facts = {
        "project": "clip",
        "step": str(run.step),
        "total_steps": str(config.train.steps),
        "locked": locked.hash,
        "config": to_yaml(config),
    }
    export_weights(run.folder / "model.safetensors", ema.state_dict(), facts)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_processes(config: Config, world: int) -> None:
    """`ConfigError` where a batch cannot be divided."""
    even = config.train.batch_size % world == 0
    require(even, "train.batch_size", f"{config.train.batch_size} must be divisible by the {world} processes")


def sizes(config: Config, pairs: Pairs | FeaturePairs, towers: Towers) -> str:
    """One line about what is trained, and on what."""
    model = towers.model
    locked = sum(count_parameters(base) for base in (towers.image_base, towers.text_base) if base is not None)
    epochs = config.train.steps * config.train.batch_size / len(pairs)
    kept = f", {locked / 1e6:.2f}M locked" if locked else ""
    return f"{len(pairs):,} images, {epochs:.1f} epochs; {count_parameters(model) / 1e6:.2f}M parameters trained{kept}"


def describe(config: Config) -> None:
    """What --dry-run prints: the resolved config, then sizes and shapes."""
    check_machine(config)
    splits = load_splits(config)
    towers = build_towers(config)
    print(to_yaml(config), end="")
    print(f"# {sizes(config, splits.train, towers)}")
    size = config.model.image.image_size
    captions = config.train.batch_size * config.data.captions
    print(
        f"# a batch is ({config.train.batch_size}, 3, {size}, {size}) images and ({captions}, "
        f"{config.model.text.context}) tokens; {len(splits.val):,} validation and {len(splits.test):,} test images"
    )
    for note in [*splits.notes, *cut_captions(splits.train, towers.tokenizer)]:
        print(f"# note: {note}")


def cut_captions(pairs: Pairs, tokenizer: Tokenizer) -> list[str]:
    """A note where captions lose their end."""
    texts = [text for i in range(min(len(pairs), CHECKED // 5)) for text in pairs.captions(i)]
    before = tokenizer.num_cut
    tokenizer(texts)
    cut = tokenizer.num_cut - before
    if not cut:
        return []
    return [f"{cut} of {len(texts)} captions are longer than model.text.context={tokenizer.context} and lose their end"]


if __name__ == "__main__":
    train(CONFIG, OPTIONS)

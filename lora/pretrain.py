"""Train a small language model from nothing, on a text file or on text made here:

    python -m lora.pretrain --config configs/lora_tiny.yaml [--out folder] [key=value ...]

Writes a folder of the Hub's layout: tokenizer, config, weights. `model.name=<folder>` then adapts it, as
`model.name=pretrain` does with one that it trains first.

Legend: B rows, T tokens of each.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from lora.config import Config, PretrainConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora", "pretrain", short={"out": "pretrain.out"}, takes="config")

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ProjectError, exits_cleanly
from common.files import place_of
from common.run import Run
from common.runtime import count_parameters
from lora.data.rows import read_text
from lora.data.slots import pretraining_text
from lora.model import Llama, LlamaShape, initialise, write_folder
from lora.model.files import read_settings, weight_files

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
WARMUP = 0.05  # of the steps
STREAM = 5_000_013  # keeps the random numbers of the batches apart


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Train the base that a config's pretrain section describes."""
    folder = Path(config.pretrain.out or Path(config.run_dir) / "base")
    if is_base(folder):
        raise ProjectError(f"{folder} holds a model already: delete it, or choose --out")
    with Run(config, options) as run:
        pretrain_base(config, run, folder)
    print(f"{folder}")


def pretrain_base(config: Config, run: Run, folder: Path) -> None:
    """Train the base and write it to a folder, unless one is there: a resumed run goes on with the one it has."""
    if run.is_main and not is_base(folder):
        texts = load_texts(config.pretrain, config.data_root, config.seed)
        tokenizer = train_tokenizer(texts, config.pretrain.vocab_size)
        model = train_base(config.pretrain, texts, tokenizer, run)
        write_folder(folder, model, tokenizer, torch.float32)
    run.machine.any(False)  # the others wait for the main process


def is_base(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    try:
        read_settings(folder)
        return bool(weight_files(folder))
    except ProjectError:
        return False


def load_texts(config: PretrainConfig, data_root: str, seed: int) -> list[str]:
    """Paragraphs to learn from. `ProjectError` for a file that is missing or too short."""
    if config.text == "generated":
        return pretraining_text(config.sentences, seed)
    path = place_of(config.text, data_root)
    texts = [part.strip() for part in read_text(path).split("\n\n") if part.strip()]
    if not texts:
        raise ProjectError(f"{path} is empty")
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-pair tokenizer (Sennrich et al. 2016) over bytes, so that no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def train_base(config: PretrainConfig, texts: list[str], tokenizer: Any, run: Run) -> Llama:
    """Next-token prediction on rows cut at random from all texts in one stream, each text ended by its own token."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in rows for token in (*row, end)])
    require(
        len(stream) > config.context + 1,
        "pretrain.text",
        f"has {len(stream)} tokens, fewer than a row: pretrain.context={config.context}",
    )
    model = Llama(shape_of(config, len(tokenizer))).to(run.device)
    initialise(model, run.config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run.display.say(f"pretraining {count_parameters(model):,} parameters on {len(stream):,} tokens")
    stream = stream.to(run.device)
    for step in run.track(range(1, config.steps + 1)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, config.steps)
        starts = torch.randint(
            len(stream) - config.context,
            (config.batch_size, 1),
            generator=run.generator(STREAM, step),
            device=run.device,
        )
        window = stream[starts + torch.arange(config.context + 1, device=run.device)]  # (B, T + 1)
        with run.autocast():
            loss = next_token_loss(model, window)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(loss.detach()):
            raise ProjectError(f"the loss is not finite at step {step} of the pretraining: try a lower pretrain.lr")
        optimizer.step()
        if step % 100 == 0 or step == config.steps:
            run.display.say(f"pretraining step {step} of {config.steps}: loss {float(loss.detach()):.3f}")
    return model.eval().requires_grad_(False)


def next_token_loss(model: Llama, window: Tensor) -> Tensor:
    """Mean cross-entropy of each token from those before it. (B, T + 1) -> ()"""
    logits = model(window[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def rate(step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def shape_of(config: PretrainConfig, vocab_size: int) -> LlamaShape:
    """The base's shape."""
    return LlamaShape(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.width // config.heads,
        mlp_width=config.mlp_width,
        context=max(2048, config.context),
        tied=True,
    )


if __name__ == "__main__":
    main(CONFIG, OPTIONS)

"""Put a run's adapter into its base and write one ordinary model:

    python -m lora.merge --run runs/lora_e2e [--out folder] [merge.dtype=fp32]

The folder is of the Hub's layout: transformers, vLLM and llama.cpp's converter read it.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from lora.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora", "merge", short={"out": "merge.out"})

import gc
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import ProjectError, exits_cleanly
from common.run import Run
from lora.adapters.inject import merge, unload
from lora.model import Llama, write_folder
from lora.model.load import DTYPES
from lora.tuning import load_tuned


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Write the merged model of a run."""
    require(
        not config.classifies or config.model.pooling == "model",
        "model.pooling",
        "is mean, which no class of transformers does: a merged model would answer otherwise. lora.classify reads the "
        "run as it is; train with model.pooling=model for one to merge",
    )
    folder = Path(config.merge.out or Path(config.run_dir) / "merged")
    if (folder / "model.safetensors").exists():
        raise ProjectError(f"{folder} holds a model already: delete it, or choose --out")
    # onto the original weights, in full precision, whatever the training computed in and on: 4-bit codes cannot take
    # up a small update, and bfloat16 would round twice
    config = replace(config, model=replace(config.model, quantize="none", dtype="fp32"))
    with Run(config, options) as run:
        base, step = load_tuned(config, options, run)
        if config.train.method == "lora":
            merge(base.model, keep=False, untie=config.merge.untie)
            unload(base.model)
            gc.collect()
        if config.merge.untie and isinstance(base.model, Llama):
            base.model.shape = replace(base.model.shape, tied=is_tied(base.model))
        write_folder(folder, base.model, base.tokenizer, DTYPES[config.merge.dtype])
        run.display.say(f"{folder}: {run.folder.name} after {step} steps, merged, in {config.merge.dtype}")


def is_tied(model: Llama) -> bool:
    """Whether head and embedding are still one weight."""
    head: torch.Tensor = model.lm_head.weight
    return head is model.model.embed_tokens.weight


if __name__ == "__main__":
    main(CONFIG, OPTIONS)

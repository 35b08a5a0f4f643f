"""A model as a config describes it, or as a run has left it."""

from __future__ import annotations

from pathlib import Path

from common.checkpoint import CheckpointError, Checkpoints
from common.config import Options
from common.run import Run
from vae.config import Config
from vae.ladder import Ladder
from vae.likelihoods import build_likelihood
from vae.model import VAE, Autoencoder


def build_model(config: Config) -> Autoencoder:
    """A new model with its likelihood."""
    likelihood = build_likelihood(config.likelihood, config.model.image_channels)
    kind = Ladder if config.model.kind == "ladder" else VAE
    return kind(config.model, config.data.image_size, likelihood)


def load_model(config: Config, options: Options, run: Run) -> tuple[Autoencoder, int]:
    """The model of a run's newest whole checkpoint (or of `--checkpoint`), with its averaged weights, which are those
    of the last step where train.ema is 0; and the number of updates it has seen.
    """
    folder = run.folder / "checkpoints"
    chosen = Path(options.checkpoint)
    if chosen.name == options.checkpoint:  # a bare name is one of this run's; a path is taken as it stands
        chosen = folder / chosen
    state = Checkpoints.load(chosen) if options.checkpoint else Checkpoints(folder).load_newest()
    if state is None:
        raise CheckpointError(f"no whole checkpoint in {folder}; train first, or give another --run")
    model = build_model(config)
    try:
        model.load_state_dict(state["parts"]["ema"])
    except (RuntimeError, KeyError, TypeError):
        raise CheckpointError(
            f"the checkpoint in {folder} is of another model than the config's model section"
        ) from None
    return model.to(run.device).eval().requires_grad_(False), int(state["step"])

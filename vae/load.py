"""A model as a config describes it, or as a run has left it."""

from __future__ import annotations

from common.checkpoint import UNFIT, CheckpointError, load_chosen
from common.config import Options
from common.provenance import trained_otherwise
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
    state = load_chosen(folder, options.checkpoint)
    another = f"the checkpoint in {folder} is of another model than the config's model section"
    # before a model is built that may be far larger than what was trained
    problem = trained_otherwise(
        state.get("config", ""), config, ("model.", "likelihood."), ("model.dropout", "model.init")
    )
    if problem:
        raise CheckpointError(f"{another}: {problem}")
    model = build_model(config)
    try:
        model.load_state_dict(state["parts"]["ema"])
        step = int(state["step"])
    except UNFIT:
        raise CheckpointError(another) from None
    return model.to(run.device).eval().requires_grad_(False), step

"""AdamW, with its two moments in 32 or in 8 bits."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from common.errors import ProjectError
from lora.config import TrainConfig


def build_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of some parameter groups; each remembers as `ratio` its rate over `config.lr`.

    `ProjectError` for 8-bit moments without bitsandbytes. Those are quantised in blocks (Dettmers et al. 2022); tensors
    of fewer than 4,096 numbers keep 32 bits.
    """
    groups = [group | {"ratio": group["lr"] / config.lr} for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        device = groups[0]["params"][0].device
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **settings)
    try:
        optim: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        raise ProjectError(f"train.optimizer={config.optimizer} needs: pip install bitsandbytes") from None
    kind = optim.AdamW8bit if config.optimizer == "adamw8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer

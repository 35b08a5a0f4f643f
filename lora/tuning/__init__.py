"""What a training run consists of beside its loop: the base and what of it learns, the task, optimizer, processes."""

from lora.tuning.base import BASE, Base, Learned, load_base, load_tuned, prepare
from lora.tuning.optimizers import build_optimizer
from lora.tuning.sharding import average_gradients, shard_model, share_of, without_sync
from lora.tuning.tasks import Classes, Instructions, Source, load_source

__all__ = [
    "BASE",
    "Base",
    "Classes",
    "Instructions",
    "Learned",
    "Source",
    "average_gradients",
    "build_optimizer",
    "load_base",
    "load_source",
    "load_tuned",
    "prepare",
    "shard_model",
    "share_of",
    "without_sync",
]

"""Parameter-efficient finetuning from scratch: low-rank adapters on a frozen, possibly 4-bit base."""

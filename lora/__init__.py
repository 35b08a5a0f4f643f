"""Parameter-efficient finetuning from scratch: low-rank adapters on a frozen, possibly 4-bit base."""

from common.projects import Demo, Metric

METRICS = {
    "bleu": Metric("BLEU", "higher", "percent", leads=True),
    "exact_match": Metric("Exact match", "higher", "percent", leads=True),
    "accuracy": Metric("Accuracy", "higher", "percent", leads=True),
    "matthews": Metric("Matthews correlation", "higher", leads=True),
    "rouge_l": Metric("ROUGE-L", "higher", "percent", leads=True),
    "loss": Metric("Loss (nats a token)", "lower"),
    "perplexity": Metric("Perplexity of the answers", "lower", leads=True),
    "general_perplexity": Metric("Perplexity of general text", "lower"),
    "loss_base": Metric("Loss of the base", "lower"),
    "perplexity_base": Metric("Perplexity of the answers to the base", "lower"),
    "general_perplexity_base": Metric("Perplexity of general text to the base", "lower"),
    "*_gain_low": Metric("What {} gained over the base, lower end (95 %)"),
    "*_gain_high": Metric("What {} gained over the base, upper end (95 %)"),
    "*_low": Metric("{}, lower end of the interval (95 %)"),
    "*_high": Metric("{}, upper end of the interval (95 %)"),
    "*_base": Metric("{} of the base", "higher"),
}
DEMO = Demo("lora", "configs/lora_tiny.yaml", seconds=60)

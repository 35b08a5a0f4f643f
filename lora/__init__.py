"""Parameter-efficient finetuning from scratch: low-rank adapters on a frozen, possibly 4-bit base."""

from common.projects import Demo, Metric

SCORES = {"bleu": "BLEU", "exact_match": "Exact match", "rouge_l": "ROUGE-L", "accuracy": "Accuracy"}  # fractions
VARIANTS = {
    "base": "{} of the base",
    "gain_low": "{} gained over the base, at least (95 %)",
    "gain_high": "{} gained over the base, at most (95 %)",
    "low": "{}, at least (95 %)",
    "high": "{}, at most (95 %)",
}
METRICS = {
    **{name: Metric(label, "higher", "percent", leads=True) for name, label in SCORES.items()},
    "matthews": Metric("Matthews correlation", "higher", leads=True),
    "loss": Metric("Loss (nats a token)", "lower"),
    "perplexity": Metric("Perplexity of the answers", "lower", leads=True),
    "general_perplexity": Metric("Perplexity of general text", "lower"),
    "loss_base": Metric("Loss of the base", "lower"),
    "perplexity_base": Metric("Perplexity of the answers to the base", "lower"),
    "general_perplexity_base": Metric("Perplexity of general text to the base", "lower"),
    **{
        f"{name}_{variant}": Metric(text.format(label), "", "percent")
        for name, label in SCORES.items()
        for variant, text in VARIANTS.items()
    },
    "matthews_low": Metric("Matthews correlation, at least (95 %)"),
    "matthews_high": Metric("Matthews correlation, at most (95 %)"),
    # of lora.many --measure
    "routing_accuracy": Metric("Prompts that find their adapter", "higher", "percent"),
    "routed_*": Metric("Prompts of {} that do", "higher", "percent"),
}
DEMO = Demo("lora", "configs/lora_tiny.yaml", seconds=60)

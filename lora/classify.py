"""Sort texts with a finetuned classifier:

    python -m lora.classify --run runs/lora_sst2 "a charming film" ["another text" ...] [key=value ...]
    python -m lora.classify --run runs/lora_sst2 < texts.txt                          one text a line
    python -m lora.classify --run runs/tickets --file new.csv --out sorted.csv        the column data.text_column

Prints the most probable class of each text, its probability and the text, with tabs between.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from lora.config import Config

if __name__ == "__main__":
    SHORT = {"file": "classify.file", "out": "classify.out"}
    CONFIG, OPTIONS = load(Config, "lora", "classify", short=SHORT, words="text")

from pathlib import Path

from common.errors import ProjectError, exits_cleanly
from common.files import place_of, write_csv
from common.run import Run
from lora.data.classes import COLUMNS
from lora.data.rows import lines_of_stdin, read_csv_rows
from lora.metrics.losses import class_log_probs
from lora.tuning import load_tuned


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Classify the texts of the command line, of a file, or of stdin."""
    require(config.classifies, "data.dataset", f"{config.data.dataset} is no classifier's: lora.generate answers")
    rows = read_texts(config, list(options.words))
    with Run(config, options) as run:
        base, _ = load_tuned(config, options, run)
        texts = [row[config.data.text_column] for row in rows]
        probabilities = class_log_probs(base.model, texts, base.tokenizer, config, run).exp()
    found = []
    for row, each in zip(rows, probabilities.tolist(), strict=True):
        best = max(range(len(base.classes)), key=each.__getitem__)
        found.append({**row, "predicted": base.classes[best], "probability": round(each[best], 4)})
    if config.classify.out:
        write_csv(Path(config.classify.out), found)
    for row in found:
        print(f"{row['predicted']}\t{row['probability']:.3f}\t{row[config.data.text_column]}", flush=True)


def read_texts(config: Config, words: list[str]) -> list[dict[str, str]]:
    """Rows with a text each, whole as they stand in the file. `ProjectError` where there is no text."""
    column = config.data.text_column
    if config.classify.file:
        require(not words, "classify.file", "is given, and texts on the command line, too: choose one of them")
        path = place_of(config.classify.file, config.data_root)
        rows = [dict(row) for _, row in read_csv_rows(path, (column,), COLUMNS)]
    else:
        rows = [{column: line} for line in words or lines_of_stdin("text")]
    if not rows:
        raise ProjectError(f"{config.classify.file} has no texts")
    return rows


if __name__ == "__main__":
    main(CONFIG, OPTIONS)

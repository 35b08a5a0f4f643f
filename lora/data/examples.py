"""Prompts with the answers to learn, from public datasets in their own formats, or from a person's own file.

Looked for under `data_root`, each as its authors published it or as one JSON object a line:

    e2e_nlg/{train,dev,test}.jsonl       {"mr", "refs"}; or the challenge's trainset.csv, devset.csv, testset_w_refs.csv
    webnlg/{train,dev,test}.jsonl        {"triples", "texts"}
    gsm8k/{train,test}.jsonl             {"question", "answer"}
    squad/{train,dev}-v1.1.json          as published
    alpaca*/*.json*, dolly*/*.json*      {"instruction", "input", "output"}, or Dolly's {"context", "response"}
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import ProjectError
from common.files import place_of
from common.runtime import mix_seed
from lora.config import DataConfig
from lora.data.rows import Row, hub_rows, read_csv_rows, read_json_rows, read_text, text_of
from lora.data.slots import slot_examples

Split = Literal["train", "validation", "test"]
Say = Callable[[str], None]
# cuts a dataset without parts of its own; the same for every run, so that no test example leaks
SPLIT_SEED = 20_240_601
FEWEST = "; one without parts of its own is cut in three, so it needs at least three different prompts"
COLUMNS = "; data.prompt_column and data.completion_column say which are meant"
HUB = {  # where a dataset is had from when it is not on this machine: id, part of it
    "gsm8k": ("openai/gsm8k", "main"),
    "squad": ("rajpurkar/squad", None),
    "alpaca": ("tatsu-lab/alpaca", None),
    "dolly": ("databricks/databricks-dolly-15k", None),
}


@dataclass(frozen=True)
class Example:
    """One thing to learn.

    Attributes:
        id: the person's or the dataset's own, or the place in its file.
        prompt: what is asked.
        context: what it is asked of; may be empty.
        completion: the answer.
        references: every answer that counts as right, to be compared with.
        group: examples of one group stay in one part of the data.
    """

    id: str
    prompt: str
    completion: str
    context: str = ""
    references: tuple[str, ...] = ()
    group: str = ""


def load_examples(config: DataConfig, data_root: str, split: Split, say: Say = print) -> list[Example]:
    """One part of a dataset. Examples without an answer are left out and counted; `ProjectError` for what is broken."""
    root = Path(data_root)
    if config.dataset == "slots":
        return slot_examples(split)
    if config.dataset == "e2e":
        found = read_e2e(root / "e2e_nlg", split)
    elif config.dataset == "webnlg":
        found = read_webnlg(root / "webnlg", split)
    elif config.dataset == "gsm8k":
        found = cut(read_gsm8k(root / "gsm8k", split), split, config, held_out="test")
    elif config.dataset == "squad":
        found = cut(read_squad(root / "squad", split), split, config, held_out="test")
    else:
        found = cut(read_instructions(config, root), split, config)
    whole = [example for example in found if example.completion.strip()]
    if len(whole) < len(found):
        say(f"note: {len(found) - len(whole)} of {len(found)} {split} examples have no answer and are left out")
    if not whole:
        raise ProjectError(f"there is nothing in the {split} part of data.dataset={config.dataset}{FEWEST}")
    return whole


def cut(examples: list[Example], split: Split, config: DataConfig, held_out: str = "") -> list[Example]:
    """The part of a dataset that has none of its own; with `held_out` only train and validation share what is given.

    Cut between groups, drawn by a seed that is always the same.
    """
    if held_out == split:
        return examples
    groups = sorted({example.group or example.prompt + example.context for example in examples})
    random.Random(mix_seed(SPLIT_SEED, len(groups))).shuffle(groups)
    num_test = 0 if held_out else max(1, round(config.test * len(groups)))
    num_validation = max(1, round(config.validation * len(groups)))
    wanted = {
        "test": set(groups[:num_test]),
        "validation": set(groups[num_test : num_test + num_validation]),
        "train": set(groups[num_test + num_validation :]),
    }[split]
    return [example for example in examples if (example.group or example.prompt + example.context) in wanted]


# -- from data to text -------------------------------------------------------------------------------------------------


def read_e2e(folder: Path, split: Split) -> list[Example]:
    """The E2E NLG challenge (Novikova et al. 2017): slots of a restaurant, and what people wrote about it.

    For training each reference is an example; else each meaning is one, with all of its references.
    """
    name = {"train": "train", "validation": "dev", "test": "test"}[split]
    official = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}[split]
    meanings: dict[str, list[str]] = {}
    if (folder / f"{name}.jsonl").is_file():
        for place, row in read_json_rows(folder / f"{name}.jsonl"):
            meanings.setdefault(text_of(place, row, "mr"), []).extend(texts_of(place, row, "refs"))
    elif (folder / official).is_file():
        for place, row in read_csv_rows(folder / official, ("mr", "ref")):
            meanings.setdefault(text_of(place, row, "mr"), []).append(text_of(place, row, "ref"))
    else:
        raise missing(folder, f"{name}.jsonl or {official}", "https://github.com/tuetschek/e2e-dataset")
    prompts = {meaning: meaning.replace("[", ": ").replace("]", "") for meaning in meanings}
    return paired([(f"{split}-{i}", prompts[mr], refs) for i, (mr, refs) in enumerate(meanings.items())], split)


def read_webnlg(folder: Path, split: Split) -> list[Example]:
    """WebNLG (Gardent et al. 2017): facts as subject, relation, object, and texts that say them."""
    path = folder / f"{ {'train': 'train', 'validation': 'dev', 'test': 'test'}[split] }.jsonl"
    if not path.is_file():
        raise missing(folder, path.name, "https://gitlab.com/shimorina/webnlg-dataset, as {triples, texts}")
    facts = []
    for number, (place, row) in enumerate(read_json_rows(path)):
        triples = [" | ".join(spoken(part) for part in fact.split(" | ")) for fact in texts_of(place, row, "triples")]
        name = f"{row.get('category', split)}-{row.get('eid', number)}-{number}"
        facts.append((name, "\n".join(triples), texts_of(place, row, "texts")))
    return paired(facts, split)


def spoken(name: str) -> str:
    """A name of DBpedia as words: no underscores, no quotes, no doubled blanks."""
    return " ".join(name.replace("_", " ").strip('"').split())


def paired(items: list[tuple[str, str, list[str]]], split: Split) -> list[Example]:
    """(id, prompt, references) -> an example for each reference in training, else one with all of them."""
    if split == "train":
        return [Example(f"{name}.{i}", prompt, ref) for name, prompt, refs in items for i, ref in enumerate(refs)]
    return [Example(name, prompt, refs[0], references=tuple(refs)) for name, prompt, refs in items if refs]


# -- questions ---------------------------------------------------------------------------------------------------------


def read_gsm8k(folder: Path, split: Split) -> list[Example]:
    """GSM8K (Cobbe et al. 2021): school problems, solved step by step; the result stands after ####."""
    name = "test" if split == "test" else "train"
    path = folder / f"{name}.jsonl"
    rows = read_json_rows(path) if path.is_file() else hub_rows(*HUB["gsm8k"], name)
    examples = []
    for number, (place, row) in enumerate(rows):
        answer = text_of(place, row, "answer")
        question = text_of(place, row, "question")
        examples.append(Example(f"{name}-{number}", question, answer, references=(answer,)))
    return examples


def read_squad(folder: Path, split: Split) -> list[Example]:
    """SQuAD 1.1 (Rajpurkar et al. 2016): a passage, a question, the words of the passage that answer it. Its public
    development part is the test here; validation is cut from training by article.
    """
    name = "dev" if split == "test" else "train"
    path = folder / f"{name}-v1.1.json"
    if not path.is_file():
        rows = hub_rows(*HUB["squad"], "validation" if name == "dev" else "train")
        return [
            answered(row["id"], row["context"], row["question"], row["answers"]["text"], row["title"])
            for _, row in rows
        ]
    try:
        articles = json.loads(read_text(path))["data"]
        return [
            answered(qa["id"], part["context"], qa["question"], [a["text"] for a in qa["answers"]], article["title"])
            for article in articles
            for part in article["paragraphs"]
            for qa in part["qas"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProjectError(f"{path} is not SQuAD 1.1: {type(error).__name__} {error}") from None


def answered(name: str, passage: str, question: str, answers: list[str], title: str) -> Example:
    """A question of a passage; the first answer is learnt, any is right."""
    prompt = f"{passage}\nQuestion: {question}\nAnswer:"
    return Example(name, prompt, answers[0] if answers else "", references=tuple(answers), group=title)


# -- instructions ------------------------------------------------------------------------------------------------------


def read_instructions(config: DataConfig, root: Path) -> list[Example]:
    """Alpaca, Dolly, or a file or Hub dataset with columns of the names that the config gives."""
    remedy = ""
    if config.dataset == "json":
        path = place_of(config.path, root)
        rows = read_json_rows(path) if path.is_file() else hub_or_missing(config.path, path)
        names = (config.prompt_column, config.input_column, config.completion_column)
        remedy = COLUMNS
    else:
        rows = local_rows(root, config.dataset) or hub_rows(*HUB[config.dataset], "train")
        original = config.dataset == "dolly" and "response" in rows[0][1]
        names = ("instruction", "context", "response") if original else ("instruction", "input", "output")
    examples = []
    for place, row in rows:
        asked = text_of(place, row, names[0], remedy=remedy)
        about = text_of(place, row, names[1], optional=True)
        answer = text_of(place, row, names[2], remedy=remedy)
        examples.append(Example(str(row.get("id", place.rsplit(", ")[-1])), asked, answer, about, (answer,)))
    return examples


def local_rows(root: Path, dataset: str) -> list[Row]:
    """The rows of the first JSON or JSONL file in a folder whose name begins with the dataset's; empty without one."""
    files = [*root.glob(f"{dataset}*/*.json"), *root.glob(f"{dataset}*/*.jsonl")]
    return read_json_rows(sorted(files)[0]) if files else []


def hub_or_missing(name: str, path: Path) -> list[Row]:
    """The rows of a Hub dataset, for a name that can be one."""
    if path.suffix in (".json", ".jsonl") or name.count("/") > 1:
        raise ProjectError(f"data.path: there is no file {path}")
    return hub_rows(name, None, "train")


def texts_of(place: str, row: dict[str, Any], column: str) -> list[str]:
    """One column as a list of texts. `ProjectError` where it is missing or something else."""
    value = row.get(column)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ProjectError(f"{place}: {column!r} must be a list of texts")
    return value


def missing(folder: Path, files: str, source: str) -> ProjectError:
    """What to put where."""
    return ProjectError(f"put {files} into {folder} ({source}); configs/lora_tiny.yaml needs no download")

"""SQuAD v1.1 as an open corpus, and NQ-open over Wikipedia."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from common.errors import ProjectError
from rag.config import DataConfig
from rag.data.corpus import Collection, LineTable, Passage, Passages, Question, split_by_group
from rag.data.files import find, read_jsonl

SQUAD_REMEDY = "download train-v1.1.json and dev-v1.1.json from https://rajpurkar.github.io/SQuAD-explorer/"
NQ_REMEDY = (
    "download NQ-open.train.jsonl and NQ-open.dev.jsonl from github.com/google-research-datasets/natural-questions"
)
WIKIPEDIA_REMEDY = (
    "download https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz (4.7 GB; 13 GB unpacked) and "
    "gunzip it"
)


def load_squad(root: Path, config: DataConfig) -> Collection:
    """SQuAD v1.1 (Rajpurkar et al. 2016), whose questions were asked about one paragraph each: here they are asked of
    all paragraphs of both files together, the same text once.

    Train and validation: questions of the training articles, split by article. Test: those of the development file.
    The questions were written with the paragraph before the writer's eyes and repeat its words, so that search by words
    is strong here by construction (Lee et al. 2019, section 6).
    """
    passages: dict[str, Passage] = {}  # by text
    asked: dict[str, list[Question]] = {}
    count = 0
    for part in ("train", "dev"):
        path = find(root / "squad" / f"{part}-v1.1.json", SQUAD_REMEDY)
        asked[part] = []
        try:
            articles = json.loads(path.read_text(encoding="utf-8"))["data"]
            for article in articles:
                group = f"{part}/{article['title']}"
                title = article["title"].replace("_", " ")
                for number, paragraph in enumerate(article["paragraphs"]):
                    count += 1
                    text = paragraph["context"]
                    passage = passages.setdefault(text, Passage(f"{group}/{number}", text, title, group))
                    asked[part] += [read_question(item, passage, group) for item in paragraph["qas"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ProjectError(f"{path} is not in SQuAD's format: {type(error).__name__} {error}") from None
    train, validation = split_by_group(asked["train"], config.validation, config.world)
    notes = [f"{count - len(passages)} of {count} paragraphs repeat another's text"]
    return Collection("squad", Passages(passages.values()), train, validation, asked["dev"], notes)


def read_question(item: dict[str, Any], passage: Passage, group: str) -> Question:
    """A question of SQuAD's JSON; its answers without repetition."""
    answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
    return Question(item["id"], item["question"].strip(), answers, {passage.id: 1}, group)


def load_nq(root: Path, config: DataConfig) -> Collection:
    """NQ-open (Lee et al. 2019): questions that people typed into a search engine, with short answers and no passages.
    They are searched in the 21 million passages of Wikipedia that DPR was evaluated on (Karpukhin et al. 2020).

    Nobody has judged passages, so only measures by answer string apply, and a training question's passage is the best
    one that BM25 finds with the answer in it. Test: the development file, as in all papers.
    """
    folder = root / "nq_open"
    table = find(folder / "psgs_w100.tsv", WIKIPEDIA_REMEDY)
    questions = read_nq(find(folder / "NQ-open.train.jsonl", NQ_REMEDY), "train")
    train, validation = split_by_group(questions, config.validation, config.world)
    test = read_nq(find(folder / "NQ-open.dev.jsonl", NQ_REMEDY), "dev")
    return Collection("nq", LineTable(table, parse_wikipedia, first=1, header=1), train, validation, test)


def read_nq(path: Path, part: str) -> list[Question]:
    """The questions of a file of NQ-open; each is a group of its own."""
    try:
        return [
            Question(f"{part}-{i}", item["question"], tuple(item["answer"])) for i, item in enumerate(read_jsonl(path))
        ]
    except (KeyError, TypeError) as error:
        raise ProjectError(f"{path} is not in NQ-open's format: {error}") from None


def parse_wikipedia(line: str) -> Passage:
    """A line `id, text, title` of DPR's table, where quotation marks are doubled within quotation marks."""
    number, text, title = (next(csv.reader([line], delimiter="\t")) + ["", "", ""])[:3]
    return Passage(number, text, title, title)

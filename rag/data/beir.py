"""Collections with judged passages: BEIR's layout, SciFact as published, MS MARCO."""

from __future__ import annotations

from pathlib import Path

from common.errors import ProjectError
from rag.config import DataConfig
from rag.data.corpus import Collection, LineTable, Passage, Question, split_by_group, unique
from rag.data.files import find, read_jsonl, read_table

BEIR_REMEDY = (
    "a folder in BEIR's layout has corpus.jsonl, queries.jsonl and qrels/test.tsv, for example from "
    "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/"
)
SCIFACT_REMEDY = "unpack https://scifact.s3-us-west-2.amazonaws.com/release/latest/data.tar.gz there"
MSMARCO_REMEDY = "unpack https://msmarco.z22.web.core.windows.net/msmarcoranking/collectionandqueries.tar.gz there"


def load_beir(folder: Path, config: DataConfig) -> Collection:
    """A folder in the layout of BEIR (Thakur et al. 2021). Where it has no qrels/dev.tsv, a share of the training
    questions is for validation; where it has no qrels/train.tsv either, there is nothing to train or to choose on.
    """
    notes: list[str] = []
    path = find(folder / "corpus.jsonl", BEIR_REMEDY)
    try:
        passages = unique(
            (Passage(str(item["_id"]), item["text"], item.get("title") or "") for item in read_jsonl(path)), notes
        )
        queries = find(folder / "queries.jsonl", BEIR_REMEDY)
        texts = {str(item["_id"]): str(item["text"]) for item in read_jsonl(queries)}
    except KeyError as error:
        raise ProjectError(f"{folder} is not in BEIR's layout: a line has no {error}") from None
    splits: dict[str, list[Question]] = {}
    for part in ("train", "dev", "test"):
        table = folder / "qrels" / f"{part}.tsv"
        rows = read_table(table, 3, header=1) if table.is_file() or part == "test" else []
        if part == "test":
            find(table, BEIR_REMEDY)
        splits[part] = judged(texts, ((row[0], row[1], row[2]) for row in rows), table)
    train, validation = splits["train"], splits["dev"]
    if train and not validation:
        train, validation = split_by_group(train, config.validation, config.world)
    return Collection(folder.name, passages, train, validation, splits["test"], notes)


def judged(texts: dict[str, str], rows, table: Path) -> list[Question]:  # type: ignore[no-untyped-def]  # (query, passage, grade) each
    """Questions from judgements, in the order in which they are first judged."""
    gold: dict[str, dict[str, int]] = {}
    for query, passage, grade in rows:
        if query not in texts:
            raise ProjectError(f"{table}: judges the query {query!r}, which is not among the queries")
        gold.setdefault(query, {})[passage] = int(grade)
    return [Question(query, texts[query], gold=grades) for query, grades in gold.items()]


def load_scifact(root: Path, config: DataConfig) -> Collection:
    """SciFact (Wadden et al. 2020) as BEIR searches it: claims, and the abstracts that they were written from. Test:
    the 300 claims of the published development file.
    """
    notes: list[str] = []
    folder = root / "scifact"
    path = find(folder / "corpus.jsonl", SCIFACT_REMEDY)
    try:
        passages = unique(
            (Passage(str(item["doc_id"]), " ".join(item["abstract"]), item["title"]) for item in read_jsonl(path)),
            notes,
        )
        splits = {}
        for part, names in (("train", ["claims_train"]), ("test", ["claims_dev", "claims_validation"])):
            paths = [folder / f"{name}.jsonl" for name in names]
            chosen = next((item for item in paths if item.is_file()), paths[0])
            splits[part] = [
                Question(str(item["id"]), item["claim"], gold={str(doc): 1 for doc in item["cited_doc_ids"]})
                for item in read_jsonl(find(chosen, SCIFACT_REMEDY))
            ]
    except (KeyError, TypeError) as error:
        raise ProjectError(f"{folder} is not in SciFact's format: {error}") from None
    train, validation = split_by_group(splits["train"], config.validation, config.world)
    return Collection("scifact", passages, train, validation, splits["test"], notes)


def load_msmarco(root: Path, config: DataConfig) -> Collection:
    """MS MARCO passages (Bajaj et al. 2016), 8.8 million; test: the small development set of 6,980 queries, as in all
    papers.
    """
    folder = root / "msmarco"
    table = find(folder / "collection.tsv", MSMARCO_REMEDY)
    splits = {}
    for part, name in (("train", "train"), ("test", "dev.small")):
        queries = find(folder / f"queries.{name}.tsv", MSMARCO_REMEDY)
        qrels = find(folder / f"qrels.{name}.tsv", MSMARCO_REMEDY)
        texts = {row[0]: row[1] for row in read_table(queries, 2)}
        splits[part] = judged(texts, ((row[0], row[2], row[3]) for row in read_table(qrels, 4)), qrels)
    train, validation = split_by_group(splits["train"], config.validation, config.world)
    return Collection("msmarco", LineTable(table, parse_msmarco), train, validation, splits["test"])


def parse_msmarco(line: str) -> Passage:
    """A line `id, text`."""
    number, _, text = line.partition("\t")
    return Passage(number, text)

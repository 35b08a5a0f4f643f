"""CACM and Cranfield in the format they have had since the sixties: `.I` begins a record, `.T` its title, and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from common.errors import ProjectError
from rag.data.corpus import Collection, Passage, Passages, Question
from rag.data.files import find

CACM_REMEDY = "unpack cacm.tar.gz of https://ir.dcs.gla.ac.uk/resources/test_collections/cacm/ there"
CRANFIELD_REMEDY = "unpack cran.tar.gz of https://ir.dcs.gla.ac.uk/resources/test_collections/cran/ there"
MARK = re.compile(r"^\.([A-Z])(?: +(\d+))? *$")


def read_records(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(number, field -> text) of each record, in their order; lines of a field are joined by spaces."""
    records: list[tuple[str, dict[str, str]]] = []
    field = ""
    for line in path.read_text(encoding="latin-1").splitlines():
        mark = MARK.match(line)
        if mark and mark[1] == "I" and mark[2]:
            records.append((str(int(mark[2])), {}))
            field = ""
        elif mark and records:
            field = mark[1]
        elif records and field:
            before = records[-1][1].get(field, "")
            records[-1][1][field] = f"{before} {line.strip()}".strip()
    if not records:
        raise ProjectError(f"{path} has no record that begins with .I")
    return records


def make_passages(path: Path, fields: str) -> Passages:
    """The title of each document, and the text of its other fields."""
    return Passages(
        Passage(number, " ".join(item[name] for name in fields if name in item), item.get("T", ""))
        for number, item in read_records(path)
    )


def read_judgements(path: Path) -> Iterable[tuple[str, str, str]]:
    """(query, document, third column) of each line."""
    for line in path.read_text(encoding="latin-1").splitlines():
        cells = line.split()
        if cells:
            yield str(int(cells[0])), str(int(cells[1])), cells[2]


def load_cacm(root: Path) -> Collection:
    """CACM: 3,204 titles from the Communications of the ACM, half of them with an abstract, with authors and keywords;
    64 queries, some of which ask for an author, of which 52 are judged and tested on.
    """
    folder = root / "ir_cacm"
    passages = make_passages(find(folder / "cacm.all", CACM_REMEDY), "WAK")
    gold: dict[str, dict[str, int]] = {}
    for query, document, _ in read_judgements(find(folder / "qrels.text", CACM_REMEDY)):
        gold.setdefault(query, {})[document] = 1
    queries = read_records(find(folder / "query.text", CACM_REMEDY))
    return Collection("cacm", passages, test=[Question(i, q["W"], gold=gold[i]) for i, q in queries if i in gold])


def load_cranfield(root: Path) -> Collection:
    """Cranfield: 1,400 abstracts on aerodynamics, 225 questions with graded judgements.

    The judgements count the questions from 1 on, whatever number these have. Their code 1 is a complete answer and 4 of
    least interest (-1, which each question has once, is taken for a 1); it becomes a grade of 4 to 1.
    """
    folder = root / "ir_cranfield"
    passages = make_passages(find(folder / "cran.all.1400", CRANFIELD_REMEDY), "W")
    gold: dict[str, dict[str, int]] = {}
    for query, document, code in read_judgements(find(folder / "cranqrel", CRANFIELD_REMEDY)):
        gold.setdefault(query, {})[document] = 5 - min(5, max(1, int(code)))
    queries = read_records(find(folder / "cran.qry", CRANFIELD_REMEDY))
    test = [Question(str(n), q["W"], gold=gold.get(str(n), {})) for n, (_, q) in enumerate(queries, start=1)]
    return Collection("cranfield", passages, test=test)

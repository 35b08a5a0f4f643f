"""Passages and questions: public collections, a person's own folder, and a world that is made up."""

from __future__ import annotations

from pathlib import Path

from common.files import place_of
from rag.config import DataConfig
from rag.data.corpus import Collection, Passage, Passages, Question, check, shrink

__all__ = ["Collection", "Passage", "Passages", "Question", "load_collection"]


def load_collection(config: DataConfig, data_root: str) -> Collection:
    """The collection that the config names, checked. `ProjectError` where it is missing or broken."""
    from rag.data import beir, classic, documents, factworld, squad

    root = Path(data_root)
    loaders = {
        "factworld": lambda: factworld.load(config),
        "squad": lambda: squad.load_squad(root, config),
        "nq": lambda: squad.load_nq(root, config),
        "msmarco": lambda: beir.load_msmarco(root, config),
        "beir": lambda: beir.load_beir(place_of(config.folder, root), config),
        "scifact": lambda: beir.load_scifact(root, config),
        "cacm": lambda: classic.load_cacm(root),
        "cranfield": lambda: classic.load_cranfield(root),
        "folder": lambda: documents.load_folder(place_of(config.folder, root), config),
    }
    return check(shrink(loaders[config.dataset](), config.max_passages, config.max_questions, config.world))

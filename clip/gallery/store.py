"""Embeddings on disk: one SQLite file that knows which image files there are and what each of them is like.

    facts    whose weights, which folder
    vectors  one row a content: SHA-256 of the file's bytes -> embedding
    files    one row a path: size and time of the last change -> vector

A file that was renamed or copied has a content that is known, and is not embedded again. SQLite's transactions are
whole or absent: whatever kills the program, what was committed is there, and the rest is computed the next time.

Legend: N vectors, E numbers of an embedding.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import ProjectError

FORMAT = "1"
APPLICATION = 0x434C4950  # "CLIP": whose database it is
WAIT = 30.0  # seconds for another process to finish its transaction
SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE vectors (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, vector BLOB NOT NULL);
CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
                    vector INTEGER NOT NULL REFERENCES vectors (id));
CREATE INDEX by_vector ON files (vector);
"""


class Stamp(NamedTuple):
    """What tells cheaply whether a file is still the one that was embedded."""

    size: int  # bytes
    mtime: int  # nanoseconds


class Entry(NamedTuple):
    """One file as the store is to know it. A path is bytes below the folder: names need not be any text."""

    path: bytes
    stamp: Stamp
    digest: bytes  # SHA-256 of the content
    vector: np.ndarray | None  # float32 (E,); None where the digest is known already


class Store:
    """The embeddings of one folder by one model.

    Args:
        weights: hash of the model's weights. model: what a person calls it.
        folder: the images'.
        rebuild: forget everything that the file holds.
    Raises:
        ProjectError: the file is something else, is damaged, or was made with other weights or for another folder.
    """

    def __init__(self, path: Path, weights: str, model: str, folder: Path, rebuild: bool = False) -> None:
        self.path = path
        facts = {"format": FORMAT, "weights": weights, "model": model, "folder": os.fsencode(folder).hex()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ProjectError(f"cannot open the index {path}: {error}; give another --index") from None
        try:
            with self.working():
                self._open(facts, rebuild)
        except BaseException:
            self.close()
            raise

    def _open(self, facts: dict[str, str], rebuild: bool) -> None:
        """Make the tables of a new file, or compare the facts of an old one."""
        names = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
        (application,) = self.connection.execute("PRAGMA application_id").fetchone()
        if names and application != APPLICATION:
            raise ProjectError(f"{self.path} is a database of another program; give another --index")
        with self.transaction():
            if not names:
                for statement in SCHEMA.split(";\n"):
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA application_id = {APPLICATION}")
            if rebuild:
                for table in ("files", "vectors", "facts"):
                    self.connection.execute(f"DELETE FROM {table}")
            old = dict(self.connection.execute("SELECT key, value FROM facts"))
            if not old:
                facts = facts | {"generation": secrets.token_hex(4)}
                self.connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
                old = facts
        self.generation = old["generation"]
        remedy = "; add --rebuild to embed the images anew, or give another --index"
        if old["format"] != FORMAT:
            raise ProjectError(f"the index {self.path} has format {old['format']}, not {FORMAT}{remedy}")
        if old["folder"] != facts["folder"]:
            other = os.fsdecode(bytes.fromhex(old["folder"]))
            raise ProjectError(f"the index {self.path} is of the images in {other}{remedy}")
        if old["weights"] != facts["weights"]:
            raise ProjectError(
                f"the index {self.path} was made with the weights {old['weights'][:12]} of {old['model']}, not with "
                f"{facts['weights'][:12]} of {facts['model']}: their embeddings do not compare{remedy}"
            )

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """SQLite's errors as `ProjectError` with what to do about them."""
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, a read-only file, a lock that is not let go
            raise ProjectError(f"cannot use the index {self.path}: {error}; give another --index") from None
        except sqlite3.DatabaseError as error:
            raise ProjectError(
                f"{self.path} is damaged or no index ({error}); delete it if it is one, or give another --index"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is within, or nothing."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            raise

    def stamps(self) -> dict[bytes, Stamp]:
        """Every known file."""
        with self.working():
            return {
                path: Stamp(*stamp) for path, *stamp in self.connection.execute("SELECT path, size, mtime FROM files")
            }

    def digests(self) -> dict[bytes, bytes]:
        """The content of every known file, by path."""
        with self.working():
            return dict(
                self.connection.execute("SELECT path, digest FROM files JOIN vectors ON files.vector = vectors.id")
            )

    def put(self, entries: list[Entry]) -> None:
        """Add files or replace what is known of them, at once."""
        with self.working(), self.transaction():
            for entry in entries:
                if entry.vector is not None:
                    data = np.ascontiguousarray(entry.vector, dtype="<f4").tobytes()
                    self.connection.execute(
                        "INSERT OR IGNORE INTO vectors (digest, vector) VALUES (?, ?)", (entry.digest, data)
                    )
                self.connection.execute(
                    "INSERT OR REPLACE INTO files SELECT ?, ?, ?, id FROM vectors WHERE digest = ?",
                    (entry.path, *entry.stamp, entry.digest),
                )

    def drop(self, paths: list[bytes]) -> None:
        """Forget files, and every content that no file has any more."""
        with self.working(), self.transaction():
            self.connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])
            self.connection.execute("DELETE FROM vectors WHERE id NOT IN (SELECT vector FROM files)")

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """All embeddings, by ascending number: int64 (N,) and float32 (N, E). `ProjectError` for unequal lengths."""
        with self.working():
            rows = self.connection.execute("SELECT id, vector FROM vectors ORDER BY id").fetchall()
        ids = np.array([number for number, _ in rows], dtype=np.int64)
        data = b"".join(vector for _, vector in rows)
        if not rows or len(data) % (4 * len(rows)):
            raise ProjectError(f"{self.path} is damaged or empty; add --rebuild")
        return ids, np.frombuffer(data, dtype="<f4").reshape(len(rows), -1)

    def paths(self, number: int) -> list[bytes]:
        """The files with the content of a number, sorted."""
        with self.working():
            rows = self.connection.execute("SELECT path FROM files WHERE vector = ? ORDER BY path", (number,))
            return [path for (path,) in rows]

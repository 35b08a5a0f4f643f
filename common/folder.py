"""The folder of a run: opened, kept from being written over, compared with the config it is continued with."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.checkpoint import CheckpointError, Checkpoints
from common.config import FREE_KEYS, FREE_SECTIONS, UNUSABLE, BaseConfig, Options, explain, flatten, resolve, to_yaml
from common.errors import ProjectError
from common.files import TEMPORARY, read_json, visible, write_json, write_text
from common.lock import NAME as LOCK
from common.lock import FolderLock

# of a run, whose checkpoints may have been deleted
RESULTS = ("eval.json", "[!.]*.safetensors", "models/[!.]*.safetensors")


class RunFolder:
    """The folder of a run, in the hands of the process that writes there.

    It is locked at once and put in order late, when everything that the run needs has been opened: a command that fails
    before has changed nothing, and `--overwrite` has deleted nothing.
    """

    def __init__(
        self, config: BaseConfig, options: Options, checkpoints: Checkpoints, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.options = options
        self.checkpoints = checkpoints
        self.say = say
        self.path = Path(config.run_dir)
        self.lock: FolderLock | None = None
        self.environment: dict[str, Any] = {}  # env.json

    @property
    def overwrite(self) -> bool:
        """Whether an earlier run is to be deleted."""
        return self.options.overwrite and not self.options.resume

    def open(self, environment: dict[str, Any]) -> None:
        """Lock the folder for this process, which `environment` describes.

        `ProjectError` where somebody else writes there, where an earlier run would be written over without
        `--overwrite`, and for a folder that is not ours.
        """
        earlier = self.path / "config.yaml"
        if self.overwrite and self.path.exists():
            ours = earlier.exists() and (self.checkpoints.folder.is_dir() or (self.path / "env.json").exists())
            if not ours and any(path.name != LOCK for path in self.path.iterdir()):
                raise ProjectError(f"{self.path} is not a run folder; not deleting it")
        self.environment = environment
        self.lock = FolderLock(self.path, self.say)
        try:
            if not self.options.resume and not self.overwrite:
                self.refuse_to_write_over()
            if self.options.resume and earlier.exists():
                compare(self.config, earlier, self.say)
        except BaseException:
            self.close()
            raise

    def refuse_to_write_over(self) -> None:
        """`ProjectError` where there are checkpoints or results."""
        step = self.checkpoints.newest_step()
        if step is not None:
            raise ProjectError(
                f"{self.path} holds a run at step {step}: add --resume to go on, --overwrite to delete it, or "
                "run_dir=..."
            )
        results = [path.name for pattern in RESULTS for path in visible(self.path, pattern)]
        if results:
            raise ProjectError(
                f"{self.path} holds {results[0]} of an earlier run: add --overwrite to delete that run, or run_dir=..."
            )

    def begin(self) -> None:
        """Put the folder in order for a run that is about to take its first step, or its next one."""
        if self.overwrite:
            empty(self.path, self.checkpoints.newest_step(), self.say)
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            for path in self.path.rglob(f"{TEMPORARY}*"):  # what an interrupted save left, of whatever file
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ProjectError(f"cannot write to {self.path}: {error.strerror}") from error
        if self.options.resume:
            for note in other_circumstances(read_json(self.path / "env.json"), self.environment):
                self.say(note)
            self.environment = remember_environments(self.path, self.environment)
        else:
            write_json(self.path / "env.json", self.environment)
        write_text(self.path / "config.yaml", to_yaml(self.config))

    def note(self, **facts: Any) -> None:
        """Add to env.json."""
        self.environment |= facts
        write_json(self.path / "env.json", self.environment)

    def close(self) -> None:
        """Let go of the folder."""
        if self.lock:
            self.lock.release()


def empty(folder: Path, step: int | None, say: Callable[[str], None]) -> None:
    """Delete all of a run but its lock, and say what that was."""
    paths = [path for path in folder.iterdir() if path.name != LOCK]
    if paths:
        say(f"deleting the run in {folder.resolve()}{f', at step {step}' if step else ''}")
    try:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise ProjectError(f"cannot delete {folder}: {error.strerror}") from error


def compare(config: BaseConfig, earlier: Path, say: Callable[[str], None]) -> None:
    """`refuse_changes` against the config file of an earlier run."""
    try:
        old = resolve(type(config), earlier)
    except UNUSABLE as error:
        raise ProjectError(
            f"cannot compare with the config of the run: {explain(error, type(config), earlier)}"
        ) from error
    refuse_changes(old, config, say)


def refuse_changes(old: BaseConfig, new: BaseConfig, say: Any) -> None:
    """Compare the config a run was started with to the one it is resumed with.

    `ProjectError` showing the difference if the model section changed; a line for each other change that alters the
    training.
    """
    before, after = flatten(old), flatten(new)
    model = [
        difflib.ndiff([f"{key}: {before.get(key)}"], [f"{key}: {value}"])
        for key, value in after.items()
        if key.startswith("model.") and before.get(key) != value
    ]
    if model:
        lines = "\n".join(line for pair in model for line in pair if line[0] in "-+")
        raise ProjectError(f"the checkpoints in {new.run_dir} are of another model; nothing was changed\n{lines}")
    for key, value in after.items():
        if before.get(key) != value and key not in FREE_KEYS and key.split(".")[0] not in FREE_SECTIONS:
            say(f"note: {key} was {before.get(key)}, is now {value}")


def nothing_to_resume(folder: Path, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
    """Say so where no checkpoint was ever finished; `CheckpointError` where there was one and it is lost."""
    if checkpoints.newest_step() is not None:
        raise CheckpointError(f"no whole checkpoint in {checkpoints.folder}")
    if read_json(folder / "env.json").get("first_saved") or visible(checkpoints.folder, "*.json"):
        raise CheckpointError(
            f"the checkpoints of this run are gone from {checkpoints.folder}; add --overwrite instead of --resume to "
            "start anew"
        )
    say(f"nothing to resume in {folder}: starting at step 1")


def other_circumstances(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does not share with the process that did its earlier steps, from their two env.json: its
    numbers may differ in the last digits from those of a run that was never stopped.
    """
    return [
        f"note: {what} was {before[what]}, is now {now[what]}"
        for what in ("processes", "threads", "precision", "device_name")
        if before.get(what, now[what]) != now[what]
    ]


def remember_environments(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Write env.json anew for a resumed run and return it: the present process, then those that did earlier steps."""
    before = read_json(folder / "env.json")
    now = now | {"first_saved": before.pop("first_saved", None)}
    earlier = before.pop("earlier", [])
    if before:
        now["earlier"] = [*earlier, before]
    write_json(folder / "env.json", now)
    return now

"""Every program ends with one line and a status, and `--debug` shows the rest."""

from __future__ import annotations

import sys

import pytest

from common.config import ConfigError
from common.errors import ProjectError, exits_cleanly
from tests.helpers import python


def fail(error: BaseException):
    @exits_cleanly
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ProjectError("no disk"), 1, "error: no disk"),
        (ConfigError("train.lr", "too high"), 2, "error: train.lr: too high"),
        (ZeroDivisionError("division by zero\nand more"), 1, "error: ZeroDivisionError: division by zero (--debug"),
        (MemoryError(), 1, "error: out of memory: MemoryError (--debug"),
        (KeyboardInterrupt(), 130, "error: KeyboardInterrupt (--debug"),
    ],
)
def test_one_line(error, status, line, capsys):
    with pytest.raises(SystemExit) as stop:
        fail(error)()
    err = capsys.readouterr().err
    assert stop.value.code == status and err.startswith(line) and len(err.splitlines()) == 1


def test_debug_lets_everything_through(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--debug"])
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError("x"))()


def test_a_program_that_leaves_by_itself():
    with pytest.raises(SystemExit) as stop:
        fail(SystemExit(7))()
    assert stop.value.code == 7


STILL_BUSY = """
import sys, threading, time
import torch
from common.errors import ProjectError, exits_cleanly
from common.processes import JOINED

def work():
    a = torch.randn(500, 500)
    while True:
        a @ a  # asks for Python's lock at each end, as a thread of gloo does when it frees a tensor

@exits_cleanly
def main():
    if sys.argv[1] == "several":
        JOINED.set()
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    print("result")
    if sys.argv[2] == "failed":
        raise ProjectError("no disk")
    sys.exit(int(sys.argv[2]))

main()
"""


@pytest.mark.parametrize(("end", "status", "said"), [("0", 0, ""), ("143", 143, ""), ("failed", 1, "error: no disk\n")])
def test_one_of_several_processes_ends_whatever_its_threads_do(end, status, said):
    """Taking the interpreter apart under a thread's feet ended it with SIGABRT instead, after all its work."""
    done = python("-c", STILL_BUSY, "several", end)
    assert (done.returncode, done.stdout, done.stderr) == (status, "result\n", said)

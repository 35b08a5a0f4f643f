"""What the GPU campaigns share: budgets, programs that are stopped in time, results with their evidence, the command
line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import campaign

# says that it is up, then what it was told; leaves on SIGTERM as a program of ours does, unless it is stubborn
PROGRAM = """
import os, signal, sys, time
def leave(number, frame):
    if "stubborn" not in sys.argv:
        open(sys.argv[1], "a").write("saved ")
        sys.exit(143)
signal.signal(signal.SIGTERM, leave)
open(sys.argv[1], "a").write("up " + os.environ.get("WORD", "") + " ")
time.sleep(float(sys.argv[2]))
"""


def program(note: Path, seconds: float, *words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(note), str(seconds), *words]


def wait_for(note: Path) -> None:
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_facts_are_complete_and_json() -> None:
    facts = campaign.facts(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert {
        "machine",
        "driver",
        "cuda",
        "torch",
        "python",
        "packages",
        "commit",
        "date",
        "threads",
        "command",
    } <= facts.keys()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["driver"] is None and facts["cuda"] is None  # nothing of a GPU in a CPU's result
    assert "numpy" in facts["packages"] and "torch" not in facts["packages"]


def test_commit_of_a_copy_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(campaign.runtime, "_commit", lambda: None)
    monkeypatch.setenv("COMMIT", "abc")
    assert campaign.facts(torch.device("cpu"))["commit"] == "abc"


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])
    budget = campaign.Budget(60)
    now[0] = 130.0
    assert (budget.used(), budget.left(), budget.over()) == (30.0, 30.0, False)
    assert budget.over(need=30) and not budget.over(need=29)
    now[0] = 161.0
    assert budget.over() and budget.left() == -1


def test_a_program_that_ends_by_itself(tmp_path: Path) -> None:
    note = tmp_path / "note"
    assert campaign.run_until(program(note, 0.0), 60, env={"WORD": "told"}) == 0
    assert note.read_text() == "up told "
    assert campaign.run_until([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_a_program_is_asked_to_leave(tmp_path: Path) -> None:
    note, started = tmp_path / "note", time.monotonic()
    assert campaign.run_until(program(note, 600), 3) == campaign.STOPPED
    assert time.monotonic() - started < 60
    # empty on a machine so busy that three seconds do not start an interpreter
    assert note.read_text() in ("up  saved ", "")


def test_a_program_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    assert campaign.run_until(program(tmp_path / "note", 600, "stubborn"), 3, grace=0.2) in (
        -signal.SIGKILL,
        campaign.STOPPED,
    )


def test_no_time_no_program(tmp_path: Path) -> None:
    assert campaign.run_until(program(tmp_path / "note", 0.0), 0.0) == campaign.STOPPED
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_campaign_is_passed_on_once(tmp_path: Path, number: signal.Signals) -> None:
    note, before = tmp_path / "note", signal.getsignal(number)

    def send() -> None:
        wait_for(note)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stop:
        campaign.run_until(program(note, 600), 120)
    assert stop.value.code == 128 + number
    assert note.read_text() == "up  saved "
    assert signal.getsignal(number) is before


def test_seconds_add_up(tmp_path: Path) -> None:
    assert campaign.spend(tmp_path, "train", 1.5) == 1.5
    assert campaign.spend(tmp_path, "eval", 4.0) == 4.0
    assert campaign.spend(tmp_path, "train", 2.0) == 3.5


def test_result_holds_its_evidence(tmp_path: Path) -> None:
    facts = campaign.facts(torch.device("cpu"))
    path = tmp_path / "deep" / "speed.json"
    campaign.write_result(path, {"rows": [{"a": 1}]}, facts, 1.26, command="python -m x")
    result = campaign.read_json(path)
    assert result["rows"] == [{"a": 1}] and result["seconds"] == 1.3 and result["command"] == "python -m x"
    assert result["facts"]["machine"] == facts["machine"]
    campaign.write_result(path, {"metrics": {}}, facts, 1.0)
    assert campaign.read_json(path)["command"] == facts["command"]
    assert campaign.read_json(tmp_path / "absent.json") == {}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not hold a JSON object"):
        campaign.read_json(path)


def test_table_shows_every_column_and_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"long_column_{i}": 0.123456 for i in range(15)}
    rows = [{"name": "a", "rate": 12345.6, **many}, {"name": "b", "failed": True, "rate": None}]
    campaign.print_table("title", rows)
    out = capsys.readouterr().out
    assert (
        all(text in out for text in ("title", "12,346", "long_column_14", "0.1235", "failed", "True"))
        and "None" not in out
    )


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def parsed(*words: str):
        return campaign.settle(campaign.parser("gnn", "text").parse_args(words))

    args = parsed()
    assert (args.minutes, args.device, args.tiny) == (9.0, "auto", False)
    assert (
        args.out == Path("docs/results/gnn/gpu")
        and args.work == Path("runs/gpu_gnn")
        and args.out.is_dir()
        and args.work.is_dir()
    )
    assert parsed("--tiny", "--work", "w").out == Path("w/results")
    assert parsed("--tiny", "--out", "elsewhere").out == Path("elsewhere")
    for out in ("docs", "docs/results/gnn/gpu", "w/../docs/x"):
        with pytest.raises(SystemExit, match="rehearsal"):
            parsed("--tiny", "--out", out)
    assert not (tmp_path / "docs/x").exists()

"""metrics.jsonl and what is said on the way."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from common.logging import Display, MetricLog, read_metrics


def test_lines_are_on_the_disk_at_once(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    log.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(1, 7):
        log.write(step, {"loss": step / 8})
    log.close()
    log = MetricLog(tmp_path, first_step=4)
    log.write(4, {"loss": 9.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
        (4, 9.0),
    ]


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []
    MetricLog(tmp_path, first_step=2).close()
    assert path.read_text() == json.dumps({"step": 1}) + "\n"


def test_plain_lines_where_there_is_no_terminal(capfd):
    display = Display(True)
    assert list(display.track([7, 8], 2, "run", every=0)) == [7, 8]
    display.note(10, 40, {"loss": 0.123456, "time": 3.0}, 75.2)
    assert capfd.readouterr().err == "step 10/40  loss 0.1235  1m15s left\n"


def test_other_processes_are_silent(capfd):
    display = Display(False)
    display.say("hello")
    display.note(1, 2, {"loss": 1.0}, 0.0)
    assert list(display.track(range(3), 3, "run")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["[red]not markup[/]", "100 %"])
def test_what_is_said_is_not_read_as_markup(text, capfd):
    Display(True).say(text)
    assert capfd.readouterr().err == f"{text}\n"


def test_a_bar_on_a_terminal():
    display = Display(True)
    screen = io.StringIO()
    display.console, display.live = Console(file=screen, force_terminal=True, width=100), True
    for step in display.track(range(1, 4), 3, "my run"):
        display.note(step, 3, {"loss": float(step)}, 0.0)
    assert "my run" in screen.getvalue() and "3/3" in screen.getvalue()


def test_damaged_lines_are_counted_and_skipped(tmp_path):
    """A flipped bit costs its line, neither the lines after it nor the run."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 6)]
    lines[1] = lines[1].replace(b'"loss"', b'"los\xf3"')
    lines[3] = lines[3].replace(b":", b"z", 1)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match="2 damaged lines left out"):
        assert [line["step"] for line in read_metrics(path)] == [1, 3, 5]
    with pytest.warns(UserWarning, match="damaged"):
        MetricLog(tmp_path, first_step=5).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"loss": float("nan"), "rate": float("inf"), "lr": 0.5})
    log.flush()
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "rate": None, "lr": 0.5}
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["loss"]) and line["lr"] == 0.5

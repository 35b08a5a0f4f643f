"""The demo: which commands it runs, in which order, and what it does when one fails or a signal arrives."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import demo
from common.demo import Runner, tail
from common.projects import Demo

ROOT = Path(__file__).parents[2]
TWO = (Demo("alpha", "configs/a.yaml", 30), Demo("beta", "configs/b.yaml", 40, ("train.lr=2",)))


@pytest.fixture(autouse=True)
def _signals_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each test in an empty folder where only alpha has a sample program; signal handlers are put back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha/sample.py").touch()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Replaces the programs: records commands; `calls.answers[module]` decides (exit status, messages)."""

    class Calls(list):
        def __init__(self) -> None:
            super().__init__()
            self.answers = {}

    record = Calls()

    def run(self: Runner, command: list[str]) -> tuple[int, str]:
        record.append(command)
        answer = record.answers.get(command[2], (0, ""))
        return answer(self) if callable(answer) else answer

    monkeypatch.setattr(demo, "find_demos", lambda: TWO)
    monkeypatch.setattr(Runner, "run", run)
    return record


def modules(calls: list) -> list[str]:
    return [command[2] for command in calls]


def test_commands_in_order(calls):
    assert demo.main(["train.steps=3"]) == 0
    assert modules(calls) == ["alpha.train", "alpha.eval", "alpha.sample", "beta.train", "beta.eval"]
    assert all(command[:2] == [sys.executable, "-m"] for command in calls)
    assert calls[0][3:] == ["--config", "configs/a.yaml", "run_dir=runs/demo/alpha", "--overwrite", "train.steps=3"]
    assert calls[3][3:] == [
        "--config",
        "configs/b.yaml",
        "run_dir=runs/demo/beta",
        "--overwrite",
        "train.lr=2",
        "train.steps=3",
    ]
    assert calls[1][3:] == calls[2][3:] == ["--run", "runs/demo/alpha"]
    assert Path("runs/demo/report.html").is_file()


def test_only_resume_and_folder(calls):
    assert demo.main(["--only", "beta", "--resume", "--folder", "elsewhere"]) == 0
    assert modules(calls) == ["beta.train", "beta.eval"]
    assert "--resume" in calls[0] and "--overwrite" not in calls[0] and "run_dir=elsewhere/beta" in calls[0]


def test_notes_of_other_projects_are_kept(calls):
    demo.main([])
    demo.main(["--only", "beta"])
    assert {
        name: [s["stage"] for s in stages]
        for name, stages in json.loads(Path("runs/demo/demo.json").read_text()).items()
    } == {"alpha": ["train", "eval", "sample"], "beta": ["train", "eval"]}


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (
            "alpha.train",
            ["alpha.train", "beta.train", "beta.eval"],
        ),  # nothing to evaluate, but the other project goes on
        ("alpha.eval", ["alpha.train", "alpha.eval", "alpha.sample", "beta.train", "beta.eval"]),
    ],
)
def test_failure_does_not_stop_the_others(calls, capsys, failing, expected):
    calls.answers = {failing: (7, "fine so far\nerror: the <disk> is full\n")}
    assert demo.main([]) == 1
    assert modules(calls) == expected
    page = Path("runs/demo/report.html").read_text()
    assert f"{failing.split('.')[1]} failed with exit status 7" in page and "error: the &lt;disk&gt; is full" in page
    assert "failed (exit status 7)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_demo_with_a_report(calls, number, status):
    def stop(runner: Runner) -> tuple[int, str]:
        os.kill(os.getpid(), number)
        return status, "stopped"

    calls.answers = {"alpha.eval": stop}
    assert demo.main([]) == status
    assert modules(calls) == ["alpha.train", "alpha.eval"]
    page = Path("runs/demo/report.html").read_text()
    assert "eval was stopped" in page and "failed with" not in page


@pytest.mark.parametrize("arguments", [["--only", "gamma"], ["no_equals_sign"], ["--nonsense"]])
def test_mistakes_on_the_command_line(calls, arguments):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2 and not calls


def test_runner_remembers_messages_and_status(capfd):
    program = "import sys; print('to stdout'); print('to stderr', file=sys.stderr); sys.exit(5)"
    assert Runner().run([sys.executable, "-c", program]) == (5, "to stderr\n")
    shown = capfd.readouterr()
    assert shown.out == "to stdout\n" and shown.err == "to stderr\n"


def test_runner_reports_a_killed_program():
    assert Runner().run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == (137, "")


@pytest.mark.xdist_group("timing")
def test_runner_does_not_wait_for_grandchildren():
    started = time.monotonic()
    program = "import subprocess; subprocess.Popen(['sleep', '20'])"
    assert Runner().run([sys.executable, "-c", program])[0] == 0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_stays_a_terminal(terminal: bool):
    """With our stderr on a terminal, so is the child's, so that its progress bar is alive; and not otherwise."""
    child = "import sys; sys.exit(3 if sys.stderr.isatty() else 4)"
    program = (
        f"import sys; from common.demo import Runner; sys.exit(Runner().run([sys.executable, '-c', {child!r}])[0])"
    )
    master, slave = pty.openpty()
    try:
        stderr = slave if terminal else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", program], stderr=stderr, cwd=ROOT, timeout=60, check=False)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == (3 if terminal else 4)


def test_tail_is_what_a_screen_shows():
    assert tail("\x1b[1mbold\x1b[0m\r\n 10%\r 50%\r100%\r\n\n\nerror: x\n") == "bold\n100%\nerror: x"
    assert len(tail("y" * 99999)) == demo.TAIL


def test_signal_reaches_the_running_program_once():
    """A real program under a real demo: it hears SIGTERM once, may finish, and the demo reports."""
    Path("alpha/__init__.py").touch()
    Path("alpha/train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n"
        "pathlib.Path('started').touch()\n"
        "while not heard: time.sleep(0.05)\n"
        "time.sleep(1)\n"
        "pathlib.Path('heard').write_text(str(len(heard)))\n"
        "sys.exit(143)\n"
    )
    program = (
        "import sys; from common import demo, projects\n"
        "demo.find_demos = lambda: (projects.Demo('alpha', 'a.yaml', 1),)\n"
        "sys.exit(demo.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT) + ":."}, stdout=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 30
        while not Path("started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
        process.stdout.close()
    assert Path("heard").read_text() == "1"
    assert "train was stopped" in Path("runs/demo/report.html").read_text()


def test_end_to_end(tmp_path: Path):
    """The real thing, as small as it goes."""
    pytest.importorskip("sklearn")
    small = [
        "train.steps=4",
        "train.log_every=1",
        "model.channels=32",
        "sample.steps=2",
        "sample.count=10",
        "eval.num_samples=20",
        "eval.manifold_samples=0",
        "eval.neighbours=0",
    ]
    command = [sys.executable, "-m", "common.demo", "--only", "diffusion", "--folder", str(tmp_path / "demo"), *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DATA_ROOT": str(tmp_path / "data")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "demo/report.html").read_text()
    assert "4 of 4 steps" in page and "Accuracy of the requested class" in page and "data:image/gif;base64," in page
    assert "Missing" not in page

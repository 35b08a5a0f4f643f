"""The report: one file that asks nothing of the network, shows what is there and names what is not."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common import projects, report
from common.report.__main__ import main
from common.report.pictures import draw_curves, moving_average, pictures_in, spread
from common.report.rows import metric_rows
from common.report.text import duration, numeral

PACKAGE = """
from common.projects import Demo, Metric

METRICS = {
    "bead_error": Metric("Bead error", "lower"),
    "speed_*": Metric("Speed, {}", "higher", leads=True),
    "elbo": Metric("ELBO", "higher", leads=True),
    "test_accuracy": Metric("Test accuracy", "higher", "percent"),
}
DEMO = Demo("abacus", "configs/abacus.yaml", seconds=5)
"""


class Page(HTMLParser):
    """Collects tags and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(path: Path, colour: int = 128, frames: int = 1) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("L", (8, 6), (colour + 40 * i) % 256) for i in range(frames)]
    images[0].save(path, save_all=frames > 1, append_images=images[1:]) if frames > 1 else images[0].save(path)
    return path.read_bytes()


def fabricate(folder: Path, **evaluation) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\ntrain:\n  steps: 40\n  lr: 0.001\n")
    env = {
        "command": "python -m abacus.train --config configs/beta_vae.yaml",
        "device_name": "Abacus 3000",
        "versions": {"torch": "2.15.0"},
    }
    (folder / "env.json").write_text(json.dumps(env))
    rows = [
        {"step": s, "loss": 100 / s, "lr": 1e-3, "beads_per_second": 7.0, "note": "text", "broken": float("nan")}
        for s in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"elbo": -98.7654, "elbo_std": 0.5, "test_accuracy": 0.98765, "mystery_number": 1234567.0}
    (folder / "eval.json").write_text(
        json.dumps({"project": "abacus", "config": "x", "metrics": metrics, "seconds": 75.0} | evaluation)
    )
    for step in (10, 20, 30, 40):
        picture(folder / f"samples/{step:08d}.png", step)
    picture(folder / "figures/latent_walk.gif", frames=3)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a project that `common` has never heard of."""
    package = tmp_path / "packages/abacus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "train.py").write_text("raise SystemExit('a report starts no training')")
    monkeypatch.setattr(projects, "ROOT", package.parent)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "abacus", raising=False)
    return fabricate(tmp_path / "runs/first")


def page_of(*runs: Path, title: str = "Report") -> Page:
    return Page(report.build(list(runs), runs[0].parent / "report.html", title))


def test_self_contained(run: Path):
    page = page_of(run)
    sources = [a.get("src") or a.get("srcset") for tag, a in page.tags if tag in ("img", "source")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "object", "base"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    html = (run.parent / "report.html").read_text()
    assert not re.search(r"https?:|file:|url\(|@import", html)


def test_shows_metrics_settings_and_environment(run: Path):
    text = page_of(run).text
    for expected in (
        "-98.77 ± 0.5",
        "98.8 %",
        "1,234,567",
        "ELBO",
        "Mystery number",
        "abacus",
        "beta_vae",
        "40 of 40 steps",
        "complete",
        "Abacus 3000",
        "2.15.0",
        "lr: 0.001",
        "1 min 15 s",
    ):
        assert expected in text, expected
    assert "Missing" not in text


def test_metrics_in_the_words_of_their_project(run: Path):
    values = {"bead_error": 3, "elbo": -1.5, "test_accuracy": 0.5, "speed_left_hand": 7.0, "speed_left_hand_std": 0.1}
    rows, leading = metric_rows(values | {"other": 1.0, "note": "text"}, "abacus")
    assert [(row.label, row.value, row.better) for row in rows] == [
        ("Bead error", "3", "lower"),
        ("ELBO", "-1.5", "higher"),
        ("Test accuracy", "50.0 %", "higher"),
        ("Speed, left hand", "7 ± 0.1", "higher"),
        ("Other", "1", ""),
    ]
    assert [row.label for row in leading] == ["Speed, left hand", "ELBO"]  # in the order of METRICS
    assert [row.label for row in metric_rows({"a": 1, "b": 2, "c": 3}, "abacus")[1]] == ["A", "B"]
    assert projects.find_demos() == (projects.Demo("abacus", "configs/abacus.yaml", 5),)


def test_shows_what_other_programs_measured(run: Path):
    """Any file with `metrics`, in the words of the project; nothing of a file without, or of one that is no result."""
    (run / "answers.json").write_text(json.dumps({"project": "abacus", "metrics": {"bead_error": 31415, "note": "x"}}))
    (run / "classes.json").write_text('["yes", "no"]')
    (run / "calibration.json").write_text(json.dumps({"threshold": 0.4321}))
    (run / "huge.json").write_text(json.dumps({"metrics": {"elbo": 1.0}, "text": "x" * 2**18}))
    (run / "broken.json").write_text("{")
    text = page_of(run).text
    assert "answers.json" in text and text.count("Bead error") == text.count("31,415") == 1
    assert (
        "0.4321" not in text
        and "classes.json" not in text
        and "huge.json" not in text
        and "broken.json, which is damaged" in text
    )


@pytest.mark.parametrize("name", ["antigravity", "os", "abacus.train", "../abacus"])
def test_a_project_named_by_a_file_is_not_imported(run: Path, name: str):
    (run / "eval.json").write_text(json.dumps({"project": name, "metrics": {"elbo": 1.0}}))
    assert "Elbo" in page_of(run).text and "antigravity" not in sys.modules


def test_embeds_pictures_as_they_are(run: Path):
    images = {a["alt"]: a["src"] for a in page_of(run).all("img")}
    gif = base64.b64decode(images["Latent walk"].split(",")[1])
    assert gif == (run / "figures/latent_walk.gif").read_bytes()
    assert Image.open(io.BytesIO(gif)).n_frames == 3
    assert base64.b64decode(images["Step 40"].split(",")[1]) == (run / "samples/00000040.png").read_bytes()
    assert list(images).index("Step 40") < list(images).index("Step 10")  # the newest leads
    assert all(images) and all(a.get("alt") for a in page_of(run).all("img"))


def test_curves_of_whatever_is_numeric(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = draw_curves([{"weird": 1.0, **row} for row in rows])
    assert [name for name, _, _ in curves] == ["Loss", "Weird", "Learning rate", "Beads per second"]
    light, dark = (base64.b64decode(uri.split(",")[1]).decode() for uri in curves[0][1:])
    assert "<svg" in light and light != dark
    rows[-1]["val_beads"] = 3.0  # logged once: a point beside curves says nothing
    assert [name for name, _, _ in draw_curves(rows)] == ["Loss", "Learning rate", "Beads per second"]
    assert [name for name, _, _ in draw_curves([{"step": 1, "loss": 2.0}])] == ["Loss"]


def test_escapes_everything(tmp_path: Path):
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    run = fabricate(tmp_path / "runs" / "<b>bold<i>", project=attack, metrics={attack: 1.0}, seconds=attack)
    (run / "config.yaml").write_text(f"train: {{steps: 40}}\nname: '{attack}'\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, attack: 1.0}) + "\n")
    picture(run / "figures" / "<script>x<svg onload=y>.png")
    page = page_of(run, title=attack)
    assert not page.all("script") and not page.all("svg") and not page.all("b")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count("<script>alert(1)") >= 4  # title, project, metric and config, all as plain text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("eval.json", None, "eval.json"),
        ("eval.json", b'{"metrics": {"el', "eval.json, which is damaged"),
        ("eval.json", b"[1]", "not a JSON object"),
        ("env.json", b"\xff\xfe\x00", "env.json, which is damaged"),
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", b"\xff\xfe", "config.yaml, which is damaged"),
        ("config.yaml", b"a: [1", ""),
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("metrics.jsonl", b'3\n{"step": "x"}\nnull\n', ""),
        ("metrics.jsonl", b"\xff\xfe\xff", "metrics.jsonl, which is damaged"),
        ("figures/latent_walk.gif", b"GIF89a", "figures/latent_walk.gif"),
    ],
)
def test_missing_and_damaged_files(run: Path, name: str, content: bytes | None, expected: str):
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    text = page_of(run).text
    assert ("Missing:" in text) == bool(expected) and expected in text
    assert "abacus" in text  # the rest of the page is there


def test_truncated_metrics_line(run: Path):
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]) + '{"step": 21, "lo')
    text = page_of(run).text
    assert "20 of 40 steps" in text and "stopped" in text


def test_no_pictures_and_no_folder(run: Path, tmp_path: Path):
    for path in [*run.glob("samples/*"), *run.glob("figures/*")]:
        path.unlink()
    text = page_of(run, tmp_path / "runs/absent").text
    assert "pictures or examples in samples/ and figures/" in text
    assert "the run folder: nothing was written" in text and "not started" in text


def test_examples_of_text(run: Path):
    """A list of objects in samples/ is a table, nothing in it is taken for HTML, and it stands for pictures."""
    for path in [*run.glob("samples/*"), *run.glob("figures/*")]:
        path.unlink()
    rows = [{"prompt": f"question {i}", "right_answer": "<b>blue</b>", "said": ["a", "b"]} for i in range(20)]
    (run / "samples/examples.json").write_text(json.dumps(rows))
    for name, content in (("number", "7"), ("nothing", "[]"), ("broken", "[{"), ("words", '["a"]')):
        (run / f"samples/{name}.json").write_text(content)
    page = page_of(run)
    assert "Right answer" in page.text and "question 11" in page.text and "question 12" not in page.text
    assert "<b>blue</b>" in page.text and "a, b" in page.text and not page.all("b")
    assert all(f"{name}.json, which is damaged" in page.text for name in ("number", "nothing", "broken", "words"))
    assert "pictures" not in page.text


def test_failed_stage_of_a_demo(run: Path):
    stages = [
        {"stage": "train", "status": 0, "seconds": 61.0},
        {"stage": "eval", "status": 3, "seconds": 2.0, "tail": "error: <no> disk"},
    ]
    (run.parent / "demo.json").write_text(json.dumps({"first": stages}))
    page = page_of(run)
    assert "eval failed with exit status 3" in page.text and "error: <no> disk" in page.text
    assert "1 min 1 s" in page.text
    assert any("failed" in (a.get("class") or "") for a in page.all("span"))


def test_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    stray = run.parent / "demo.json"
    stray.write_text("{}")
    monkeypatch.setattr(
        sys, "argv", ["report", str(run), str(stray), "--out", str(run.parent / "out/r.html"), "--title", "Hello"]
    )
    main()
    assert "Hello" in Page(run.parent / "out/r.html").text
    monkeypatch.setattr(sys, "argv", ["report", str(stray)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and "no run folder" in capsys.readouterr().err


def test_small_pieces(tmp_path: Path):
    assert spread(list(range(30)), 4) == [0, 10, 19, 29] and spread([1, 2], 7) == [1, 2]
    assert moving_average((5.0,) * 50) == pytest.approx([5.0] * 50)  # no bias towards zero at the start
    for name in ("grid_w10.png", "grid_w2.png", "notes.txt", ".tmp-1.png"):
        (tmp_path / name).touch()
    assert [p.name for p in pictures_in(tmp_path)] == ["grid_w2.png", "grid_w10.png"]
    assert [duration(s) for s in (0.52, 42.4, 59.99, 75.2, 7325)] == [
        "0.5 s",
        "42 s",
        "60 s",
        "1 min 15 s",
        "2 h 2 min",
    ]
    assert [numeral(v) for v in (0.12345, 5, 123456.7, 1.2e-5, float("nan"))] == [
        "0.1235",
        "5",
        "123,457",
        "1.20e-05",
        "nan",
    ]

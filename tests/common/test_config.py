"""A mistake in a config: exit status 2, one line that names it, no traceback, and fast. A right config: read
exactly.
"""

from __future__ import annotations

import dataclasses
import re
import resource
from pathlib import Path

import pytest

from common.config import ConfigError, flatten, list_configs, load, resolve, to_yaml
from diffusion.config import Config
from tests.helpers import DIGITS, ROOT, python, schema_of

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# override of the digits config, and words that the one line must contain: the key, and the nearest valid one for a typo
BAD_OVERRIDES = [
    ("train.lrr=1", "train.lrr", "train.lr"),
    ("trian.lr=1", "trian: unknown", "did you mean train"),
    ("lr=1", "lr", "train.lr"),
    ("sede=1", "sede", "seed"),
    ("modle.channels=8", "modle: unknown", "did you mean model"),
    ("train.lr.value=1", "train.lr"),
    ("train.steps=many", "train.steps", "many"),
    ("train.steps=1.5", "train.steps"),
    ("train.lr=fast", "train.lr"),
    ("data.flip=maybe", "data.flip"),
    ("train=5", "train"),
    ("train.betas=0.9", "train.betas"),
    ("model.multipliers=[1,two]", "model.multipliers"),
    ("model.multipliers=[1", "model.multipliers"),
    ("model.channels=null", "model.channels"),
    ("data.dataset=cifar11", "data.dataset", "cifar10"),
    ("objective.kind=gan", "objective.kind", "ddpm"),
    ("precision=fp8", "precision", "bf16"),
    ("sample.sampler=dimm", "sample.sampler", "ddim"),
    ("train.lr", "train.lr", "key=value"),
    ("=5", "key=value"),
    ("train..lr=1", "train"),
    ("train.steps=0", "train.steps", "at least 1"),
    ("train.batch_size=-16", "train.batch_size"),
    ("train.lr=-1e-3", "train.lr", "positive"),
    ("train.ema=1", "train.ema"),
    ("train.warmup=-1", "train.warmup"),
    ("model.dropout=1.5", "model.dropout"),
    ("data.workers=-1", "data.workers"),
    ("eval.num_samples=1", "eval.num_samples"),
    ("sample.eta=2", "sample.eta"),
    ("sample.steps=5000", "sample.steps", "1000"),
    ("train.lr=.inf", "train.lr"),
    ("train.betas=[0.9,1]", "train.betas"),
    ("sample.rho=0", "sample.rho"),
    ("eval.nfe_table=[0]", "eval.nfe_table"),
    ("data.dataset=folder", "data.folder"),
    ("model.channels=65", "model.channels", "model.groups"),
    ("model.head_channels=48", "model.head_channels"),
    ("data.image_size=9", "data.image_size"),
    ("objective.prediction=eps objective.zero_terminal_snr=true", "objective.zero_terminal_snr", "prediction=v"),
    ("objective.kind=flow sample.sampler=ddpm", "sample.sampler"),
    ("sample.sigma_min=100", "sample.sigma_min"),
    ("seed=${nowhere}", "nowhere"),
]

# content of a YAML file, and words that the line must contain
BAD_FILES = [
    (b"", "empty"),
    (b"# only a comment\n", "empty"),
    (b"- a\n- list\n", "key: value"),
    (b"just words\n", "just words: unknown key"),
    (b"train:\n  lr: 1\n  lr: 2\n", "lr", "line 3"),
    (b"train:\n  lr: [1\n", "line"),
    (b"train:\n\tlr: 1\n", "line 2"),
    (b"train:\n  setps: 10\n", "train.setps", "train.steps"),
    (b"train: 3\n", "train: 3"),
    (b"model:\n  channels: 8\n  multipliers: [1, two]\n", "model.multipliers"),
    (b"seed: !!python/object/apply:os.system ['false']\n", "line 1"),
    (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not a text file"),
    (bytes(range(32)), "bad.yaml"),
]


def one_line(capsys: pytest.CaptureFixture[str], mode: str, *argv: str) -> str:
    """What a program says about its command line on stderr, after checking that it is one line and the exit status
    2.
    """
    with pytest.raises(SystemExit) as stop:
        load(Config, "diffusion", mode, list(argv))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("override", "words"), [(bad[0], bad[1:]) for bad in BAD_OVERRIDES], ids=[bad[0] for bad in BAD_OVERRIDES]
)
def test_bad_override(override, words, capsys):
    line = one_line(capsys, "train", "--config", str(DIGITS), *override.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("content", "words"), [(bad[0], bad[1:]) for bad in BAD_FILES])
def test_bad_file(content, words, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    line = one_line(capsys, "train", "--config", str(path))
    assert all(word in line for word in words), line


def test_bad_paths_and_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean" in one_line(capsys, "train", "--config", str(DIGITS.with_name("ddpm_digit.yaml")))
    assert "no such file" in one_line(capsys, "train", "--config", str(tmp_path / "nowhere/x.yaml"))
    assert "folder" in one_line(capsys, "train", "--config", str(tmp_path))
    assert "--confg" in one_line(capsys, "train", "--confg", str(DIGITS))
    assert "--resume" in one_line(capsys, "eval", "--run", str(tmp_path), "--resume")
    for mode in ("eval", "sample"):
        assert "--run" in one_line(capsys, mode)
        assert "config.yaml" in one_line(capsys, mode, "--run", str(tmp_path / "no_such_run"))
    (tmp_path / "config.yaml").write_text(DIGITS.read_text())
    for mode in ("eval", "sample"):
        assert "sample.steps" in one_line(capsys, mode, "--run", str(tmp_path), "sample.step=3")
        assert "sample.guidance" in one_line(capsys, mode, "--run", str(tmp_path), "sample.guidance=high")


def test_without_config_lists_them(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = one_line(capsys, "train")
    assert all(path in line for path in list_configs("diffusion"))
    assert "gnn" not in line


@pytest.mark.parametrize(
    "words",
    [
        ["diffusion.train", "--config", str(DIGITS), "train.lrr=1"],
        ["diffusion.train", "--config", "/no/such/file.yaml"],
        ["diffusion.train"],
        ["diffusion.eval", "--run", "/no/such/run"],
        ["diffusion.sample", "--run", "/no/such/run", "sample.step=1"],
    ],
    ids=lambda words: " ".join(words[:1] + words[2:])[:50],
)
@pytest.mark.xdist_group("timing")
def test_bad_config_as_a_process(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = python("-m", *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of processor time, which a busy machine does not stretch
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    project = re.search(r"python -m (\w+)\.train", path.read_text()).group(1)
    config, options = load(schema_of(project), project, "train", ["--config", str(path)])
    assert config.run_dir == f"runs/{path.stem}"
    assert not (options.resume or options.overwrite or options.dry_run)
    head = path.read_text().split("\n\n")[0].splitlines()
    comment = "\n".join(line for line in head if line.startswith("#"))
    assert head[0].startswith("# ") and "Paper:" in comment
    assert f"python -m {project}.train --config configs/{path.name}" in comment
    for word in ("Command:", "Hardware:"):
        assert word in comment


@pytest.mark.parametrize("path", [ROOT / path for path in list_configs("diffusion")], ids=lambda path: path.stem)
def test_written_config_reads_back_equal(path, tmp_path):
    overrides = ["train.lr=1e-4", "model.multipliers=[1,2]", "train.betas=[0.8,0.9]"]
    if not path.stem.startswith("ldm_"):  # codes have no size in pixels
        overrides += ["model.attention=[16]", "data.image_size=32"]
    config = resolve(Config, path, overrides)
    assert config.train.lr == 1e-4 and config.model.multipliers == (1, 2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = resolve(Config, tmp_path / "config.yaml", [], "elsewhere")
    assert again == dataclasses.replace(config, run_dir="elsewhere")


def test_precedence(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\ntrain:\n  steps: 7\n  lr: 1e-4\n")
    monkeypatch.delenv("DATA_ROOT", raising=False)
    config = resolve(Config, path, ["train.steps=5"])
    assert (config.seed, config.train.steps, config.train.lr, config.train.batch_size) == (
        3,
        5,
        1e-4,
        Config().train.batch_size,
    )
    assert config.data_root == "data"
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    assert resolve(Config, path).data_root == "/somewhere"
    assert resolve(Config, path, ["data_root=here"]).data_root == "here"


def test_config_is_frozen_and_flat_keys_are_complete():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0
    flat = flatten(config)
    assert flat["train.lr"] == config.train.lr and flat["seed"] == 0
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())


def test_run_folder_may_move(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(resolve(Config, DIGITS, ["run_dir=runs/old_name"])))
    config, _ = load(Config, "diffusion", "eval", ["--run", str(tmp_path)])
    assert Path(config.run_dir) == tmp_path


# -- text is text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["X/exp #2", "2024_01_15", "007", "1.10", "on", "null", "a: b", "[1, 2]", "~", "a=b", ""]
)
def test_a_string_takes_its_text_literally(text):
    assert resolve(Config, None, [f"wandb={text}"]).wandb == text
    assert resolve(Config, None, [f"data.folder={text}"]).data.folder == text


@pytest.mark.parametrize("text", ["2024_01_15", "007", "1.10", "true"])
def test_unquoted_text_in_yaml_is_refused_where_it_would_change(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"wandb: {text}\n")
    with pytest.raises(ConfigError, match=r"wandb: is text.*put it in quotes"):
        resolve(Config, path)
    path.write_text(f'wandb: "{text}"\n')
    config = resolve(Config, path)
    assert config.wandb == text
    path.write_text(to_yaml(config))
    assert resolve(Config, path).wandb == text


def test_a_secret_of_the_environment_stays_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter2")
    (tmp_path / "a.yaml").write_text("wandb: ${oc.env:TOKEN}\nseed: 3\n")
    config = dataclasses.replace(resolve(Config, tmp_path / "a.yaml"), seed=4)
    assert config.wandb == "hunter2"
    text = to_yaml(config)
    assert "hunter2" not in text and "wandb: ${oc.env:TOKEN}" in text and "seed: 4" in text
    (tmp_path / "b.yaml").write_text(text)
    assert resolve(Config, tmp_path / "b.yaml").wandb == "hunter2"


@pytest.mark.parametrize(
    "text",
    ["seed: !!int abc", "a: " * 900 + "1", "{a: " * 900, "seed: " + "9" * 10_000, "seed: !!float x"],
    ids=range(5),
)
def test_nonsense_in_yaml_is_one_line(tmp_path, text, capsys):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        load(Config, "diffusion", "train", ["--config", str(tmp_path / "a.yaml")])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("item", ["seed=" + "9" * 10_000, "train.lr=!!float x", "model.multipliers=" + "[" * 900])
def test_nonsense_in_an_override_is_one_line(item, capsys):
    with pytest.raises(SystemExit) as stop:
        load(Config, "diffusion", "train", ["--config", "configs/ddpm_digits.yaml", item])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


NONSENSE = ["!!bool maybe", "!!timestamp nope", "!!int abc", "9" * 5000, "9" * 400, "[" * 900 + "]" * 900, "&x [*x]"]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: value[:16])
@pytest.mark.parametrize("key", ["train.lr", "model.multipliers"])
def test_a_value_that_yaml_cannot_make_anything_of(key, value, tmp_path, capsys):
    """One line and status 2, whichever way the value came."""
    path = tmp_path / "c.yaml"
    text = value
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    path.write_text(text)
    for argv in (["--config", str(DIGITS), f"{key}={value}"], ["--config", str(path)]):
        with pytest.raises(SystemExit) as stop:
            load(schema_of("diffusion"), "diffusion", "train", argv)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ["3", "1: 2", "{[1, 2]: 3}", "null: 1"])
def test_keys_that_are_no_names(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        load(schema_of("diffusion"), "diffusion", "train", ["--config", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


WORDS = ["--run", "RUN", "what is a = b?", "seed=3", "train.nonsense=1"]


def test_free_words_are_not_settings(tmp_path, capsys):
    """Programs that ask for text: a word is a setting where its name is one or could be meant as one."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    words = [str(tmp_path) if word == "RUN" else word for word in WORDS]
    config, options = load(Config, "diffusion", "ask", words[:4], words="question")
    assert options.words == ("what is a = b?",)
    assert config.seed == 3
    with pytest.raises(SystemExit):
        load(Config, "diffusion", "ask", words, words="question")
    assert "train.nonsense: unknown key" in capsys.readouterr().err


def test_other_programs_may_take_a_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\n")
    config, _ = load(
        Config,
        "diffusion",
        "plan",
        ["--config", str(path), "--of-mine", "7"],
        short={"of-mine": "seed"},
        takes="config",
    )
    assert config.seed == 7
    with pytest.raises(SystemExit):
        load(Config, "diffusion", "plan", ["--config", str(path), "--resume"], takes="config")

"""The training and evaluation programs from their command lines to their files, and what they refuse."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.checkpoint import read_weights
from common.config import load
from common.files import sha256
from common.logging import read_metrics
from common.provenance import config_hash
from common.run import Run
from ppo.config import Config
from ppo.environments.registry import make_vector
from ppo.environments.vectors import LocalVector
from ppo.playing.play import Policy, play
from tests.helpers import ROOT, command, errors, program, python, same, stop_in_check
from tests.ppo.helpers import TINY, UPDATES, Counting, config, evaluate, log, train, two_processes, weights

NORMAL = (
    "env.normalize_observations=true",
    "env.normalize_rewards=true",
    "train.evaluate_every=2",
    "train.evaluate_episodes=4",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(config(folder, *NORMAL)) == 0
    return folder


def test_commands_as_a_person_types_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ("--config", "configs/ppo_cartpole.yaml", *TINY, f"run_dir={tmp_path / 'run'}")
    done = program("ppo.train", *words)
    assert done.returncode == 0, done.stderr
    tested = program("ppo.eval", "--run", str(tmp_path / "run"), "eval.episodes=3")
    assert tested.returncode == 0, tested.stderr
    result = json.loads(tested.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "run/eval.json").read_text())
    assert result["project"] == "ppo"
    assert result["config"] == "run"
    assert result["n"] == {"episodes": 3}
    assert result["seeds"] == [0]
    assert result["checkpoint_step"] == UPDATES
    assert result["seconds"] > 0
    assert {"return_mean", "return_std", "return_mean_stochastic"} <= result["metrics"].keys()
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in result["metrics"].values())
    assert any(line.split()[1:2] == ["return_mean"] for line in tested.stdout.splitlines()[:-1]), "the table"
    assert command("ppo", "train", *words) == 1
    assert "--resume" in errors(capsys.readouterr().err)[0]


def test_dry_run_says_what_would_happen_and_makes_nothing(tmp_path, capsys):
    assert train(config(tmp_path / "run"), dry_run=True) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    parameters = 4 * 8 + 8 + 8 * 2 + 2 + 4 * 8 + 8 + 8 + 1
    assert f"{parameters} parameters; {UPDATES} updates of 4 x 16 steps" in out
    assert "id: CartPole-v1" in out


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.lr=fast", "train.lr"),
        ("train.lr=0", "train.lr"),
        ("train.gama=0.9", "train.gamma"),
        ("train.gamma=1.5", "train.gamma"),
        ("train.batch_size=100", "train.batch_size"),
        ("env.backend=asnyc", "env.backend"),
        ("env.count=0", "env.count"),
        ("env.id=", "env.id"),
        ("env.sticky_actions=1", "env.sticky_actions"),
        ("model.kind=rnn", "model.kind"),
        ("model.hidden=[8,0]", "model.hidden"),
        ("train.clip=0", "train.clip"),
        ("train.steps=-1", "train.steps"),
        ("precision=fp16", "precision"),
        ("eval.episodes=0", "eval.episodes"),
        ("eval.max_steps=0", "eval.max_steps"),
        ("train.evaluate_every=-1", "train.evaluate_every"),
        ("train.backprop=auto", "train.backprop"),
        ("train.rollout=0", "train.rollout"),
        ("train.target_kl=-1", "train.target_kl"),
        ("enf.id=x", "did you mean env"),
    ],
)
def test_bad_settings_are_one_line(override, key, capsys):
    with pytest.raises(SystemExit) as stop:
        load(Config, "ppo", "train", ["--config", "configs/ppo_cartpole.yaml", *TINY, override])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert key in line


def test_bad_settings_from_the_shell():
    for override in ("train.gama=0.9", "train.batch_size=100000"):
        done = python("-m", "ppo.train", "--config", "configs/ppo_cartpole.yaml", override)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: train.")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("env.id=CartPol-v1",), 1, "CartPole-v1"),
        (("model.kind=cnn",), 2, "model.kind"),
        (("env.id=Pendulum-v1", "model.squash=true", "env.backend=native"), 1, "Pendulum-v1"),
        (("env.id=ALE/Pong-v5", "model.kind=cnn", "env.normalize_observations=true"), 2, "env.normalize_observations"),
        (("env.backend=atari",), 1, "CartPole-v1"),
        (("device=cuda:77",), 2, "device"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_settings_that_do_not_fit_the_environment_are_one_line(words, status, said, dry_run, tmp_path, capsys):
    if dry_run and words[0].startswith("device"):
        return  # a dry run computes nothing
    assert train(config(tmp_path / "run", *words), dry_run=dry_run) == status
    (line,) = errors(capsys.readouterr().err)
    assert said in line


def test_evaluation_measures_and_repeats_itself(trained, capsys):
    """The same weights and seeds give the same numbers; both policies and both kinds of choosing are measured apart,
    game by game.
    """
    results = []
    for _ in range(2):
        assert evaluate(config(trained, *NORMAL, "eval.episodes=6")) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["metrics"] == results[1]["metrics"]
    metrics = results[0]["metrics"]
    with (trained / "episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    for name, suffix in (("last", ""), ("best", "_best")):
        for kind, middle in (("deterministic", ""), ("stochastic", "_stochastic")):
            returns = [float(row["return"]) for row in rows if (row["policy"], row["kind"]) == (name, kind)]
            assert len(returns) == 6
            assert metrics[f"return_mean{middle}{suffix}"] == pytest.approx(np.mean(returns))
            assert metrics[f"return_std{middle}{suffix}"] == pytest.approx(np.std(returns, ddof=1))
            assert all(float(row["return"]) == float(row["length"]) for row in rows), "CartPole pays one a step"
    assert metrics["return_mean"] != metrics["return_mean_stochastic"]
    assert metrics["steps_total"] == read_metrics(trained / "metrics.jsonl")[-1]["env_steps"]


def test_every_output_says_what_made_it(trained, tmp_path):
    """The hashes of config, weights and table in eval.json; pictures of an earlier evaluation go."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures/episode.gif").write_bytes(b"of other weights")
    made = config(folder, *NORMAL, "eval.video=false")
    assert evaluate(made) == 0
    found = json.loads((folder / "eval.json").read_text())
    assert found["config_sha256"] == config_hash(config(tmp_path / "elsewhere", *NORMAL, "eval.video=false"))
    assert found["weights_sha256"] == sha256(folder / "last.safetensors")
    assert found["outputs"] == {"episodes.csv": sha256(folder / "episodes.csv")}
    assert not (folder / "figures/episode.gif").exists()


def test_weights_of_another_config_are_not_taken_for_this_one(trained, capsys):
    """A function that no shape betrays is refused, another environment is said."""
    assert evaluate(config(trained, *NORMAL, "model.activation=relu")) == 1
    assert "trained with model.activation=tanh, not relu" in errors(capsys.readouterr().err)[0]
    assert evaluate(config(trained, *NORMAL, "env.max_episode_steps=50")) == 0
    assert "note: the policy was trained with env.max_episode_steps=0, not 50" in capsys.readouterr().err


def test_weights_of_a_stopped_run_say_so(tmp_path, monkeypatch, capsys):
    """In the file's metadata, in eval.json and in a note; weights older than the newest checkpoint, too."""
    folder = tmp_path / "run"
    stop_in_check(monkeypatch, 2)
    assert train(config(folder, *NORMAL)) == 143
    facts = read_weights(folder / "last.safetensors")[1]
    assert int(facts["update"]) == 2 < int(facts["updates"])
    assert evaluate(config(folder, *NORMAL)) == 0
    said = capsys.readouterr()
    assert f"the weights are of update 2 of {facts['updates']}: no finished training" in said.err
    found = json.loads(said.out.splitlines()[-1])
    assert (found["checkpoint_step"], found["total_steps"]) == (2, int(facts["updates"]))
    old = (folder / "last.safetensors").read_bytes()
    assert train(config(folder, *NORMAL), resume=True) == 0
    (folder / "last.safetensors").write_bytes(old)  # as after a kill -9 before the export
    assert evaluate(config(folder, *NORMAL)) == 0
    assert f"--checkpoint {int(facts['updates']):08d}.pt" in capsys.readouterr().err


def test_flipped_bits_in_exported_weights_are_noticed(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "eval.json").unlink(missing_ok=True)
    path = folder / "last.safetensors"
    whole = path.read_bytes()
    capsys.readouterr()
    for place in np.linspace(0, len(whole) - 1, 12).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        assert evaluate(config(folder, *NORMAL)) == 1, place
        (line,) = errors(capsys.readouterr().err)
        assert str(path) in line
    assert not (folder / "eval.json").exists()


def test_evaluation_changes_nothing_that_was_learned(trained):
    """Weights, statistics of observations and checkpoints have the same bytes and times afterwards."""

    def files():
        return {
            path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in sorted(trained.rglob("*"))
            if path.suffix in (".safetensors", ".pt") or path.name == "metrics.jsonl"
        }

    before = files()
    assert len(before) >= 5
    assert evaluate(config(trained, *NORMAL)) == 0
    assert files() == before


def test_policy_uses_the_saved_scaling_and_keeps_it(trained):
    made = config(trained, *NORMAL)
    vector = make_vector(made.env, 0, 4)
    policy = Policy(
        trained / "last.safetensors", made, vector.observation_space, vector.action_space, torch.device("cpu")
    )
    saved = load_file(trained / "last.safetensors")
    assert saved["observations.count"] > 300
    play(policy, vector, 4, None)
    np.testing.assert_array_equal(policy.scale.moments.mean, saved["observations.mean"].numpy())
    np.testing.assert_array_equal(policy.scale.moments.var, saved["observations.var"].numpy())
    assert policy.scale.moments.count == saved["observations.count"]
    seen = np.array([[0.1, -0.2, 0.03, 0.4]], dtype=np.float32)
    scaled = (seen - saved["observations.mean"].numpy()) / np.sqrt(saved["observations.var"].numpy())
    np.testing.assert_allclose(policy.scale(seen), scaled, rtol=1e-5)


def test_evaluation_without_weights_and_with_damaged_ones(trained, tmp_path, capsys):
    assert evaluate(config(tmp_path / "run")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "last.safetensors" in line
    assert "train first" in line
    folder = tmp_path / "damaged"
    folder.mkdir()
    whole = (trained / "last.safetensors").read_bytes()
    files = {
        "half": (whole[: len(whole) // 2],),
        "empty": (b"",),
        "noise": (b"\xff" * 999,),
        "other": (whole, "model.hidden=[16]"),
    }
    for name, (data, *words) in files.items():
        (folder / "last.safetensors").write_bytes(data)
        assert evaluate(config(folder, *NORMAL, *words)) == 1, name
        (line,) = errors(capsys.readouterr().err)
        assert "last.safetensors" in line
    assert not (folder / "eval.json").exists()


@pytest.mark.parametrize("episodes", [3, 7, 8])
def test_play_gives_each_environment_a_fixed_quota(episodes):
    """The games counted are each environment's first ones, however short another's are: the long one is not left
    out.
    """
    toys = [Counting(0, 40), Counting(1, 2), Counting(2, 3)]
    games = play(lambda observations, generator: np.zeros(3, dtype=np.int64), LocalVector(toys, 0), episodes, None)
    quota = [episodes // 3 + (n < episodes % 3) for n in range(3)]
    assert games == [game for toy, most in zip(toys, quota) for game in toy.played[:most]]
    assert len(games) == episodes


def test_film_is_a_gif_that_moves(trained, tmp_path):
    assert evaluate(config(trained, *NORMAL, "eval.video=true", "eval.video_frames=12")) == 0
    with Image.open(trained / "figures/episode.gif") as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert 3 <= len(frames) <= 12
    assert frames[0].shape[1] <= 320
    moved = [np.abs(a - b).max() for a, b in pairwise(frames)]
    assert min(moved) > 30
    with Image.open(trained / "figures/learning_curve.png") as curve:
        assert curve.size == (800, 450)


def count_updates(monkeypatch):
    """A list that grows by one number, the step, with each gradient step."""
    check, seen = Run.check_gradients, []
    monkeypatch.setattr(
        Run, "check_gradients", lambda self, *args, **kw: (seen.append(self.step), check(self, *args, **kw))[1]
    )
    return seen


def test_target_kl_stops_all_remaining_epochs(tmp_path, monkeypatch):
    """The minibatch that exceeds 1.5 times the target is not learned from, nor any later one of its rollout; the
    next starts anew.
    """
    steps = count_updates(monkeypatch)
    words = ("env.backend=local", "train.epochs=10", "train.lr=0.01", "train.lr_decay=constant")
    assert train(config(tmp_path / "free", *words)) == 0
    assert len(steps) == UPDATES * 10 * 2
    steps.clear()
    assert train(config(tmp_path / "run", *words, "train.target_kl=1e-8")) == 0
    taken = [steps.count(update) for update in range(1, UPDATES + 1)]
    assert taken == [1] * UPDATES, (
        "before the first minibatch nothing can have moved yet, before the second it must have"
    )
    assert [line["epochs"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1] * UPDATES


def test_minibatch_of_one(tmp_path, monkeypatch):
    """There is no spread in one advantage: it is used as it is, and nothing becomes NaN."""
    steps = count_updates(monkeypatch)
    assert (
        train(config(tmp_path / "run", "train.batch_size=1", "train.rollout=3", "train.steps=24", "train.epochs=1"))
        == 0
    )
    assert all(torch.isfinite(value).all() for part in weights(tmp_path / "run").values() for value in part.values())
    assert len(steps) == read_metrics(tmp_path / "run/metrics.jsonl")[-1]["env_steps"], (
        "as many as there are valid rows"
    )


TWO = {
    "cartpole": ("env.backend=local", "train.clip_value=0.2", "train.target_kl=0.5"),
    "lander": (
        "env.id=LunarLander-v3",
        "env.continuous=true",
        "train.entropy_weight=0.01",
        "env.max_episode_steps=20",
        *NORMAL,
    ),
    "dead rows": ("env.max_episode_steps=9", *NORMAL),
}


def test_two_processes_equal_one(tmp_path):
    """The same environments and noise, gradients averaged, advantages and running statistics over all: equal weights in
    fp64.

    The native CartPole vector draws its starts from one generator a process, so it takes part only to show that dead
    rows spread unevenly over two processes do no harm.
    """
    two_processes(
        tmp_path,
        f"""
        for name, words in {TWO!r}.items():
            assert train(config(Path({str(tmp_path)!r}) / name, "precision=fp64", *words)) == 0
    """,
    )
    for name in ("cartpole", "lander"):
        folder = tmp_path / f"{name} alone"
        assert train(config(folder, "precision=fp64", *TWO[name])) == 0
        for part, tensors in weights(folder).items():
            other = weights(tmp_path / name)[part]
            for key, value in tensors.items():
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-6)
        for a, b in zip(
            read_metrics(folder / "metrics.jsonl"), read_metrics(tmp_path / name / "metrics.jsonl"), strict=True
        ):
            for key in (
                "return_mean",
                "episodes",
                "env_steps",
                "policy_loss",
                "value_loss",
                "approx_kl",
                "grad_norm",
                "epochs",
            ):
                assert b[key] == pytest.approx(a[key], abs=1e-6, nan_ok=True), (name, a["step"], key)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "dead rows")["last"].values())


def test_seeds_repeat_and_differ(tmp_path):
    """A run is a function of its config; another seed is another run, with other initial weights."""
    for name, words in (("a", ()), ("b", ()), ("c", ("seed=1",))):
        assert train(config(tmp_path / name, "train.steps=128", *words)) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))

"""Measure a trained agent:  python -m ppo.eval --run runs/ppo_lunarlander [eval.episodes=100 eval.policy=last ...]

The last policy, and the best one where training has chosen one by evaluation episodes, play episodes in environments of
new seeds, once with the most likely action and once with drawn ones. Writes `eval.json`, `episodes.csv`, curves and a
film of one episode into the run folder; the last line of stdout is the content of `eval.json`. Nothing that was learned
changes here.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from ppo.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "ppo", "eval")

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common.errors import exits_cleanly
from common.files import sha256, write_csv, write_json
from common.logging import read_metrics
from common.provenance import config_hash, discard, output_hashes, trained_otherwise
from common.run import Run
from common.runtime import mix_seed, use_threads
from common.signals import Stopped
from ppo.playing.play import Policy, evaluation_vector, film, film_pixels, play
from ppo.environments.registry import find, make_one, make_vector
from ppo.train import num_updates

SEED_STREAM = 1_000_000_007  # environments of the evaluation are none that training has seen
ENOUGH = 100  # episodes behind a mean that counts as solving
OUTPUTS = ("episodes.csv",)
PICTURES = ("figures/learning_curve.png", "figures/episode.gif")


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one run."""
    started = time.perf_counter()
    with Run(config, options) as run:
        use_threads(config.train.threads)
        metrics: dict[str, float] = {}
        rows = []
        policies = chosen_policies(run.folder, options.checkpoint)
        main_policy, main_path = next(iter(policies.items()))
        for name, path in policies.items():
            suffix = "" if name == main_policy else f"_{name}"
            for kind in ("", "_stochastic"):
                games, facts = measure(config, path, run, stochastic=bool(kind))
                returns = [value for value, _ in games]
                metrics[f"return_mean{kind}{suffix}"] = statistics.fmean(returns)
                metrics[f"return_std{kind}{suffix}"] = statistics.stdev(returns) if len(returns) > 1 else 0.0
                rows += [
                    {"policy": name, "kind": kind.removeprefix("_") or "deterministic", "return": a, "length": b}
                    for a, b in games
                ]
            if name == main_policy:
                update = int(facts["update"])
                total = int(facts.get("updates", num_updates(config)))
                for note in notes_on(facts, total, config, options, run):
                    run.display.say(f"note: {note}")
        metrics |= when_solved(run.folder, config)
        discard(run.folder, (*OUTPUTS, *PICTURES))
        write_csv(run.folder / "episodes.csv", rows)
        result = {
            "project": "ppo",
            "config": run.folder.name,
            "checkpoint_step": update,
            "total_steps": total,
            "metrics": metrics,
            "n": {"episodes": config.eval.episodes},
            "seeds": [config.seed],
            "policy": main_policy,
            "config_sha256": config_hash(config),
            "weights_sha256": sha256(main_path),
            "outputs": output_hashes(run.folder, OUTPUTS),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(run.folder / "eval.json", result)
        # results first: pictures may fail, with a note
        attempt_picture("learning curve", lambda: draw(config, run), run)
        if config.eval.video:
            attempt_picture("film", lambda: save_film(config, run, main_path), run)
        show(metrics, f"{run.folder.name} after {update} of {total} updates")
        print(json.dumps(result), flush=True)


def measure(config: Config, path: Path, run: Run, stochastic: bool) -> tuple[list[tuple[float, int]], dict[str, str]]:
    """(return, length) of each episode, and what is noted beside the weights."""
    count = config.eval.count or min(config.eval.episodes, 16)
    vector = evaluation_vector(config, mix_seed(config.seed, SEED_STREAM), count)
    try:
        policy = Policy(path, config, vector.observation_space, vector.action_space, run.device)
        generator = torch.Generator().manual_seed(mix_seed(config.seed, SEED_STREAM, 1)) if stochastic else None
        games = play(policy, vector, config.eval.episodes, generator, config.eval.max_steps, run.track)
    finally:
        vector.close()
    cut = sum(length >= config.eval.max_steps for _, length in games)
    if cut:
        run.display.say(f"note: {cut} episodes were cut after eval.max_steps={config.eval.max_steps} steps")
    return games, policy.facts


def notes_on(facts: dict[str, str], total: int, config: Config, options: Options, run: Run) -> list[str]:
    """Where the weights are not what one may think: of another environment, of a stopped run, not the newest."""
    notes = []
    problem = trained_otherwise(facts.get("config", ""), config, only=("env.",), free=("env.count", "env.backend"))
    if problem:
        notes.append(f"the policy was {problem}")
    update = int(facts["update"])
    newest = run.checkpoints.newest_step() or 0
    if newest > update and not options.checkpoint:
        name = run.checkpoints.path(newest).name
        notes.append(f"the weights are of update {update}, the newest checkpoint of {newest}: --checkpoint {name}")
    if update < total:
        notes.append(f"the weights are of update {update} of {total}: no finished training")
    return notes


def threshold(config: Config) -> float:
    """The mean return that counts as solved: the config's, else the environment's own, else infinity."""
    own = find(config.env).reward_threshold
    return config.eval.solved or (own if own is not None else math.inf)


def when_solved(folder: Path, config: Config) -> dict[str, float]:
    """Episodes and steps of training until the mean return of the last 100 training episodes reached the threshold;
    and in all.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    found = (
        {f"{name}_total": lines[-1][key] for name, key in (("episodes", "episodes"), ("steps", "env_steps"))}
        if lines
        else {}
    )
    for line in lines:
        if line["episodes"] >= ENOUGH and line["return_mean"] >= threshold(config):
            return found | {"episodes_to_solve": line["episodes"], "steps_to_solve": line["env_steps"]}
    return found


def chosen_policies(folder: Path, checkpoint: str) -> dict[str, Path]:
    """Names and files of what is measured: the last policy and, where there is one, the best; with --checkpoint, that
    one alone.
    """
    if checkpoint:
        chosen = Path(checkpoint)
        if chosen.name == checkpoint:  # a bare name is one of this run's; a path is taken as it stands
            chosen = folder / checkpoint if chosen.suffix == ".safetensors" else folder / "checkpoints" / checkpoint
        return {chosen.name: chosen}
    best = folder / "best.safetensors"
    return {"last": folder / "last.safetensors"} | ({"best": best} if best.exists() else {})


def attempt_picture(what: str, make: Callable[[], None], run: Run) -> None:
    """Call `make`; whatever goes wrong in it, an environment that cannot be rendered for one, is a note."""
    try:
        make()
    except Stopped:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        run.display.say(f"note: no {what}: {type(error).__name__}: {reason}")


def draw(config: Config, run: Run) -> None:
    """The learning curve of this run."""
    from ppo.playing.pictures import draw_curve

    folder = run.folder
    lines = [
        line for line in read_metrics(folder / "metrics.jsonl") if not math.isnan(line.get("return_mean", math.nan))
    ]
    if lines:
        draw_curve(
            folder / "figures/learning_curve.png",
            {folder.name: [[(line["env_steps"], line["return_mean"]) for line in lines]]},
            threshold(config),
            config.env.id,
        )


def save_film(config: Config, run: Run, path: Path) -> None:
    """figures/episode.gif of the policy at `path`. Of Atari, what the policy sees."""
    from ppo.playing.pictures import save_gif

    pixels = config.env.atari
    seed = mix_seed(config.seed, SEED_STREAM, 2)
    frames = config.eval.video_frames
    environment = make_vector(config.env, seed, 1, training=False) if pixels else make_one(config.env, "rgb_array")
    try:
        spaces = environment.observation_space, environment.action_space
        policy = Policy(path, config, *spaces, run.device)
        pictures, total = (
            film_pixels(policy, environment, frames) if pixels else film(policy, environment, frames, seed % 2**31)
        )
    finally:
        environment.close()
    fps = 60 / config.env.frame_skip if pixels else environment.metadata.get("render_fps", 30)
    save_gif(pictures, run.folder / "figures/episode.gif", fps)
    run.display.say(f"{run.folder / 'figures/episode.gif'}: an episode of {len(pictures)} frames, return {total:.1f}")


def show(metrics: dict[str, float], title: str) -> None:
    """Print the metrics as a table."""
    table = Table("metric", title=title, title_justify="left")
    table.add_column("value", justify="right")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)

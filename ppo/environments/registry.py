"""From a config to environments: which backend, which wrappers, and one clear line when something is missing."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from common.config import ConfigError
from common.errors import ProjectError
from ppo.checks import FirstLook
from ppo.config import EnvConfig
from ppo.environments.custom import nearest, spec_of, wrapped
from ppo.environments.normalize import ObservationNormalizer
from ppo.environments.pool import PoolVector
from ppo.environments.vectors import GymVector, LocalVector, Vector
from ppo.model import SMALLEST_IMAGE

EXTRAS = {
    "box2d": 'pip install "gymnasium[box2d]"',
    "mujoco": 'pip install "gymnasium[mujoco]"',
    "ale_py": "pip install ale-py",
    "pygame": "pip install pygame",
    "cv2": "pip install opencv-python",
    "envpool": "pip install envpool",
}
NATIVE = "vector_entry_point"
NO_LIMIT = 2**31 - 1  # what envpool calls it


def make_vector(config: EnvConfig, seed: int, count: int, first: int = 0, training: bool = True) -> Vector:
    """`count` environments as one.

    Args:
        first: number of the first one among those of all processes; seeds differ by it.
        training: Atari ends an episode with a lost life and rewards are signs only in training.
    Raises:
        ProjectError: an unknown environment (with the nearest names), a missing package (with how to install it), or a
            space that this project has no policy for.
    """
    if config.backend == "envpool":
        return checked(make_pool(config, seed, count, first, training), config)
    spec = find(config)
    backend = choose_backend(config)
    if backend == "atari" and not config.atari:
        raise ProjectError(f"env.backend=atari plays ALE/<Game>-v5, not {config.id}")
    if backend in ("atari", "native"):
        refuse_arguments(config, backend, ("wrappers", "kwargs", "continuous"))
    if backend == "atari":
        return checked(GymVector(make_atari(config, count, training), seed, first), config)
    if backend == "native":
        extra = {"max_episode_steps": config.max_episode_steps} if config.max_episode_steps else {}
        vector = attempt(
            config.id, lambda: gym.make_vec(spec, count, vectorization_mode=NATIVE, vector_kwargs={}, **extra)
        )
        return checked(GymVector(vector, seed, first), config)
    if backend == "processes":
        build = [lambda: make_worker(config) for _ in range(count)]
        vector = attempt(config.id, lambda: AsyncVectorEnv(build, autoreset_mode=AutoresetMode.SAME_STEP))
        return checked(GymVector(vector, seed, first), config)
    environments = [attempt(config.id, lambda: make_one(config)) for _ in range(count)]
    return checked(LocalVector(environments, seed, first, config.max_episode_steps), config)


def find(config: EnvConfig) -> EnvSpec:
    """Gymnasium's notes about the environment. `ProjectError` with the nearest names for an unknown one."""
    if config.atari:
        attempt(config.id, register_atari)
    return spec_of(config.id)


def refuse_arguments(config: EnvConfig, backend: str, names: tuple[str, ...]) -> None:
    """`ConfigError` for settings that only environments made one by one can be given."""
    for name in names:
        if getattr(config, name):
            raise ConfigError(f"env.{name}", f"env.backend={backend} does not know it; local and processes do")


def register_atari() -> None:
    """Make the Atari games known to gymnasium; their ROMs come with the package."""
    import ale_py

    gym.register_envs(ale_py)


def choose_backend(config: EnvConfig) -> str:
    """What `env.backend=auto` means for this environment."""
    if config.backend != "auto":
        return config.backend
    if config.atari and not (config.wrappers or config.kwargs):
        return "atari"
    simple = not (config.wrappers or config.kwargs or config.continuous)
    return "native" if simple and config.id.startswith("CartPole") else "local"


def make_one(config: EnvConfig, render_mode: str | None = None) -> gym.Env:
    """A single environment in its wrappers, without gymnasium's checks of every step."""
    extra = dict(config.kwargs)
    if config.continuous:
        extra["continuous"] = True
    if config.max_episode_steps:
        extra["max_episode_steps"] = config.max_episode_steps
    if render_mode:
        extra["render_mode"] = render_mode
    return wrapped(gym.make(find(config), disable_env_checker=True, **extra), config.wrappers)


def make_worker(config: EnvConfig) -> gym.Env:
    """`make_one` in a worker process. Stop signals often go to all processes; this one goes on until the main one
    has no use for it.
    """
    if multiprocessing.parent_process():  # the main process makes one, too, to look at its spaces
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return FirstLook(make_one(config))


def make_atari(config: EnvConfig, count: int, training: bool) -> gym.vector.VectorEnv:
    """ale-py's own vector environment: C++ threads do the emulation, resizing to grey pixels and stacking.

    Its option `episodic_life` starts a new game after each lost life. What is wanted is `life_loss_info`: the life's
    end is an episode's, and the game goes on.
    """
    lives = config.episodic_life and training
    limit = config.max_episode_steps * config.frame_skip or 108_000  # frames: half an hour

    def build() -> gym.vector.VectorEnv:
        from ale_py.vector_env import AtariVectorEnv

        register_atari()
        vector = AtariVectorEnv(
            rom_name(config.id),
            count,
            stack_num=config.frame_stack,
            frameskip=config.frame_skip,
            noop_max=config.noop_max,
            repeat_action_probability=config.sticky_actions,
            life_loss_info=lives,
            reward_clipping=False,
            use_fire_reset=True,
            maxpool=True,
            grayscale=True,
            img_height=config.image_size,
            img_width=config.image_size,
            num_threads=config.threads,
            max_num_frames_per_episode=limit,
        )
        vector.frame_limit = limit if lives else 0
        return vector

    return attempt(config.id, build)


def rom_name(name: str) -> str:
    """`ALE/SpaceInvaders-v5` -> `space_invaders`, as its ROM file is called; gymnasium's registry knows."""
    return gym.spec(name).kwargs["game"]


def make_pool(config: EnvConfig, seed: int, count: int, first: int, training: bool) -> PoolVector:
    """Envpool's version of an environment. Its time limit is gymnasium's, its rewards are never clipped, its lives
    are counted here.
    """

    def load() -> Any:
        import envpool

        return envpool

    envpool = attempt(config.id, load)
    refuse_arguments(config, "envpool", ("wrappers", "kwargs"))
    task = pool_task(config, envpool.list_all_envs())
    atari = config.atari
    options: dict[str, Any] = {}
    if atari:
        if not config.noop_max:
            raise ProjectError(
                "env.noop_max must be at least 1 with env.backend=envpool, which crashes at 0; env.backend=atari does "
                "not"
            )
        options = {
            "img_height": config.image_size,
            "img_width": config.image_size,
            "num_threads": config.threads,
            "stack_num": config.frame_stack,
            "frame_skip": config.frame_skip,
            "noop_max": config.noop_max,
            "reward_clip": False,
            "repeat_action_probability": config.sticky_actions,
            "episodic_life": False,
            "use_fire_reset": True,
        }
    own = attempt(config.id, lambda: present(lambda: envpool.make_spec(task))).config
    if own.max_num_players != 1:
        raise ProjectError(f"{config.id} is played by {own.max_num_players}; this project knows one player")
    if hasattr(own, "noop_max") and not atari:
        raise ProjectError(f"Atari games are called ALE/{task} here, not {config.id}")
    usual = (
        108_000 // config.frame_skip
        if atari
        else gym.spec(config.id).max_episode_steps
        if config.id in gym.registry
        else None
    )
    limit = config.max_episode_steps or usual or own.max_episode_steps
    options["max_episode_steps"] = min(limit + 1, NO_LIMIT)  # `PoolVector` keeps ours

    def build(seeds: list[int]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bounds of its spaces are rounded
            pool = envpool.make(task, env_type="gymnasium", num_envs=count, seed=seeds, **options)
            _ = pool.observation_space, pool.action_space  # made at first use
        return pool

    lives = atari and config.episodic_life and training
    return attempt(
        config.id,
        lambda: present(lambda: PoolVector(build, count, seed, first, limit if limit < NO_LIMIT else 0, lives)),
    )


def pool_task(config: EnvConfig, tasks: list[str]) -> str:
    """Envpool's name of an environment. Never another version: `ProjectError` with the nearest names where it has
    not got this one.
    """
    task, (stem, mark, version) = config.id, config.id.rpartition("-v")
    if config.atari:
        find(config)
        task = "".join(word.capitalize() for word in rom_name(config.id).split("_")) + "-v5"
    elif config.continuous:
        task = f"{stem}Continuous{mark}{version}"
    if task in tasks:
        return task
    near = nearest(task, tasks)
    raise ProjectError(
        f"envpool has no {task!r}"
        + (f"; its nearest: {near}" if near else "")
        + ("; gymnasium has it: env.backend=auto" if config.id in gym.registry else "")
    )


def present(build: Callable[[], Any]) -> Any:
    """Call `build`, which uses a package that is installed: if it still fails to import something, the message has
    its own remedy.
    """
    try:
        return build()
    except ImportError as error:
        raise RuntimeError(str(error)) from error


def attempt(name: str, build: Callable[[], Any]) -> Any:
    """Call `build`; a missing package or a broken environment becomes one line."""
    try:
        return build()
    except (ProjectError, ConfigError):
        raise
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        text = f"{error} {getattr(error, 'name', '')}".lower()
        hint = next(
            (command for word, command in EXTRAS.items() if word in text), "see the environment's own documentation"
        )
        raise ProjectError(
            f"{name} needs a package that is not installed ({str(error).splitlines()[0][:100]}): {hint}"
        ) from None
    except Exception as error:  # whatever somebody's environment does when it is made
        raise ProjectError(
            f"{name} cannot be made: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
        ) from error


def checked(vector: Vector, config: EnvConfig) -> Vector:
    """`ProjectError` for observations that the networks here cannot read, `ConfigError` for a setting that does not
    go with them.
    """
    space = vector.observation_space
    trouble = ""
    numbers = isinstance(space, gym.spaces.Box) and space.dtype.kind in "fuib"
    if not (isinstance(space, gym.spaces.Discrete) or (numbers and 0 not in space.shape)):
        trouble = (
            "a Box of numbers or pixels, or Discrete; flatten it: env.wrappers=[gymnasium.wrappers.FlattenObservation]"
        )
    elif is_image(space) and not plain_pixels(space):
        trouble = (
            "pixels are uint8, or have bounds [0, 1] or [0, 255]; gymnasium.wrappers.TransformObservation scales them, "
            "FlattenObservation makes them numbers for model.kind=mlp"
        )
    if trouble:
        vector.close()
        text = " ".join(str(space).split())  # one line, without hundreds of bounds
        raise ProjectError(
            f"observation space {text if len(text) < 120 else f'{text[:100]}...'} is not supported: {trouble}"
        )
    if config.continuous and not isinstance(vector.action_space, gym.spaces.Box):
        vector.close()
        raise ConfigError("env.continuous", f"does nothing here: the actions of {config.id} are {vector.action_space}")
    if config.normalize_observations and is_image(space):
        vector.close()
        raise ConfigError("env.normalize_observations", "pixels are not normalised: the network divides them by 255")
    return vector


def is_image(space: gym.Space) -> bool:
    """Whether observations are pictures, (C, H, W) or (H, W, C), large enough for the convolutional network."""
    return (
        isinstance(space, gym.spaces.Box)
        and len(space.shape) == 3
        and (channels_last(space) or min(space.shape[1:]) >= SMALLEST_IMAGE)
    )


def channels_last(space: gym.Space) -> bool:
    """Whether observations are pictures (H, W, C) of 1, 3 or 4 channels, as most simulators draw them; such a W x C
    is no picture.
    """
    return len(space.shape) == 3 and space.shape[2] in (1, 3, 4) and min(space.shape[:2]) >= SMALLEST_IMAGE


def plain_pixels(space: gym.spaces.Box) -> bool:
    """Whether it is known what the brightest pixel is: the network divides by 255, and would make noughts of
    anything else.
    """
    return space.dtype == np.uint8 or (space.low.min() >= 0 and space.high.max() in (1, 255))


def observation_shape(space: gym.Space) -> tuple[int, ...]:
    """Shape of what the network sees: a discrete observation becomes one-hot, a single number (1,), a picture (C, H,
    W).
    """
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if channels_last(space):
        return (space.shape[2], *space.shape[:2])
    return tuple(space.shape) or (1,)


def observation_normalizer(space: gym.Space, config: EnvConfig) -> ObservationNormalizer:
    """What scales observations as `env.normalize_observations` says. One-hot ones stay: their rare entries would become
    large.
    """
    enabled = config.normalize_observations and not isinstance(space, gym.spaces.Discrete)
    return ObservationNormalizer(observation_shape(space), enabled, config.clip_observations)


def as_input(space: gym.Space, observations: np.ndarray) -> np.ndarray:
    """Observations (N, ...) as the network sees them: (N, *observation_shape(space)).

    float32, one-hot for discrete ones. Pictures have channels first and go up to 255, whatever the environment's
    brightest is; uint8 stays so. It is the convolutional network that divides by 255.
    """
    if isinstance(space, gym.spaces.Discrete):
        return one_hot(np.asarray(observations), int(space.n), int(space.start))
    bytes_stay = space.dtype == np.uint8 and len(space.shape) == 3
    seen = np.asarray(observations, dtype=np.uint8 if bytes_stay else np.float32)
    if channels_last(space):
        seen = np.ascontiguousarray(seen.transpose(0, 3, 1, 2))  # (N, C, H, W)
    if is_image(space) and space.high.max() <= 1:
        seen = seen * seen.dtype.type(255)
    return seen if space.shape else seen.reshape(-1, 1)


def one_hot(numbers: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """float32 (N, count) for integers (N,) from `start` on. `ProjectError` for one outside."""
    index = numbers.astype(np.int64).reshape(-1) - start
    if index.min() < 0 or index.max() >= count:
        wrong = int(index[(index < 0) | (index >= count)][0]) + start
        raise ProjectError(f"an environment showed {wrong}; its observation space is {start} to {start + count - 1}")
    seen = np.zeros((len(index), count), dtype=np.float32)
    seen[np.arange(len(index)), index] = 1
    return seen

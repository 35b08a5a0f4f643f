"""From a config to environments: which backend, which wrappers, and one clear line when something is missing."""

from __future__ import annotations

import difflib
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from common.errors import ProjectError
from ppo.config import EnvConfig
from ppo.envs import GymVector, LocalVector, Vector

EXTRAS = {"box2d": 'pip install "gymnasium[box2d]"', "mujoco": 'pip install "gymnasium[mujoco]"', "ale_py": "pip install ale-py",
          "pygame": "pip install pygame", "cv2": "pip install opencv-python", "envpool": "pip install envpool"}
NATIVE = "vector_entry_point"


def make_vector(config: EnvConfig, seed: int, count: int, first: int = 0, training: bool = True) -> Vector:
    """`count` environments as one.

    Args:
        first: number of the first one among those of all processes; seeds differ by it.
        training: Atari ends an episode with a lost life and rewards are signs only in training.
    Raises:
        ProjectError: an unknown environment (with the nearest names), a missing package (with how to install it), or a space that this
            project has no policy for.
    """
    known(config.id)
    backend = choose_backend(config)
    if backend == "atari":
        if not config.id.startswith("ALE/"):
            raise ProjectError(f"env.backend=atari plays ALE/<Game>-v5, not {config.id}")
        return checked(GymVector(make_atari(config, count, training), seed, first))
    if backend == "native":
        extra = {"max_episode_steps": config.max_episode_steps} if config.max_episode_steps else {}
        vector = attempt(config.id, lambda: gym.make_vec(config.id, count, vectorization_mode=NATIVE, vector_kwargs={}, **extra))
        return checked(GymVector(vector, seed, first))
    if backend == "processes":
        build = [lambda: make_worker(config) for _ in range(count)]
        vector = attempt(config.id, lambda: AsyncVectorEnv(build, autoreset_mode=AutoresetMode.SAME_STEP))
        return checked(GymVector(vector, seed, first))
    return checked(LocalVector([attempt(config.id, lambda: make_one(config)) for _ in range(count)], seed, first, config.max_episode_steps))


def known(name: str) -> None:
    """`ProjectError` with the nearest names for an id that is not registered."""
    if name.startswith("ALE/"):
        attempt(name, register_atari)
    if name in gym.registry:
        return
    near = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
    raise ProjectError(f"there is no environment {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def register_atari() -> None:
    """Make the Atari games known to gymnasium; their ROMs come with the package."""
    import ale_py

    gym.register_envs(ale_py)


def choose_backend(config: EnvConfig) -> str:
    """What `env.backend=auto` means for this environment."""
    if config.backend != "auto":
        return config.backend
    if config.id.startswith("ALE/"):
        return "atari"
    return "native" if gym.spec(config.id).vector_entry_point and config.id.startswith("CartPole") else "local"


def make_one(config: EnvConfig, render_mode: str | None = None) -> gym.Env:
    """A single environment, without gymnasium's checks of every step."""
    extra: dict[str, Any] = {"continuous": True} if config.continuous else {}
    if config.max_episode_steps:
        extra["max_episode_steps"] = config.max_episode_steps
    return gym.make(config.id, render_mode=render_mode, disable_env_checker=True, **extra)


def make_worker(config: EnvConfig) -> gym.Env:
    """`make_one` in a worker process. Stop signals often go to all processes; this one goes on until the main one has no use for it."""
    if multiprocessing.parent_process():  # the main process makes one, too, to look at its spaces
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return make_one(config)


def make_atari(config: EnvConfig, count: int, training: bool) -> gym.vector.VectorEnv:
    """ale-py's own vector environment: C++ threads do the emulation, resizing to 84 x 84 grey pixels and stacking.

    Its option `episodic_life` starts a new game after each lost life. What is wanted is `life_loss_info`: the life's end is an
    episode's, and the game goes on.
    """
    lives = config.episodic_life and training
    limit = config.max_episode_steps * config.frame_skip or 108_000  # frames: half an hour

    def build() -> gym.vector.VectorEnv:
        from ale_py.vector_env import AtariVectorEnv

        register_atari()
        vector = AtariVectorEnv(rom_name(config.id), count, stack_num=config.frame_stack, frameskip=config.frame_skip,
                                noop_max=config.noop_max, repeat_action_probability=config.sticky_actions, life_loss_info=lives,
                                reward_clipping=False, use_fire_reset=True, maxpool=True, grayscale=True, img_height=84, img_width=84,
                                max_num_frames_per_episode=limit)
        vector.frame_limit = limit if lives else 0
        return vector

    return attempt(config.id, build)


def rom_name(name: str) -> str:
    """`ALE/SpaceInvaders-v5` -> `space_invaders`, as its ROM file is called; gymnasium's registry knows."""
    return gym.spec(name).kwargs["game"]


def attempt(name: str, build: Callable[[], Any]) -> Any:
    """Call `build`; a missing package or a broken environment becomes one line."""
    try:
        return build()
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        text = f"{error} {getattr(error, 'name', '')}".lower()
        hint = next((command for word, command in EXTRAS.items() if word in text), "see the environment's own documentation")
        raise ProjectError(f"{name} needs a package that is not installed ({str(error).splitlines()[0][:100]}): {hint}") from None
    except (gym.error.Error, TypeError, ValueError, RuntimeError) as error:
        raise ProjectError(f"{name} cannot be made: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None


def checked(vector: Vector) -> Vector:
    """`ProjectError` for observations that the networks here cannot read."""
    space = vector.observation_space
    if not (isinstance(space, gym.spaces.Discrete) or (isinstance(space, gym.spaces.Box) and space.dtype.kind in "fui")):
        vector.close()
        raise ProjectError(f"observation space {space} is not supported: a Box of numbers or pixels, or Discrete; flatten it with a "
                           "wrapper of your own")
    return vector


def observation_shape(space: gym.Space) -> tuple[int, ...]:
    """Shape of what the network sees: a discrete observation becomes one-hot."""
    return (int(space.n),) if isinstance(space, gym.spaces.Discrete) else tuple(space.shape)


def as_input(space: gym.Space, observations: np.ndarray) -> np.ndarray:
    """Observations as the network sees them: float32 (N, O), one-hot for discrete ones, pixels uint8 as they are."""
    if isinstance(space, gym.spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[np.asarray(observations, dtype=np.int64) - int(space.start)]
    if space.dtype == np.uint8 and len(space.shape) == 3:
        return observations
    return np.asarray(observations, dtype=np.float32)

"""Proximal policy optimisation from scratch: right under today's gymnasium, resumable to the bit, fast on a CPU."""

from common.projects import Demo, Metric

METRICS = {
    "return_mean": Metric("Mean return", "higher", leads=True),
    "return_mean_stochastic": Metric("Mean return, sampled actions", "higher"),
    "return_mean_best": Metric("Mean return, best policy", "higher"),
    "episodes_to_solve": Metric("Episodes to solve", "lower"),
}
DEMO = Demo("ppo", "configs/ppo_cartpole_tiny.yaml", seconds=30)

"""The policy at work: rollouts for training, episodes for the record, curves and films."""

"""What is made of a rollout: distributions over actions, the clipped objective, and its gradient."""

"""What the agent acts in: vectors of environments, how they are made from names, and the scaling of what they say."""

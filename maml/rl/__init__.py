"""What the meta-RL domains share: rollouts and their advantages."""

"""Environments of the meta-RL domains (section 5.3): one by one for Gymnasium, and many at once for training."""

import gymnasium

gymnasium.register("maml/PointNavigation-v0", "maml.environment.point:PointNavigation", max_episode_steps=100)
for _name in ("CheetahVelocity", "CheetahDirection", "AntVelocity", "AntDirection"):
    gymnasium.register(f"maml/{_name}-v0", f"maml.environment.locomotion:{_name}", max_episode_steps=200)

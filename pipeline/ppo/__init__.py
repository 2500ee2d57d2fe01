"""PPO with a KL penalty, from the formulas up to the update."""

"""How soon our PPO and TRL's make a policy of a given quality, from the same two models."""

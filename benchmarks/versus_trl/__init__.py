"""Our PPO beside the last PPO trainer of TRL (1.12), on the same rollouts in the same minutes."""

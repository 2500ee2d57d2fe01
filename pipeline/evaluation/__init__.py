"""How good a policy is: gold score, win rates, divergence, diversity, best-of-n."""

"""The reward model: Bradley-Terry over rankings, its data, its baseline and its report."""

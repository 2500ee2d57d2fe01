"""Throughput on several processes: what was measured, and what that means on paper for GPUs."""

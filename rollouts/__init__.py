"""Rollouts: samplers that record denoising trajectories. Imports nothing of `rl` or `rewards`."""

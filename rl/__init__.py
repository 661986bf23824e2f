"""denoise-rl: reinforcement learning for diffusion models. Importing this package is instant."""

__version__ = "0.1.0"

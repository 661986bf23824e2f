"""Inference-time alignment: searches over the randomness of a sampler, guided by a reward.

`protocol.py` says what a search asks of a sampler, and holds the base class of all searches. `tokens.py` and
`latents.py` are the samplers of text and images; every other file is one family of searches. `rl.registry.SEARCHES`
knows their names.
"""

"""Inference-time alignment: searches over the randomness of a sampler, guided by a reward.

`protocol.py` says what a search asks of a sampler; `tokens.py` is the sampler for masked-diffusion language
models; every other file is one family of searches, and `run.py` finds a search by its name.
"""

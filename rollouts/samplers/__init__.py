"""Decoders for masked diffusion, assembled from parts. Importing this package needs no torch."""

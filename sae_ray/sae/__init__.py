"""Sparse autoencoders: fast encoding, activations, training, quality and labels."""

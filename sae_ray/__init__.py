"""Curate data, tune and serve experts through the latents of sparse autoencoders, on Ray."""

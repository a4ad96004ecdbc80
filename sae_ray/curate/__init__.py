"""Curation: from a description to a selection, over an index of pooled latents."""

"""Explanation: what was chosen and why, on pages for people."""

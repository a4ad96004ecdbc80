"""Evaluation: what is asked, how it is scored, how sure we are."""

"""Experts: adapters with a name, what they were made from and how good they are."""

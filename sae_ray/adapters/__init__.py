"""Adapters: trainable edits of a frozen model, all of them PEFT's; import the module you need."""

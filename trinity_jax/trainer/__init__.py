"""Packing, the train step, optimizer and checkpoints."""

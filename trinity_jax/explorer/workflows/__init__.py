"""Built-in workflows by name."""

from __future__ import annotations

from trinity_jax.explorer.workflows.single_turn import single_turn

WORKFLOWS = {"single_turn": single_turn}

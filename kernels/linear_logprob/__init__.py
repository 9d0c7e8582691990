"""Log-prob, entropy and logsumexp of next tokens, fused with the output projection."""

from .api import DEFAULT, IMPLEMENTATIONS, linear_logprob

__all__ = ["DEFAULT", "IMPLEMENTATIONS", "linear_logprob"]

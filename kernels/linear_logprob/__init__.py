"""Log-prob, entropy and logsumexp of next tokens, fused with the output projection."""

from .api import IMPLEMENTATIONS, expected_score, linear_logprob, linear_logprob_loss

__all__ = ["IMPLEMENTATIONS", "expected_score", "linear_logprob", "linear_logprob_loss"]

"""The neighbours of SRPO: each a pure function that returns weights, or a term, for the same loss.

    weights = METHODS["vppo"](logps=old_logps, corrupted_logps=corrupted_logps, completion_mask=completion_mask)

Plain PyTorch on `[B, T]`: no loops over rows or tokens, no device syncs, nothing of size N x V. `srpo_sibling` alone
aligns texts on the CPU.
"""

from srpo.methods.papo import papo_loss_term
from srpo.methods.pgpo import pgpo_weights
from srpo.methods.rlsd import linear_strength, rlsd_weights
from srpo.methods.sibling import contradicted_by_sibling, sibling_weights
from srpo.methods.table import METHODS, SIGNALS, Method
from srpo.methods.tor import tor_weights
from srpo.methods.vgpo import vgpo_token_factors, vgpo_trajectory_factors, vgpo_weights, visual_similarity
from srpo.methods.vppo import vppo_token_mask, vppo_trajectory_factors, vppo_weights

__all__ = [
    "METHODS",
    "SIGNALS",
    "Method",
    "contradicted_by_sibling",
    "linear_strength",
    "papo_loss_term",
    "pgpo_weights",
    "rlsd_weights",
    "sibling_weights",
    "tor_weights",
    "vgpo_token_factors",
    "vgpo_trajectory_factors",
    "vgpo_weights",
    "visual_similarity",
    "vppo_token_mask",
    "vppo_trajectory_factors",
    "vppo_weights",
]

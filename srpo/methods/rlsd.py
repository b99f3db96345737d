"""RLSD: token weights by the advantage-signed log-ratio of a teacher to the policy."""

import torch
from torch import Tensor

from srpo import checks
from srpo.errors import ConfigError, is_number, refuse
from srpo.methods.signals import difference, number, opened
from srpo_kernels.layout import Layout


def linear_strength(step: int, *, initial: float = 0.5, steps: int = 50) -> float:
    """Anneal the strength of weights linearly to 0: initial * max(0, 1 - step / steps).

    Args:
        step: optimisation steps done, from 0.
        initial: strength at step 0.
        steps: step at which, and after which, it is 0.

    Returns: the `strength` of `rlsd_weights`, or of `CreditConfig`.

    Raises: ConfigError.

    Source: RLSD, arXiv 2604.03128. The released script starts counting at 1 and ends after 60.
    """
    for name, x, lowest in (("step", step, 0), ("initial", initial, 0), ("steps", steps, 1)):
        if not is_number(x) or x < lowest:
            expected, fix = f"a number of at least {lowest}", "pass trainer.state.global_step as step"
            refuse(ConfigError, "linear_strength", name, repr(x), expected, fix)
    return initial * max(0.0, 1.0 - step / steps)


def rlsd_weights(
    logps: Tensor,
    teacher_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    *,
    strength: float = 0.5,
    weight_min: float = 0.8,
    weight_max: float = 1.2,
) -> Tensor:
    """Weight every valid token by how much a teacher agrees with the sign of its advantage.

    w = 1 - strength + strength * clip(exp(sign(A) * (teacher_logps - logps)), weight_min, weight_max)

    Args:
        logps: `[B, T]` nats, of the policy.
        teacher_logps: `[B, T]` nats, of the same tokens under the teacher: the policy with privileged information.
        advantages: `[B]` or `[B, T]`; only the sign is read.
        completion_mask: `[B, T]` 0/1; None means all valid.
        strength: see `linear_strength`; in [0, 1].
        weight_min: lower bound of the ratio.
        weight_max: upper bound of the ratio.

    Returns: `[B, T]` fp32 (fp64 for fp64); 0 on masked tokens, 1 where the advantage is 0.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NonFiniteError.

    Source: RLSD, arXiv 2604.03128. The released code contrasts with the current log-probs, detached.
    """
    call, mask, (own, teacher) = opened(
        "rlsd_weights", "logps", logps, completion_mask, {"teacher_logps": teacher_logps}
    )
    per_token = checks.advantages_of(call, advantages, mask, Layout(tuple(mask.shape)))
    number(call, "strength", strength, 0.0, 1.0, 0.5)
    number(call, "weight_min", weight_min, 0.0, weight_max, 0.8)
    number(call, "weight_max", weight_max, weight_min, torch.inf, 1.2)
    with torch.no_grad():
        ratio = (torch.where(mask, per_token, 0.0).sign().to(own.dtype) * difference(teacher, own)).exp()
        return torch.where(mask, 1.0 - strength + strength * ratio.clamp(weight_min, weight_max), 0.0)

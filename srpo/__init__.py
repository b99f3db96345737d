"""Role-aware token credit for GRPO on vision-language models.

    from srpo import role_weighted_grpo_loss

Importing `srpo` loads torch and nothing heavier: no Triton, transformers, trl or matplotlib.
"""

import srpo._moved  # noqa: F401 - before anything can ask for an old name
from srpo.config import PRESETS, CreditConfig, LossConfig
from srpo.credit import group_advantages, role_contrast, token_advantages, token_weights
from srpo.errors import (
    ConfigError,
    ConfigWarning,
    DeviceError,
    DtypeError,
    IncompatibleVersionError,
    KernelUnavailableError,
    NonFiniteError,
    RoleParseError,
    ShapeError,
    SRPOError,
)
from srpo.hidden import role_weighted_grpo_loss_from_hidden, selected_logps_from_hidden, vocabulary_kl_from_hidden
from srpo.loss import (
    Divergence,
    SelectedLogps,
    role_weighted_grpo_loss,
    role_weighted_grpo_loss_from_logps,
    selected_logps,
    vocabulary_kl,
)
from srpo.methods import METHODS, linear_strength, papo_loss_term, visual_similarity
from srpo.metrics import MetricSums
from srpo.roles import Role, RoleGrammar, RoleParse, role_ids_from_completions
from srpo.stage import LossOutput
from srpo.vision.ablation import perception_tokens
from srpo.vision.corruption import Blank, Blur, GaussianNoise, PatchMask, PixelLayout, ShuffleImages
from srpo.vision.pictures import corrupt_images
from srpo.vision.scoring import StreamDivergences, StreamLogps, score_streams

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PRESETS",
    "Blank",
    "Blur",
    "ConfigError",
    "ConfigWarning",
    "CreditConfig",
    "DeviceError",
    "Divergence",
    "DtypeError",
    "GaussianNoise",
    "IncompatibleVersionError",
    "KernelUnavailableError",
    "LossConfig",
    "LossOutput",
    "MetricSums",
    "NonFiniteError",
    "PatchMask",
    "PixelLayout",
    "Role",
    "RoleGrammar",
    "RoleParse",
    "RoleParseError",
    "SRPOError",
    "SelectedLogps",
    "ShapeError",
    "ShuffleImages",
    "StreamDivergences",
    "StreamLogps",
    "corrupt_images",
    "group_advantages",
    "linear_strength",
    "papo_loss_term",
    "perception_tokens",
    "role_contrast",
    "role_ids_from_completions",
    "role_weighted_grpo_loss",
    "role_weighted_grpo_loss_from_hidden",
    "role_weighted_grpo_loss_from_logps",
    "score_streams",
    "selected_logps",
    "selected_logps_from_hidden",
    "token_advantages",
    "token_weights",
    "visual_similarity",
    "vocabulary_kl",
    "vocabulary_kl_from_hidden",
]

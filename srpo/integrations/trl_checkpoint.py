"""The weights of a checkpoint, read back as transformers wrote them.

`save_pretrained` writes the names, and the layouts, that a family had when its weights were published, and
`from_pretrained` reads them. transformers' Trainer takes names as they are: what it does not find, it leaves as it was.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from srpo.errors import ConfigError, refuse

_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def has_weights(folder: str | Path) -> bool:
    """Say whether a checkpoint holds the weights of a whole model, as `save_pretrained` writes them."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_weights(model: Any, folder: str | Path) -> None:
    """Load all weights of a checkpoint that `save_pretrained` wrote of this model; dtypes and devices stay.

    Memory: a second model on the CPU.

    Raises: ConfigError, where a tensor of the model is missing or has another shape; the model is then as before.
    """
    model = getattr(model, "_orig_mod", model)
    dtypes = {x.dtype for x in model.state_dict().values() if x.is_floating_point()}
    with torch.random.fork_rng(devices=[]):
        saved, found = type(model).from_pretrained(
            folder,
            config=model.config,  # which it copies
            dtype=functools.reduce(torch.promote_types, dtypes),  # no value is rounded on its way
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # and told
            output_loading_info=True,
        )
    lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lacking:
        n, names = len(saved.state_dict()), ", ".join(lacking[:4])
        got = f"{str(folder)!r}, which lacks {len(lacking)} of {n} tensors: {names}"
        fix = "resume from a checkpoint of this model, or start from its weights without resume_from_checkpoint"
        refuse(ConfigError, "SRPOTrainer.train", "resume_from_checkpoint", got, "all tensors of the model", fix)
    model.load_state_dict(saved.state_dict())

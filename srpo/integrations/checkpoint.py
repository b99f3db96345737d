"""The weights of a checkpoint, read back as transformers wrote them.

`save_pretrained` writes the names, and the layouts, that a family had when its weights were published, and
`from_pretrained` reads them. transformers' Trainer takes names as they are: what it does not find, it leaves as it was.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from srpo.errors import ConfigError, refuse

_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class ReadsBack:
    """Let a Trainer of transformers, of which this is the first base class, resume from the weights that it saved."""

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _read_back(self, resume_from_checkpoint):
            trainer: Any = super()
            trainer._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self: Any) -> None:
        if not _read_back(self, self.state.best_model_checkpoint):
            trainer: Any = super()
            trainer._load_best_model()


def _read_back(trainer: Any, folder: str) -> bool:
    """Read the weights of a checkpoint, if it has those of a whole model as `save_pretrained` writes them."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False
    check_adapter(trainer.model, folder)
    if found := has_weights(folder):
        load_weights(trainer.model, folder)
    return found


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
    _refuse_lacking(folder, lacking, len(saved.state_dict()))
    model.load_state_dict(saved.state_dict())


def check_adapter(model: Any, folder: str | Path) -> None:
    """Check that a checkpoint of an adapter has all its tensors: PEFT warns of those that are missing, and goes on.

    Raises: ConfigError.
    """
    file, name = Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME, "default"  # PEFT has folders for adapters of other names
    if file.is_file() and name in getattr(model, "peft_config", ()):
        peft: Any = importlib.import_module("peft")
        own = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        with safe_open(file, "pt") as saved:
            _refuse_lacking(folder, sorted(own.keys() - set(saved.keys())), len(own))


def _refuse_lacking(folder: str | Path, names: list[str], n: int) -> None:
    if names:
        got = f"{str(folder)!r}, which lacks {len(names)} of {n} tensors: {', '.join(names[:4])}"
        fix = "resume from a checkpoint of this model, or start from its weights without resume_from_checkpoint"
        refuse(ConfigError, "SRPOTrainer.train", "resume_from_checkpoint", got, "all tensors of the model", fix)

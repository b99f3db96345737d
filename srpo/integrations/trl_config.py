"""The settings of `SRPOTrainer`: TRL's own, and those of the credit stage."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, NoReturn

from srpo import corruption as corruptions
from srpo.config import PRESETS, CreditConfig
from srpo.errors import ConfigError, IncompatibleVersionError
from srpo.methods import METHODS
from srpo.roles import RoleGrammar

TESTED = ("1.14.2", "1.16.0")

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except (ImportError, RuntimeError) as error:  # TRL turns failed imports of its own into RuntimeError
    expected = f"TRL, of the tested versions {', '.join(TESTED)}"
    raise IncompatibleVersionError(
        f"srpo.integrations.trl: trl got {error}, expected {expected}; pip install 'srpo[trl]'."
    ) from error

_AT_HAND = {"role_ids", "corrupted_logps", "ablated_logps", "advantages", "entropy", "step"}  # signals of a method


@dataclass
class SRPOConfig(GRPOConfig):
    """Hold TRL's settings and those of the credit stage.

    Args:
        credit: a `CreditConfig`, the name of a preset (`srpo.PRESETS`), or of a method of `srpo.METHODS` that reads
            log-probs alone (`"vppo"`, `"pgpo"`, `"tor"`). `"grpo"` is TRL's trainer, bit for bit.
        credit_anneal_steps: steps over which the strength of the weights falls linearly to 0; None: constant.
        role_grammar: a `RoleGrammar`, or its fields in a dict.
        corruption: one of `srpo.corruption`, its name, or a dict `{"name": "PatchMask", "probability": 0.5}`; None:
            `PatchMask()`.
        perception_hiding: `"mask"`, `"delete"` or None, as `method` of `score_streams`.
        stream_batch_size: sequences a forward of `score_streams`; None: `per_device_train_batch_size`.

    Raises:
        ConfigError: an unknown name, or a setting under which token weights do nothing.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *getattr(GRPOConfig, "_VALID_DICT_FIELDS", ()),
        "role_grammar",
        "corruption",
    ]

    credit: str = field(default="srpo", metadata={"help": "Preset, method or CreditConfig."})
    credit_anneal_steps: int | None = field(default=None, metadata={"help": "Steps until the strength is 0."})
    role_grammar: dict | str | None = field(default=None, metadata={"help": "Fields of RoleGrammar."})
    corruption: dict | str | None = field(default=None, metadata={"help": "Corruption of the images, by name."})
    perception_hiding: str | None = field(default=None, metadata={"help": "'mask' or 'delete'; default: by model."})
    stream_batch_size: int | None = field(default=None, metadata={"help": "Sequences per scoring forward."})

    def __post_init__(self) -> None:
        super().__post_init__()
        grammar_of(self.role_grammar)
        corruption_of(self.corruption)
        _check_credit(self.credit)
        steps = self.credit_anneal_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            refuse("credit_anneal_steps", repr(steps), "None or a positive int", "pass max_steps")
        if self.perception_hiding not in (None, "mask", "delete"):
            refuse("perception_hiding", repr(self.perception_hiding), "None, 'mask' or 'delete'", "leave it out")
        # A weighted mean of the log-ratios is constant over a sequence: weights of mean 1 cancel in it.
        cancels = self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo")
        if cancels and self.credit != "grpo":
            expected = "'token', because token weights with mean 1 cancel under a sequence ratio"
            refuse("importance_sampling_level", "'sequence'", expected, "use 'token', or loss_type='cispo'")
        if self.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            refuse("use_liger_kernel", "True", "False: Liger's loss takes no advantages per token", "set it to False")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, dataclasses as dicts, for JSON."""
        return {name: asdict(x) if _is_instance(x) else x for name, x in super().to_dict().items()}


def _check_credit(credit: Any) -> None:
    if isinstance(credit, CreditConfig) or (isinstance(credit, str) and credit in PRESETS):
        return
    method = METHODS.get(credit) if isinstance(credit, str) else None
    usable = [name for name, m in METHODS.items() if not m.adds_a_term and set(m.needs) <= _AT_HAND]
    if method is None or method.name not in usable:
        expected = "a CreditConfig or one of " + ", ".join(usable)
        refuse("credit", repr(credit), expected, "give other methods their signals in a loop of your own")


def grammar_of(x: Any) -> RoleGrammar:
    """Return the grammar of a `SRPOConfig`."""
    x = _parsed(x)
    if x is None or isinstance(x, RoleGrammar):
        return x or RoleGrammar()
    if not isinstance(x, Mapping):
        refuse("role_grammar", repr(x), "a RoleGrammar or a dict of its fields", "leave it out")
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in x.items()}
    try:
        return RoleGrammar(**known)
    except TypeError as error:
        refuse("role_grammar", str(error), "fields of RoleGrammar", "leave unknown ones out")


def corruption_of(x: Any) -> Any:
    """Return the corruption of a `SRPOConfig`."""
    x = _parsed(x)
    if x is None or callable(getattr(x, "on_inputs", None)):
        return corruptions.PatchMask() if x is None else x
    settings = dict(x) if isinstance(x, Mapping) else {"name": x}
    name = settings.pop("name", None)
    names = [known for known in corruptions.__all__ if known != "PixelLayout"]
    if name not in names:
        refuse("corruption", repr(x), "a corruption, or the name of one: " + ", ".join(names), "use 'PatchMask'")
    try:
        return getattr(corruptions, name)(**settings)
    except TypeError as error:
        refuse("corruption", str(error), f"settings of {name}", "leave unknown ones out")


def _parsed(x: Any) -> Any:
    """Parse what a command line gives as text."""
    return json.loads(x) if isinstance(x, str) and x.lstrip().startswith("{") else x


def _is_instance(x: Any) -> bool:
    return is_dataclass(x) and not isinstance(x, type)


def refuse(argument: str, got: str, expected: str, fix: str, function: str = "SRPOConfig") -> NoReturn:
    """Raise a ConfigError with the house message."""
    raise ConfigError(f"{function}(): {argument} got {got}, expected {expected}; {fix}.")

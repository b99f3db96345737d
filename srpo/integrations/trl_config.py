"""The settings of `SRPOTrainer`: TRL's own, and those of the credit stage."""

import json
import warnings
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, NoReturn

from srpo.config import PRESETS
from srpo.errors import ConfigError, IncompatibleVersionError, is_int, refuse
from srpo.integrations.trl_fused import check_settings
from srpo.settings import CreditSettings

TESTED = ("1.14.2", "1.16.0")

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except (ImportError, RuntimeError) as error:  # TRL turns failed imports of its own into RuntimeError
    expected = f"TRL, of the tested versions {', '.join(TESTED)}"
    raise IncompatibleVersionError(
        f"srpo.integrations.trl: trl got {error}, expected {expected}; pip install -e '.[trl]' in a checkout of srpo."
    ) from error


@dataclass
class SRPOConfig(GRPOConfig):
    """Hold TRL's settings and those of the credit stage.

    Args:
        credit: a `CreditConfig`, the name of a preset (`srpo.PRESETS`), or of a method of `srpo.METHODS` that reads
            log-probs alone (`"vppo"`, `"pgpo"`, `"tor"`). `"grpo"` is TRL's trainer, bit for bit.
        credit_anneal_steps: steps over which the strength of the weights falls linearly to 0; None: constant.
        role_grammar: a `RoleGrammar`, or its fields in a dict.
        corruption: a corruption such as `PatchMask()`, its name, or a dict `{"name": "PatchMask", "probability":
            0.5}`; None: `PatchMask()`.
        ablation: how perception is hidden, `"mask"`, `"delete"` or None, as in `score_streams`.
        stream_batch_size: sequences a forward of `score_streams`; None: `per_device_train_batch_size`.
        fused_loss: compute TRL's loss, for every `loss_type`, from hidden states: logits of completions never exist,
            and masked rows and rows with an advantage of 0 cost no head product. Equal to TRL's within rounding; what
            it does not cover is refused by name. The `entropy` that is logged is that of the rows that were scored.
        log_credit_steps: every so many steps the main process writes rollouts with their credit as a page,
            `credit/step_0000.html` under `output_dir`, and as lines of `credit/rollouts.jsonl`; what is logged goes
            to `credit/metrics.jsonl`, and the page to W&B and trackio, a picture to TensorBoard, where `report_to`
            names them. `python -m srpo report OUTPUT_DIR` reads them. None: nothing is written.

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
    ablation: str | None = field(default=None, metadata={"help": "'mask' or 'delete': how perception is hidden."})
    perception_hiding: str | None = field(default=None, metadata={"help": "The old name of ablation."})
    stream_batch_size: int | None = field(default=None, metadata={"help": "Sequences per scoring forward."})
    fused_loss: bool = field(default=False, metadata={"help": "Compute the loss from hidden states."})
    log_credit_steps: int | None = field(default=None, metadata={"help": "Steps between pages of token credit."})

    def __post_init__(self) -> None:
        super().__post_init__()
        credit = self.credit_settings().credit
        if self.perception_hiding is not None:
            message = "srpo: SRPOConfig(perception_hiding=) is now ablation=; the old name goes with the next release"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            self.ablation, self.perception_hiding = self.perception_hiding, None
        if self.ablation not in (None, "mask", "delete"):
            refuse(
                ConfigError, "SRPOConfig", "ablation", repr(self.ablation), "None, 'mask' or 'delete'", "leave it out"
            )
        if self.log_credit_steps is not None and not (is_int(self.log_credit_steps) and self.log_credit_steps > 0):
            got, fix = repr(self.log_credit_steps), "pass log_credit_steps=50"
            refuse(ConfigError, "SRPOConfig", "log_credit_steps", got, "None or an int of at least 1", fix)
        if self.fused_loss:
            check_settings(self)
        # A weighted mean of the log-ratios is constant over a sequence: weights of mean 1 cancel in it.
        cancels = self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo")
        if cancels and credit != PRESETS["grpo"]:
            expected = "'token', because token weights with mean 1 cancel under a sequence ratio"
            refuse(
                ConfigError,
                "SRPOConfig",
                "importance_sampling_level",
                "'sequence'",
                expected,
                "use 'token', or loss_type='cispo'",
            )
        if self.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            refuse(
                ConfigError,
                "SRPOConfig",
                "use_liger_kernel",
                "True",
                "False: Liger's loss takes no advantages per token",
                "set it to False",
            )

    def credit_settings(self) -> CreditSettings:
        """Return the settings of the credit stage."""
        names = ("credit", "credit_anneal_steps", "role_grammar", "corruption")
        try:
            return CreditSettings.of({name: _parsed(getattr(self, name)) for name in names})
        except ConfigError as error:
            raise ConfigError(str(error).replace("CreditSettings.of()", "SRPOConfig()")) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, dataclasses as dicts, for JSON."""
        return {name: asdict(x) if _is_instance(x) else x for name, x in super().to_dict().items()}


def _parsed(x: Any) -> Any:
    """Parse what a command line gives as text."""
    return json.loads(x) if isinstance(x, str) and x.lstrip().startswith("{") else x


def _is_instance(x: Any) -> bool:
    return is_dataclass(x) and not isinstance(x, type)


def _refuse(argument: str, got: str, expected: str, fix: str) -> NoReturn:
    refuse(ConfigError, "SRPOConfig", argument, got, expected, fix)

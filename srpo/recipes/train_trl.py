"""Train a vision-language model with SRPO in TRL.

    accelerate launch -m srpo.recipes.train_trl --data geometry3k --size 3b --output_dir out
    python -m srpo.recipes.train_trl --model PATH --data my.jsonl --output_dir out --max_steps 20

Every option of `SRPOConfig`, and so of TRL's `GRPOConfig`, is one here too and overrides the settings of the size. Then
`python -m srpo report out` says how it went. Try the model first: `python -m srpo check MODEL`.
"""

from dataclasses import dataclass, field
from typing import Any

import trl

from srpo.integrations.trl import SRPOConfig, SRPOTrainer
from srpo.recipes.data import load
from srpo.recipes.rewards import REWARD_WEIGHTS, REWARDS

MODELS = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
COMMON: dict[str, Any] = {
    "credit": "srpo",
    "corruption": {"name": "PatchMask", "probability": 0.6},
    "fused_loss": True,
    "log_credit_steps": 20,
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "num_generations": 8,
    "temperature": 1.0,
    "max_completion_length": 1024,
    "mask_truncated_completions": True,
    "reward_weights": REWARD_WEIGHTS,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1.0,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
}
# For 8 GPUs of 80 GB: 64 prompts of 8 rollouts an update. A 7B model has half the sequences a forward, twice as often.
SETTINGS: dict[str, dict[str, Any]] = {
    "3b": COMMON | {"learning_rate": 1e-6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8},
    "7b": COMMON | {"learning_rate": 5e-7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 16},
}


@dataclass
class RecipeArguments:
    """Hold what is trained on what.

    Args:
        data: `geometry3k`, `virl39k`, or a file of lines with `question`, `images` and `answer`.
        size: which settings.
        model: a path or a name on the hub; None: Qwen2.5-VL of that size.
    """

    data: str = field(default="geometry3k", metadata={"help": "geometry3k, virl39k, or a .jsonl file of your own."})
    size: str = field(
        default="3b", metadata={"help": "Settings for a model of about that size.", "choices": list(SETTINGS)}
    )
    model: str | None = field(default=None, metadata={"help": "Path or name; Qwen2.5-VL of the size if not said."})


def parse(arguments: list[str] | None = None) -> tuple[RecipeArguments, SRPOConfig]:
    """Return what the command line says, over the settings of the size that it names."""
    size = _size(arguments)
    parser = _parser(RecipeArguments, SRPOConfig, description=__doc__)
    parser.set_defaults_with_config(**SETTINGS[size])
    recipe, config = parser.parse_args_and_config(arguments)
    return recipe, config


def _size(arguments: list[str] | None) -> str:
    """Return the size alone: the defaults of everything else depend on it."""
    parser = _parser(RecipeArguments, add_help=False)
    return parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)[0].size


def _parser(*classes: Any, **options: Any) -> Any:
    return trl.TrlParser(classes, **options)  # pyright: ignore - trl resolves its names when they are asked for


def main(arguments: list[str] | None = None) -> SRPOTrainer:
    """Train, from the last checkpoint with `--resume_from_checkpoint`, and save the model."""
    recipe, config = parse(arguments)
    trainer = SRPOTrainer(
        model=recipe.model or MODELS[recipe.size],
        reward_funcs=REWARDS,
        args=config,
        train_dataset=load(recipe.data),
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true", "last") else resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()

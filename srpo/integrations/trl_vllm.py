"""What TRL's vLLM was asked to continue, compared with what the policy is trained on.

TRL up to 1.16 hands a colocated vLLM prompts whose image tokens the processor has repeated, and vLLM repeats them again
(huggingface/trl#6294): completions are then sampled behind another prompt than the one that scores them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from srpo.errors import IncompatibleVersionError, house_message


@contextmanager
def prompts_seen(trainer: Any) -> Iterator[list[list[int]]]:
    """Collect the prompts that vLLM continued in the first turn of a generation; none where TRL does not ask it."""
    found: list[list[int]] = []
    if not trainer.use_vllm or trainer.rollout_func is not None:
        yield found
        return
    engine, generate = trainer.vllm_generation, trainer.vllm_generation.generate

    def remembering(*arguments: Any, **named: Any) -> Any:
        output = generate(*arguments, **named)
        if not found:
            found.extend(output[0])
        return output

    engine.generate = remembering
    try:
        yield found
    finally:
        engine.generate = generate


def check_prompts(seen: list[list[int]], trained: list[list[int]]) -> None:
    """Refuse completions of other prompts than those that are trained on.

    Raises: IncompatibleVersionError.
    """
    if not seen:
        return
    lengths = [(len(x), len(y)) for x, y in zip(seen, trained, strict=True) if list(x) != list(y)]
    if lengths:
        got, expected = f"a prompt of {lengths[0][0]} tokens", f"the {lengths[0][1]} that are trained on"
        fix = f"set use_vllm=False until huggingface/trl#6294 is closed, which trl {version('trl')} has"
        raise IncompatibleVersionError(house_message("SRPOTrainer", "vLLM", got, expected, fix))

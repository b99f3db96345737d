"""What a vLLM that repeats image tokens again does to a run. The engine is a stand-in; vLLM itself has not been run."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_grpo import Rollouts, make_trainer

from srpo import IncompatibleVersionError
from srpo.integrations.trl import SRPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def trainer_with(expand: Any, folder: Any) -> SRPOTrainer:
    """Build a trainer whose vLLM continues `expand(prompt)`."""
    trainer = make_trainer(SRPOTrainer, folder, "qwen25vl", max_steps=1)
    draw = Rollouts()

    def generate(prompts: list, images: Any, num_generations: int, profiler: Any) -> tuple[list, list, list, None]:
        ids = [draw.completion(f"{i}", trainer, "0")[0] for i in range(len(prompts))]
        return [expand(x) for x in prompts], ids, [[[-1.0]] * len(row) for row in ids], None

    trainer.vllm_generation = SimpleNamespace(generate=generate, sync_weights=lambda: None)
    trainer.use_vllm, trainer.rollout_func, trainer._last_loaded_step = True, None, -1
    return trainer


def test_the_prompts_that_are_trained_on_pass(tmp_path):
    trainer = trainer_with(list, tmp_path)
    generate = trainer.vllm_generation.generate
    trainer.train()
    assert trainer.vllm_generation.generate is generate
    assert "srpo/baseline" in trainer.state.log_history[0]


def test_repeated_image_tokens_are_refused(tmp_path):
    def twice(prompt: list[int]) -> list[int]:
        token = trainer.model.config.image_token_id
        place = prompt.index(token)
        return prompt[:place] + [token] * (prompt.count(token) - 1) + prompt[place:]

    trainer = trainer_with(twice, tmp_path)
    n = 16  # image tokens of a picture of 32 pixels
    with pytest.raises(IncompatibleVersionError, match=r"a prompt of (\d+) tokens.*trl#6294") as raised:
        trainer.train()
    seen, trained = (int(word) for word in str(raised.value).split() if word.isdigit())
    assert seen - trained == n - 1

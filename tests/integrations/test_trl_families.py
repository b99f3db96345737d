"""SRPOTrainer, two steps, on the families that plain GRPOTrainer trains: streams are those of TRL's own log-probs."""

import pytest
import rollouts
import tiny_vlms
import torch
from datasets import Dataset
from families import grids, others, tiles
from families.harness import FAMILIES, built, picture
from tiny_grpo import Checked, column, make_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TABLES = (grids, tiles, others)  # reading them fills FAMILIES
# The others do not get through GRPOTrainer: it passes on no inputs but those of its list, pads no such prompts, or
# calls the image processor with an argument that it does not know. Cohere's do, but TRL scales their logits by the
# `logit_scale` of their text config, which the models themselves leave alone.
TRAINED = [
    *("internvl", "qianfan", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("exaone4_5", "hyperclova", "minimax3", "lfm3", "hunyuan", "glm4v", "glm46v", "glm_ocr", "gemma3", "gemma4"),
    *("gemma4_bidirectional", "llava", "vipllava", "llava_next", "idefics2", "idefics2_split", "idefics3"),
    *("idefics3_split", "smolvlm", "smolvlm_split", "perception_lm", "lfm2_vl", "lfm2_vl_split", "fast_vlm"),
]


@pytest.mark.parametrize("images", [(1, 2), (2, 0, 1), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_two_steps(name, images, tmp_path):
    family = FAMILIES[name]
    model, processor = built(family)
    model.warnings_issued = {}
    processor.chat_template = tiny_vlms.chat_template(family.block)
    rows = [images[i % len(images)] for i in range(8)]
    pictures = [
        [picture(10 * i + j, family.sizes[(i + j) % len(family.sizes)]) for j in range(n)] for i, n in enumerate(rows)
    ]
    prompts = [[{"role": "user", "content": f"how many? {i}"}] for i in range(8)]
    data = Dataset.from_dict({"prompt": prompts, "images": pictures})
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2, "learning_rate": 1e-4}
    trainer = make_trainer(Checked, tmp_path, vlm=(model, processor), data=data, **settings)
    trainer.train()
    assert all(torch.tensor(column(trainer, "grad_norm")).isfinite())
    valid = trainer.output["completion_mask"].bool()
    shown = valid & (trainer.roles == 1) & torch.tensor([[bool(x["images"])] for x in trainer.examples])
    rollouts.assert_close(trainer.streams.logps, trainer.own, valid)
    rollouts.assert_close(trainer.streams.corrupted_logps, trainer.without_pictures, shown)
    assert rollouts.largest(trainer.without_pictures, trainer.own, shown) > 1e-3

"""The precision of the head: streams have the log-probs that TRL trains on, whatever dtypes and autocast are."""

from contextlib import nullcontext
from typing import Any

import pytest
import tiny_vlms
import torch
import transformers
from tiny_grpo import Checked, make_trainer

from srpo import ConfigError, score_streams
from srpo.integrations.trl import _scores_in_fp32
from srpo.vision.prefix import PROOFS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:score_streams.*no image:UserWarning"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = 5


@pytest.mark.parametrize("family", ["idefics3", pytest.param("qwen25vl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_that_trl_cast(dtype, autocast, family, tmp_path):
    model, processor = tiny_vlms.build(family)
    trainer = make_trainer(
        Checked, tmp_path, vlm=(model.to(DTYPES[dtype]), processor), max_steps=1, bf16=autocast,
        cast_lm_head_to_fp32=True,
    )  # fmt: skip
    if dtype == "bf16" or autocast:  # in 16 bits the other road rounds otherwise
        PROOFS.keep(trainer.model, False, "test")
    forward = trainer.model.lm_head.forward
    trainer.train()
    valid = trainer.output["completion_mask"] != 0
    torch.testing.assert_close(trainer.streams.logps[valid], trainer.own[valid], atol=5e-6, rtol=0.0)
    seen = valid & (trainer.roles == 1)
    # backbones in 16 bits round alike for one shape only, and the corrupted forward is shorter
    atol = 5e-6 if dtype == "fp32" and not autocast else 0.02
    bad = trainer.streams.corrupted_logps[seen]
    torch.testing.assert_close(bad, trainer.without_pictures[seen], atol=atol, rtol=0.0)
    assert trainer.model.lm_head.forward is forward


def clean(model: Any, ids: torch.Tensor, **settings: Any) -> Any:
    """Score the last T tokens as they are."""
    nothing = torch.zeros(len(ids), T, dtype=torch.int8)
    return score_streams(model, ids, torch.ones_like(ids), T, role_ids=nothing, streams=("clean",), **settings)


def gemma2() -> Any:
    """A model that caps its logits: the head alone does not make them."""
    settings = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.Gemma2Config(
        **settings, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, final_logit_softcapping=2.0,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.mark.skipif(not _scores_in_fp32(), reason="a TRL whose cast autocast undoes")
@pytest.mark.parametrize(
    ("cast", "dtype", "autocast", "kind"),
    [
        (cast, dtype, autocast, kind)
        for cast in (True, False)
        for dtype in DTYPES
        for autocast in (None, "bf16", "fp16")
        for kind in ("bare", "capped")
        # what such a model caps in 16 bits TRL caps in fp32
        if cast or kind == "bare" or (dtype == "fp32" and not autocast)
    ],
)
def test_the_fused_head(cast, dtype, autocast, kind):
    from trl.trainer.utils import add_fused_lm_head

    model = (gemma2() if kind == "capped" else tiny_vlms.build("idefics3")[0]).to(DTYPES[dtype])
    if cast:
        model.lm_head.float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 50, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :-T] = -100
    inside = torch.autocast("cpu", DTYPES[autocast]) if autocast else nullcontext()
    with inside, torch.no_grad():
        streams = clean(model, ids, temperature=0.7, cast_lm_head_to_fp32=cast)
        add_fused_lm_head(model, 0.7, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy"))
        want = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    torch.testing.assert_close(streams.logps, want.log_probs[:, -T:], atol=5e-6, rtol=0.0)
    torch.testing.assert_close(streams.entropy, want.entropy[:, -T:], atol=5e-6, rtol=0.0)


def test_a_head_that_cannot_be_fp32_is_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = gemma2().to(torch.bfloat16)
    model.lm_head = Scaled(32, 50, bias=False).to(torch.bfloat16)
    ids = torch.randint(20, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"cast_lm_head_to_fp32.*Scaled.*float"):
        clean(model, ids, cast_lm_head_to_fp32=True)
    model.lm_head.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = clean(model, ids, cast_lm_head_to_fp32=True).logps
        states = model.model(input_ids=ids).last_hidden_state.float()
    logits = 2.0 * (2 * states @ model.lm_head.weight.T / 2.0).tanh()
    want = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[:, -T - 1 : -1, 0]
    torch.testing.assert_close(got, want, atol=5e-6, rtol=0.0)

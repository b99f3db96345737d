"""Recipes of OpenRLHF, SkyRL, AReaL and NeMo-RL on stand-ins of their data, against `score_streams`: none was run.

The stand-ins have the fields, shapes and alignments of the released code: OpenRLHF scores lists of batches for the
columns of an action mask, SkyRL a dict for a response length, AReaL whole rows that are padded on the right, each token
in the column before it; NeMo-RL as well, in its own column.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor

from srpo import (
    ConfigError,
    PixelLayout,
    role_contrast,
    role_ids_from_completions,
    score_streams,
    token_weights,
)
from srpo.integrations import areal, nemo_rl, openrlhf, skyrl
from srpo.settings import CreditSettings

FAMILY = "qwen25vl"
TEXTS = (
    "<perception>red 3</perception><think>so 4</think>",
    "<perception>blue</perception> <think>x+1=2</think>7",
    "no tags at all",
    "<think>a</think><perception>12",
)
SETTINGS = CreditSettings.of({"credit": "srpo", "corruption": {"name": "PatchMask", "probability": 0.6}})


class Rollout:
    """Four completions of one prompt: prompts padded on the left, completions on the right."""

    def __init__(self) -> None:
        self.model, self.processor = tiny_vlms.build(FAMILY)
        self.tokenizer, self.layout = self.processor.tokenizer, PixelLayout.of_model(self.model)
        one = dict(self.processor(text=[tiny_vlms.PROMPTS[FAMILY]], images=[tiny_vlms.picture(3)], return_tensors="pt"))
        self.pictures = [{name: one[name] for name in ("pixel_values", "image_grid_thw")}] * len(TEXTS)
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        self.T = max(map(len, rows))
        prompt, pad = one["input_ids"][0], self.tokenizer.pad_token_id
        self.ids = torch.stack([torch.cat([prompt, torch.tensor(x + [pad] * (self.T - len(x)))]) for x in rows])
        self.mask = torch.tensor([[1] * len(x) + [0] * (self.T - len(x)) for x in rows])
        self.attention = torch.cat([torch.ones(len(rows), len(prompt), dtype=torch.long), self.mask], dim=1)
        self.advantages = torch.tensor([1.0, -0.5, 0.25, -1.0])[:, None] * self.mask

    def after(self, ids: Tensor, attention: Tensor, pictures: list[dict[str, Tensor]]) -> Tensor:
        """Score the token behind each column; positions are the model's own, so that a cut closes the gap."""
        vision = {name: torch.cat([row[name] for row in pictures]) for name in pictures[0]}
        kinds = (ids == self.model.config.image_token_id).long()
        with torch.no_grad():
            logits = self.model(ids, attention_mask=attention, mm_token_type_ids=kinds, **vision).logits
        return logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]

    @property
    def old(self) -> Tensor:
        return self.after(self.ids, self.attention, self.pictures)[:, -self.T :]

    def expected(self) -> Tensor:
        """Return the advantages of `score_streams`, the perception swapped for nothing, which closes gaps."""
        vision = {name: torch.cat([row[name] for row in self.pictures]) for name in self.pictures[0]}
        roles = role_ids_from_completions(self.ids[:, -self.T :], self.tokenizer, completion_mask=self.mask).role_ids
        none = {"other_perception_ids": self.ids[:, :0], "other_perception_mask": self.mask[:, :0]}
        streams = score_streams(
            self.model, self.ids, self.attention, self.T, role_ids=roles, corruption=SETTINGS.corruption,
            mm_token_type_ids=(self.ids == self.model.config.image_token_id).long(), **vision, **none,
        )  # fmt: skip
        contrast = role_contrast(
            streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
            role_ids=roles, completion_mask=self.mask,
        )  # fmt: skip
        return self.advantages * token_weights(contrast, roles, self.mask)


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return Rollout()


def assert_credited(found: Tensor, rollout: Rollout) -> None:
    expected = rollout.expected()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert ((found - rollout.advantages).abs() > 1e-3).sum() > 10


def test_openrlhf(rollout):
    class Maker:
        actor_model_group = "actors"
        strategy = SimpleNamespace(
            args=SimpleNamespace(
                train=SimpleNamespace(colocate_all=False, colocate_actor_ref=False),
                ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
            )
        )

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for x, rows in zip(experiences, (slice(0, 2), slice(2, 4)), strict=True):
                x.advantages = rollout.advantages[rows].clone()
            return experiences

        def _dispatch_forward(self, group: str, waits: bool, **columns: list[Any]) -> list[Any]:
            assert (group, waits) == ("actors", False)
            assert all(x.dtype == torch.bool for x in columns["action_mask"])
            names = ("sequences", "attention_mask", "mm_train_inputs_list", "action_mask")
            rows = zip(*(columns[name] for name in names), strict=True)
            return [[rollout.after(ids, mask, mm)[:, -actions.shape[1] :]] for ids, mask, mm, actions in rows]

        def _flatten_results(self, refs: list[Any], duplicate_factor: int) -> list[Any]:
            return [x for ref in refs[::duplicate_factor] for x in ref]

    maker = openrlhf.credited(Maker, SETTINGS, rollout.tokenizer, rollout.layout)()
    experiences = [
        SimpleNamespace(
            sequences=rollout.ids[rows], attention_mask=rollout.attention[rows], action_mask=rollout.mask[rows].bool(),
            action_log_probs=rollout.old[rows], mm_train_inputs=rollout.pictures[rows], info={},
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]  # fmt: skip
    found = maker.compute_advantages_and_returns(experiences)
    assert_credited(torch.cat([x.advantages for x in found]), rollout)
    assert len(found[0].info["srpo/baseline"]) == 2


class Batch(dict):
    """SkyRL's batch: a dict of tensors and lists of tensors, with metadata."""

    metadata: dict[str, Any]

    def select(self, keys: list[str], metadata_keys: list[str]) -> "Batch":
        made = Batch({name: self[name] for name in keys})
        made.metadata = {name: self.metadata[name] for name in metadata_keys}
        return made


class SkyTrainer:
    def __init__(self, rollout: Rollout, step_wise: bool = False) -> None:
        self.rollout, self.tokenizer, self.global_step, self.all_metrics = rollout, rollout.tokenizer, 1, {}
        self.cfg = SimpleNamespace(generator=SimpleNamespace(step_wise_trajectories=step_wise))

    def compute_advantages_and_returns(self, data: Batch) -> Batch:
        data["advantages"] = self.rollout.advantages.clone()
        return data

    def _execute_forward_pass(self, model: str, data: Batch, key: str, mini_batch_boundaries: Any) -> Tensor:
        assert (model, key, mini_batch_boundaries) == ("policy", "logprobs", None)
        names = ("pixel_values", "image_grid_thw")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*(data[name] for name in names), strict=True)]
        scored = self.rollout.after(data["sequences"], data["attention_mask"], rows)
        return scored[:, -data.metadata["response_length"] :]


def sky_batch(rollout: Rollout) -> Batch:
    data = Batch(
        sequences=rollout.ids, attention_mask=rollout.attention, loss_mask=rollout.mask, action_log_probs=rollout.old
    )
    data |= {name: [row[name] for row in rollout.pictures] for name in rollout.pictures[0]}
    data.metadata = {"response_length": rollout.T, "uids": ["a"] * 4}
    return data


def test_skyrl(rollout):
    trainer = skyrl.credited(SkyTrainer, SETTINGS, rollout.layout)(rollout)
    found = trainer.compute_advantages_and_returns(sky_batch(rollout))
    assert_credited(found["advantages"], rollout)
    assert "srpo/baseline" in trainer.all_metrics


def test_skyrl_refuses(rollout):
    kind = skyrl.credited(SkyTrainer, SETTINGS, rollout.layout)
    with pytest.raises(ConfigError, match="step_wise_trajectories"):
        kind(rollout, step_wise=True).compute_advantages_and_returns(sky_batch(rollout))
    with pytest.raises(ConfigError, match="action_log_probs"):
        kind(rollout).compute_advantages_and_returns(sky_batch(rollout) | {"action_log_probs": None})


class Actor:
    def __init__(self, rollout: Rollout, level: str = "token") -> None:
        self.rollout, self.config = rollout, SimpleNamespace(importance_sampling_level=level)

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        width = data["input_ids"].shape[1] - 1
        own = torch.nn.functional.pad(self.rollout.advantages, (width - self.rollout.T, 1))
        return data | {"advantages": own, "loss_mask": data["loss_mask"].roll(-1, dims=1)}

    def _compute_logp(self, data: dict[str, Any]) -> Tensor:
        mask = data["attention_mask"]
        assert bool((mask.diff(dim=1) <= 0).all()), "padding is on the right"
        return torch.nn.functional.pad(self.rollout.after(data["input_ids"], mask, data["multi_modal_input"]), (0, 1))


def areal_batch(rollout: Rollout) -> dict[str, Any]:
    own = torch.nn.functional.pad(rollout.mask, (rollout.ids.shape[1] - rollout.T, 0))
    scored = rollout.after(rollout.ids, rollout.attention, rollout.pictures)
    return {
        "input_ids": rollout.ids, "attention_mask": rollout.attention, "loss_mask": own,
        "prox_logp": torch.nn.functional.pad(scored, (0, 1)), "multi_modal_input": rollout.pictures,
    }  # fmt: skip


def test_areal(rollout):
    actor = areal.credited(Actor, SETTINGS, rollout.tokenizer, rollout.layout)(rollout)
    found = actor._compute_advantages(areal_batch(rollout))["advantages"]
    assert_credited(found[:, -rollout.T - 1 : -1], rollout)
    assert found.shape == rollout.ids.shape


def test_areal_refuses(rollout):
    kind = areal.credited(Actor, SETTINGS, rollout.tokenizer, rollout.layout)
    with pytest.raises(ConfigError, match="importance_sampling_level"):
        kind(rollout, "sequence")._compute_advantages(areal_batch(rollout))
    with pytest.raises(ConfigError, match="prox_logp"):
        kind(rollout)._compute_advantages(areal_batch(rollout) | {"prox_logp": None})


class Packed:
    """NeMo-RL's packed tensor: one tensor a row, or None."""

    def __init__(self, tensors: list[Tensor | None], dim_to_pack: int) -> None:
        self.tensors, self.dim_to_pack = tensors, dim_to_pack


def test_nemo_rl(rollout):
    class Policy:
        def get_logprobs(self, data: Batch) -> dict[str, Tensor]:
            lengths, ids = data["input_lengths"], data["input_ids"]
            valid = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            names = ("pixel_values", "image_grid_thw")
            rows = [{name: data[name].tensors[i] for name in names} for i in range(len(ids))]
            return {"logprobs": torch.nn.functional.pad(rollout.after(ids, valid, rows), (1, 0))}

    start = rollout.ids.shape[1] - rollout.T
    data = Batch(
        input_ids=rollout.ids, input_lengths=rollout.attention.sum(dim=1), sample_mask=torch.ones(4),
        token_mask=torch.nn.functional.pad(rollout.mask, (start, 0)),
        prev_logprobs=torch.nn.functional.pad(rollout.old, (start, 0)),
        advantages=torch.nn.functional.pad(rollout.advantages, (start, 0)),
    )  # fmt: skip
    data |= {name: Packed([row[name] for row in rollout.pictures], 0) for name in rollout.pictures[0]}
    found, metrics = nemo_rl.credited_advantages(Policy(), data, rollout.tokenizer, rollout.layout, SETTINGS)
    assert found.shape == rollout.ids.shape
    assert_credited(found[:, start:], rollout)
    assert "srpo/baseline" in metrics

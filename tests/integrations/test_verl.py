"""What verl and EasyR1 are given: tensors against loops and the golden vectors, streams against `score_streams`."""

import dataclasses
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import tiny_verl
import tiny_vlms
import torch

from srpo import (
    METHODS,
    PRESETS,
    Blank,
    ConfigError,
    CreditConfig,
    PatchMask,
    PixelLayout,
    RoleGrammar,
    ShapeError,
    corrupt_images,
    score_streams,
)
from srpo.integrations.verl import (
    PARTITION,
    CreditStages,
    ablated_fields,
    easyr1_streams,
    jagged,
    padded,
    realigned_log_probs,
    token_credit_advantages,
)
from srpo.roles import Role, role_ids_from_completions
from srpo.settings import CreditSettings
from srpo.streams import is_no_evidence

EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def vlm() -> Any:
    """A tiny model, its processor, trajectories, and the streams that `score_streams` finds in them."""
    model, processor = tiny_vlms.build(tiny_verl.FAMILY)
    rows = tiny_verl.trajectories(model, processor)
    arguments = tiny_verl.score_streams_arguments(rows, processor.tokenizer)
    T = max(len(row["responses"]) for row in rows)
    ids = padded([row["responses"] for row in rows])
    mask = padded([row["response_mask"] for row in rows])
    roles = role_ids_from_completions(ids, processor.tokenizer, completion_mask=mask).role_ids
    assert all(len(row["prompts"]) == len(rows[0]["prompts"]) for row in rows)
    streams = score_streams(
        model, **arguments, logits_to_keep=T, role_ids=roles, corruption=PatchMask(),
        temperature=tiny_verl.TEMPERATURE, ablation="delete",
    )  # fmt: skip
    for stream, role in ((streams.corrupted_logps, 1), (streams.ablated_logps, 2)):  # else the comparisons say nothing
        assert (stream - streams.logps)[roles == role].abs().max() > 0.05
    return SimpleNamespace(model=model, processor=processor, rows=rows, roles=roles, mask=mask != 0, streams=streams)


class Queue:
    """The three functions of `transfer_queue` that the stages call."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        self.puts: list[tuple[str, list[str]]] = []

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        self.puts.append((partition_id, sorted(fields)))
        for name, column in fields.items():
            for key, x in zip(keys, column.unbind() if isinstance(column, torch.Tensor) else column, strict=True):
                self.cells.setdefault((partition_id, key), {})[name] = x
        return SimpleNamespace(keys=keys, partition_id=partition_id, tags=tags, extra_info={})

    def kv_batch_get(self, keys, partition_id, select_fields):
        rows = [self.cells[partition_id, key] for key in keys]
        columns = {name: [row[name] for row in rows] for name in select_fields}
        return {name: jagged(x) if isinstance(x[0], torch.Tensor) else x for name, x in columns.items()}

    def kv_clear(self, keys, partition_id):
        for key in keys:
            del self.cells[partition_id, key]


class Workers:
    """An actor that scores what lies under the keys it is given, and writes there."""

    def __init__(self, queue: Queue, model: Any) -> None:
        self.queue, self.model, self.calls = queue, model, []

    def compute_log_prob(self, meta: Any) -> Any:
        self.calls.append(meta)
        for key in meta.keys:
            row = self.queue.cells[meta.partition_id, key]
            row["log_probs"] = tiny_verl.next_token_logps(
                self.model, row["input_ids"], row["position_ids"], row["multi_modal_inputs"]
            )
        return meta


def stage(vlm: Any, settings: CreditSettings | None = None, rows: list | None = None) -> Any:
    """Put trajectories with their old log-probs into a queue, and make the stages over it."""
    queue = Queue()
    rows = [dict(row) for row in (vlm.rows if rows is None else rows)]
    for row in rows:
        logps = tiny_verl.next_token_logps(vlm.model, row["input_ids"], row["position_ids"], row["multi_modal_inputs"])
        row["old_log_probs"] = logps[len(row["prompts"]) - 1 : -1]
        row["log_probs"] = logps
    meta = SimpleNamespace(keys=[f"u_{i}_0" for i in range(len(rows))], partition_id="train")
    queue.cells |= {("train", key): row for key, row in zip(meta.keys, rows, strict=True)}
    settings = CreditSettings() if settings is None else settings
    layout = PixelLayout.of_processor(vlm.processor)
    stages = CreditStages(settings, vlm.processor.tokenizer, layout, queue, lambda columns, n: columns)
    workers = Workers(queue, vlm.model)
    return SimpleNamespace(queue=queue, meta=meta, stages=stages, workers=workers)


def scored(made: Any, step: int = 0) -> dict[str, torch.Tensor]:
    batch = made.stages.score(made.meta, made.workers.compute_log_prob, tiny_verl.TEMPERATURE, step)
    names = ["old_log_probs", "role_ids", "corrupted_log_probs", "ablated_log_probs"]
    return {name: padded(x) for name, x in made.queue.kv_batch_get(batch.keys, batch.partition_id, names).items()}


class TestStages:
    def test_streams_are_those_of_score_streams(self, vlm):
        made = stage(vlm)
        found = scored(made)
        assert torch.equal(found["role_ids"], vlm.roles)
        torch.testing.assert_close(found["old_log_probs"], vlm.streams.logps, **EXACT)
        for name, role in (("corrupted", 1), ("ablated", 2)):
            where = vlm.roles == role
            expected = getattr(vlm.streams, f"{name}_logps")
            torch.testing.assert_close(found[f"{name}_log_probs"][where], expected[where], **EXACT)
        assert len(made.workers.calls) == 2
        for meta in made.workers.calls:
            assert meta.extra_info["temperature"] == tiny_verl.TEMPERATURE
            assert not meta.extra_info["compute_loss"]

    def test_the_workers_write_beside_the_batch_and_copies_are_cleared(self, vlm):
        made = stage(vlm)
        before = {key: dict(row) for key, row in made.queue.cells.items()}
        scored(made)
        assert [partition for partition, _ in made.queue.puts] == ["srpo", "srpo", "train"]  # not the batch's
        assert made.queue.cells.keys() == before.keys()
        for key, row in before.items():
            assert all(made.queue.cells[key][name] is x for name, x in row.items())

    def test_weights_are_multiplied_into_the_advantages(self, vlm):
        made = stage(vlm)
        found = scored(made)
        signs = torch.tensor([1.0, -0.5, 2.0, -1.0])
        for key, sign in zip(made.meta.keys, signs, strict=True):
            row = made.queue.cells["train", key]
            row["advantages"] = sign * row["response_mask"]
        _, metrics = made.stages.weigh(made.meta, 0)
        advantages = padded(made.queue.kv_batch_get(made.meta.keys, "train", ["advantages"])["advantages"])
        streams = [found[f"{name}_log_probs"].double() for name in ("old", "corrupted", "ablated")]
        contrast = oracles.contrast(*streams, vlm.roles, vlm.mask, PRESETS["srpo"])
        expected = signs[:, None] * oracles.weights(contrast, vlm.roles, vlm.mask, PRESETS["srpo"])
        torch.testing.assert_close(advantages.double(), expected * vlm.mask, **EXACT)
        assert metrics["srpo/parse_failures"] == metrics["srpo/uniform_fraction"] == 0.25

    def test_nothing_happens_when_no_stream_is_read(self, vlm):
        made = stage(vlm, CreditSettings(credit=PRESETS["grpo"]))
        made.stages.score(made.meta, made.workers.compute_log_prob, 1.0, 0)
        assert made.stages.weigh(made.meta, 0) == (made.meta, {})
        assert (made.workers.calls, made.queue.puts) == ([], [])

    def test_the_strength_falls_until_nothing_is_scored(self, vlm):
        settings = CreditSettings(credit_anneal_steps=10)
        assert [settings.credit_at(step).strength for step in (0, 4, 10, 11)] == [1.0, 0.6, 0.0, 0.0]
        made = stage(vlm, settings)
        made.stages.score(made.meta, made.workers.compute_log_prob, 1.0, 10)
        assert not made.workers.calls

    def test_one_pass_needs_one_forward(self, vlm):
        made = stage(vlm, CreditSettings(credit=PRESETS["srpo_one_pass"]))
        made.stages.score(made.meta, made.workers.compute_log_prob, tiny_verl.TEMPERATURE, 0)
        assert len(made.workers.calls) == 1

    @pytest.mark.parametrize("without", ["pictures", "perception"])
    def test_a_stream_with_nothing_to_change_is_not_scored(self, vlm, without):
        rows = [dict(row) for row in vlm.rows]
        made = stage(vlm, rows=rows if without == "pictures" else rows[2:3])
        if without == "pictures":
            made.stages.layout = None
        found = scored(made)
        assert [meta.keys[0].rsplit("_", 1)[1] for meta in made.workers.calls] == [
            "ablated" if without == "pictures" else "corrupted"
        ]
        name = "corrupted" if without == "pictures" else "ablated"
        valid = made.queue.kv_batch_get(made.meta.keys, "train", ["response_mask"])["response_mask"]
        assert is_no_evidence(found[f"{name}_log_probs"][padded(valid) != 0]).all()

    def test_a_trajectory_is_corrupted_alike_wherever_it_is(self, vlm):
        order = [2, 0, 3, 1]
        whole = scored(stage(vlm), step=3)["corrupted_log_probs"]
        moved = scored(stage(vlm, rows=[vlm.rows[i] for i in order]), step=4)["corrupted_log_probs"]
        alone = [scored(stage(vlm, rows=[row]))["corrupted_log_probs"][0] for row in vlm.rows]
        for i, row in enumerate(vlm.rows):
            seen = vlm.roles[i, : len(row["responses"])] == 1
            for other in (moved[order.index(i)], alone[i]):
                torch.testing.assert_close(other[: len(seen)][seen], whole[i, : len(seen)][seen], **EXACT)

    def test_closed_gaps_are_the_positions_of_a_sequence_without_the_perception(self, vlm):
        made = stage(vlm, CreditSettings(ablated_positions="close"))
        seen = {}
        compute = made.workers.compute_log_prob

        def watched(meta):
            if meta.keys[0].endswith("ablated"):
                seen.update({key: dict(made.queue.cells[PARTITION, key]) for key in meta.keys})
            return compute(meta)

        made.workers.compute_log_prob = watched
        scored(made)
        for key, row in zip(made.meta.keys, vlm.rows, strict=True):
            text = seen[f"{key}_ablated"]["position_ids"][0]
            assert torch.equal(text, torch.arange(len(text)))
            assert len(text) == len(row["input_ids"]) - int((vlm.roles[int(key[2])] == 1).sum())


class TestHiding:
    HIDDEN = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    PROMPTS, LENGTHS = (3, 2, 4), (5, 3, 4)

    def rows(self, name: str) -> list[torch.Tensor]:
        rows = []
        for i, (p, n) in enumerate(zip(self.PROMPTS, self.LENGTHS, strict=True)):
            whole, text = torch.arange(p + n) + 100 * i, torch.arange(p + n)
            made = {"input_ids": whole, "position_ids": torch.stack([text, 7 + 2 * text])}
            rows.append(made.get(name, whole[p:]))
        return rows

    @pytest.mark.parametrize("positions", ["keep", "close"])
    def test_jagged_rows_are_cut(self, positions):
        names = ("input_ids", "position_ids", "responses", "response_mask", "loss_mask")
        got = ablated_fields({name: jagged(self.rows(name)) for name in names}, self.HIDDEN, positions=positions)
        for name in names:
            for i, (row, found) in enumerate(zip(self.rows(name), got[name].unbind(), strict=True)):
                start = self.PROMPTS[i] if name in ("input_ids", "position_ids") else 0
                hidden = [start + t for t in range(self.LENGTHS[i]) if self.HIDDEN[i, t]]
                kept = [c for c in range(row.shape[-1]) if c not in hidden]
                expected = row[..., kept].clone()
                if name == "position_ids" and positions == "close":
                    expected -= torch.tensor([sum(h < c for h in hidden) for c in kept])
                assert torch.equal(found, expected), (name, i)

    @pytest.mark.parametrize("positions", ["keep", "close"])
    @pytest.mark.parametrize("rows", [0, 4])
    def test_padded_rows_lose_their_mask(self, positions, rows):
        S, T = 9, 5
        mask = torch.ones(3, S, dtype=torch.long)
        mask[0, :2] = 0
        ids = torch.arange(S).expand(3, rows, S) if rows else torch.arange(S).expand(3, S)
        got = ablated_fields({"attention_mask": mask, "position_ids": ids}, self.HIDDEN, positions=positions)
        for i in range(3):
            for s in range(S):
                hidden = s >= S - T and bool(self.HIDDEN[i, s - (S - T)])
                assert got["attention_mask"][i, s] == (0 if hidden else mask[i, s])
                before = int(self.HIDDEN[i, : max(s - (S - T), 0)].sum()) if positions == "close" else 0
                if not hidden:
                    assert (got["position_ids"][i, ..., s] == ids[i, ..., s] - before).all()

    @pytest.mark.parametrize("layout", ["packed", "columns"])
    def test_log_probs_find_their_columns_again(self, layout):
        generator = torch.Generator().manual_seed(0)
        for T in (1, 2, 7):
            visible = torch.rand(20, T, generator=generator) < 0.6
            visible[0], visible[1] = True, False
            truth, clean = torch.randn(2, 20, T, generator=generator)
            scored = torch.full((20, T), torch.nan)
            for i in range(20):
                columns = [t for t in range(T) if visible[i, t]]
                for n, t in enumerate(columns):
                    place = n if layout == "packed" else columns[n - 1] + 1 if n else 0
                    scored[i, place] = truth[i, t]
            if layout == "packed":
                scored = scored[:, : max(int(visible.sum(1).max()), 1)]
            got = realigned_log_probs(scored, visible, clean, layout=layout)
            assert torch.equal(got, torch.where(visible, truth, clean))


class TestTokenCredit:
    OLD = torch.tensor([[-0.5, -1, -0.2, -0.7, -1.2, -0.1], [-0.9, -0.4, -0.3, -1.5, 0, 0]])
    CORRUPTED = torch.tensor([[-1.7, -1.1, -0.9, -0.8, -1, -0.1], [-0.8, -2.4, -0.4, -1.4, 0, 0]])
    ABLATED = torch.tensor([[-0.5, -1, -0.2, -1.3, -1.1, -0.4], [-0.9, -0.4, -0.9, -1.2, 0, 0]])
    ROLES = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
    MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    ADVANTAGES = torch.tensor([[1.0], [-0.5]]) * MASK

    def credited(self, **changes: Any) -> Any:
        given = {
            "advantages": self.ADVANTAGES, "response_mask": self.MASK, "old_log_probs": self.OLD,
            "role_ids": self.ROLES, "corrupted_log_probs": self.CORRUPTED, "ablated_log_probs": self.ABLATED,
        }  # fmt: skip
        return token_credit_advantages(**{**given, **changes})

    def test_the_golden_weights(self):
        out = self.credited()
        golden = [
            [1.202181, 0.801454, 1.202181, 1.144708, 0.801454, 0.848021],
            [0.830895, 1.246342, 1.091869, 0.830895],
        ]
        expected = padded([torch.tensor(row) for row in golden])
        torch.testing.assert_close(out.weights, expected, **EXACT)
        torch.testing.assert_close(out.advantages, expected * self.ADVANTAGES, **EXACT)
        assert out.metrics["srpo/weight_max"] == pytest.approx(1.246342, abs=1e-5)
        assert out.metrics["srpo/weight_min"] == pytest.approx(0.801454, abs=1e-5)
        assert out.metrics["srpo/baseline"] == pytest.approx((0.466667 + 0.55) / 2, abs=1e-5)
        assert out.metrics["srpo/parse_failures"] == 0.0

    def test_grpo_returns_the_advantages_themselves(self):
        assert self.credited(credit=PRESETS["grpo"], corrupted_log_probs=None).advantages is self.ADVANTAGES

    @pytest.mark.parametrize("name", ["vppo", "pgpo", "tor"])
    def test_methods_of_the_table(self, name):
        entropy = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
        out = self.credited(credit=METHODS[name], entropy=entropy)
        signals = {"logps": self.OLD, "corrupted_logps": self.CORRUPTED, "entropy": entropy}
        weights = METHODS[name](**signals, completion_mask=self.MASK)
        torch.testing.assert_close(out.advantages, weights * self.ADVANTAGES)

    def test_masked_columns_are_never_read(self):
        def poisoned(x):
            return x.masked_fill(self.MASK == 0, torch.nan)

        poison = {"old_log_probs": self.OLD, "corrupted_log_probs": self.CORRUPTED, "ablated_log_probs": self.ABLATED}
        poison |= {"advantages": self.ADVANTAGES}
        out = self.credited(**{name: poisoned(x) for name, x in poison.items()})
        assert torch.equal(out.advantages, self.credited().advantages)

    def test_a_response_without_a_role_keeps_its_advantage(self):
        roles = self.ROLES.clone()
        roles[1] = 2
        out = self.credited(role_ids=roles)
        assert torch.equal(out.advantages[1], self.ADVANTAGES[1])
        assert out.metrics["srpo/parse_failures"] == 0.5

    def test_a_batch_of_padding_rows(self):
        out = self.credited(response_mask=torch.zeros_like(self.MASK), role_ids=torch.zeros_like(self.ROLES))
        assert torch.equal(out.advantages, torch.zeros_like(self.ADVANTAGES))
        one = torch.tensor([[1], [0]])
        assert self.credited(response_mask=self.MASK * one).metrics["srpo/parse_failures"] == 0.0

    @pytest.mark.parametrize(
        ("changes", "error"),
        [({"advantages": ADVANTAGES[:, :3]}, ShapeError), ({"ablated_log_probs": None}, ConfigError)],
    )
    def test_wrong_arguments(self, changes, error):
        with pytest.raises(error, match="token_credit_advantages"):
            self.credited(**changes)


@dataclasses.dataclass
class DataProto:
    """EasyR1's container, as far as `easyr1_streams` looks at it."""

    batch: dict[str, torch.Tensor]
    non_tensor_batch: dict[str, np.ndarray]
    meta_info: dict[str, Any] = dataclasses.field(default_factory=dict)


class EasyR1Workers:
    """`compute_log_probs` of `fsdp_workers.py` and `dp_actor.py` with padding_free, the cache of pictures included."""

    def __init__(self, vlm: Any) -> None:
        self.vlm, self.cache, self.batches = vlm, {}, []

    def pictures(self, objects: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        if "uid" in self.cache and not np.all(objects["uid"] == self.cache["uid"]):
            self.cache.clear()
        if not self.cache:
            prepare, made = self.vlm.processor.image_processor, {}
            for uid, data in zip(objects["uid"], objects["multi_modal_data"], strict=True):
                if uid not in made:
                    made[uid] = dict(prepare(images=data["images"], return_tensors="pt"))
            self.cache |= {"uid": objects["uid"], "inputs": [made[uid] for uid in objects["uid"]]}
        return self.cache["inputs"]

    def compute_log_probs(self, data: DataProto) -> DataProto:
        self.batches.append(data)
        x, T = data.batch, data.batch["responses"].shape[1]
        out = torch.zeros(x["input_ids"].shape)
        for i, inputs in enumerate(self.pictures(data.non_tensor_batch)):
            kept = x["attention_mask"][i] != 0
            out[i, kept] = tiny_verl.next_token_logps(
                self.vlm.model, x["input_ids"][i, kept], x["position_ids"][i][:, kept], inputs
            )
        return DataProto({"old_log_probs": out[:, -T - 1 : -1]}, {})


def easyr1_batch(vlm: Any, uids: list[str]) -> DataProto:
    T = vlm.roles.shape[1]

    def right(x: torch.Tensor, row: dict) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, T - len(row["responses"])))

    tensors = {name: torch.stack([right(row[name], row) for row in vlm.rows])
               for name in ("input_ids", "position_ids", "responses", "response_mask")}  # fmt: skip
    tensors["attention_mask"] = torch.stack([right(torch.ones_like(row["input_ids"]), row) for row in vlm.rows])
    data = np.empty(len(vlm.rows), dtype=object)
    data[:] = [{"images": row["pictures"]} for row in vlm.rows]
    return DataProto(tensors, {"uid": np.array(uids, dtype=object), "multi_modal_data": data})


def easyr1_scored(vlm: Any, uids: list[str], **settings: Any) -> tuple[DataProto, EasyR1Workers, dict]:
    batch, workers = easyr1_batch(vlm, uids), EasyR1Workers(vlm)
    batch.batch |= workers.compute_log_probs(batch).batch
    found = easyr1_streams(
        batch, workers.compute_log_probs, vlm.processor.tokenizer, CreditSettings(**settings),
        load_image=lambda x: x, processor=vlm.processor, step=0,
    )  # fmt: skip
    return batch, workers, found


class TestEasyR1:
    def without_pictures(self, vlm):
        """Corrupt the raw pictures of each row by its prompt, and process them all."""
        pictures, prompts = [row["pictures"] for row in vlm.rows], [row["prompts"] for row in vlm.rows]
        dark = corrupt_images(pictures, PatchMask(), seed=prompts, processor=vlm.processor)
        flat = [picture for row in dark for picture in row]
        return dict(vlm.processor.image_processor(images=flat, return_tensors="pt"))

    def test_a_trajectory_is_corrupted_alike_wherever_it_is(self, vlm):
        order = [2, 0, 3, 1]
        _, _, whole = easyr1_scored(vlm, ["a", "b", "c", "d"])
        moved = SimpleNamespace(**{**vars(vlm), "rows": [vlm.rows[i] for i in order]})
        _, _, found = easyr1_scored(moved, [f"u{i}" for i in order])
        for k, i in enumerate(order):
            where = vlm.roles[i] == 1
            torch.testing.assert_close(
                found["corrupted_log_probs"][k][where], whole["corrupted_log_probs"][i][where], **EXACT
            )

    def test_streams_are_those_of_score_streams(self, vlm):
        batch, workers, found = easyr1_scored(vlm, ["a", "b", "c", "d"])
        assert torch.equal(found["role_ids"], vlm.roles)
        torch.testing.assert_close(batch.batch["old_log_probs"] * vlm.mask, vlm.streams.logps, **EXACT)
        streams = score_streams(
            vlm.model, **tiny_verl.score_streams_arguments(vlm.rows, vlm.processor.tokenizer),
            logits_to_keep=vlm.roles.shape[1], role_ids=vlm.roles, temperature=tiny_verl.TEMPERATURE,
            corrupted_inputs=self.without_pictures(vlm),
        )  # fmt: skip
        for name, role in (("corrupted", 1), ("ablated", 2)):
            where = vlm.roles == role
            expected = getattr(streams, f"{name}_logps")
            torch.testing.assert_close(found[f"{name}_log_probs"][where], expected[where], **EXACT)
        assert len(workers.batches) == 3
        assert "corrupted_log_probs" not in batch.batch

    def test_rollouts_of_a_prompt_share_one_corruption_under_other_uids(self, vlm):
        batch, workers, _ = easyr1_scored(vlm, ["a", "a", "b", "b"])
        _, corrupted, ablated = (x.non_tensor_batch for x in workers.batches)
        data = corrupted["multi_modal_data"]
        assert data[0] is data[1]
        assert data[2] is data[3]
        assert not set(corrupted["uid"]) & set(batch.non_tensor_batch["uid"])
        assert ablated is batch.non_tensor_batch

    def test_the_result_feeds_the_advantages(self, vlm):
        batch, _, found = easyr1_scored(vlm, ["a", "b", "c", "d"])
        advantages = vlm.mask.float()
        out = token_credit_advantages(advantages, vlm.mask, batch.batch["old_log_probs"], **found)
        assert not torch.equal(out.advantages[0], advantages[0])
        assert torch.equal(out.advantages[2], advantages[2])


class TestSettings:
    def test_every_field_is_read(self):
        section = MappingProxyType(
            {
                "credit": {"preset": "srpo_one_pass", "tau": 0.5},
                "credit_anneal_steps": 7,
                "role_grammar": {"perception_tags": ["see"], "answer_role": "other"},
                "corruption": {"name": "PatchMask", "probability": 0.5},
                "ablated_positions": "close",
            }
        )
        expected = CreditSettings(
            credit=CreditConfig(reasoning_signal="image_independence", tau=0.5),
            credit_anneal_steps=7,
            role_grammar=RoleGrammar(perception_tags=("see",), answer_role=Role.OTHER),
            corruption=PatchMask(0.5),
            ablated_positions="close",
        )
        assert CreditSettings.of(section) == expected

    def test_names_and_nothing(self):
        assert CreditSettings.of(None) == CreditSettings.of({}) == CreditSettings()
        assert CreditSettings.of({"credit": "srpo_wide", "corruption": "Blank"}) == CreditSettings(
            credit=PRESETS["srpo_wide"], corruption=Blank()
        )
        assert CreditSettings.of({"credit": "vppo"}).streams_at(0) == ("corrupted",)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"credits": "srpo"}, "credits"),
            ({"credit": "srpoo"}, "srpo_one_pass"),
            ({"credit": "papo"}, "vppo"),  # adds a term to the loss
            ({"credit": "rlsd"}, "vppo"),  # needs a teacher
            ({"credit": 1}, "vppo"),
            ({"credit": {"preset": "x"}}, "preset"),
            ({"credit": {"tau": 0}}, "tau"),
            ({"credit": {"taus": 1}}, "taus"),
            ({"role_grammar": "see"}, "a mapping"),
            ({"role_grammar": {"tags": ["see"]}}, "tags"),
            ({"role_grammar": {"answer_role": "x"}}, "answer_role"),
            ({"corruption": "Shuffle"}, "PatchMask"),
            ({"corruption": {"probability": 0.5}}, "PatchMask"),
            ({"corruption": {"name": "Blank", "sigma": 1}}, "sigma"),
            ({"corruption": {"name": "PatchMask", "probability": 2}}, "probability"),
            ({"ablated_positions": "mask"}, "keep"),
            ({"credit_anneal_steps": 0}, "credit_anneal_steps"),
        ],
    )
    def test_wrong_settings(self, section, message):
        with pytest.raises(ConfigError, match=message):
            CreditSettings.of(section)

    def test_pictures_that_are_mixed_are_refused(self, vlm):
        with pytest.raises(ConfigError, match="corruption got ShuffleImages"):
            stage(vlm, CreditSettings.of({"corruption": "ShuffleImages"}))

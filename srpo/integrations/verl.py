"""SRPO in verl and its forks: functions on their tensors, and the two stages that a trainer adds.

`srpo.integrations.verl_plugin` puts both stages into verl's own trainer; `easyr1_streams` serves EasyR1. Nothing here
needs verl. Tensors are padded, `[B, T]` with T the columns of the completion, or jagged (nested, a row per trajectory).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from srpo.config import PRESETS, CreditConfig
from srpo.integrations.padded import parsed_roles
from srpo.methods import Method
from srpo.roles import Role
from srpo.rollout import weigh_rollout
from srpo.settings import CreditSettings, check_log_probs_alone
from srpo.streams import no_evidence
from srpo.vision.contexts import corrupted_rows
from srpo.vision.corruption import PixelLayout
from srpo.vision.pictures import corrupt_images

PARTITION = "srpo"  # of the transfer queue: copies in verl's own would look like rollouts to its replay buffer
_SEQUENCE_FIELDS = ("input_ids", "position_ids")
_COMPLETION_FIELDS = ("responses", "response_mask", "loss_mask")
_NAMES = {  # of arguments, by this library's own
    "completion_mask": "response_mask",
    "logps": "old_log_probs",
    "corrupted_logps": "corrupted_log_probs",
    "ablated_logps": "ablated_log_probs",
}
_PICTURES = "multi_modal_inputs"


class VerlStreams(NamedTuple):
    """Log-probs as verl names them, by the names of `srpo.rollout`."""

    logps: Tensor
    corrupted_logps: Tensor | None
    ablated_logps: Tensor | None
    entropy: Tensor | None


class CreditedAdvantages(NamedTuple):
    """What `token_credit_advantages` returns: `advantages` and `weights` `[B, T]`, and `metrics` as floats."""

    advantages: Tensor
    weights: Tensor
    metrics: dict[str, float]


def token_credit_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    old_log_probs: Tensor,
    role_ids: Tensor,
    *,
    corrupted_log_probs: Tensor | None = None,
    ablated_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    credit: CreditConfig | Method = PRESETS["srpo"],
) -> CreditedAdvantages:
    """Multiply the token weights into the advantages: A_it <- A_it * w_it.

    Args:
        advantages: `[B, T]`, as the estimators of verl make them.
        response_mask: `[B, T]` 0/1.
        old_log_probs: `[B, T]` nats, scored by the actor, not by the sampler.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning.
        corrupted_log_probs: `[B, T]` nats, where `credit` reads them.
        ablated_log_probs: `[B, T]` nats, where `credit` reads them.
        entropy: `[B, T]` nats, for `METHODS["tor"]`.
        credit: settings, or a method of `srpo.METHODS`.

    Returns: CreditedAdvantages, the advantages in their own dtype. The metrics are those of `MetricSums` that have a
        value, `srpo/weight_min` and `srpo/weight_max` over the tokens with a role, and `srpo/parse_failures`, the
        share of responses that lack a role. Settings that read no stream return the advantages themselves.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError, NonFiniteError.
    """
    if not credit.streams:
        mask = response_mask.to(advantages.dtype)
        return CreditedAdvantages(advantages, mask, {})
    streams = VerlStreams(old_log_probs, corrupted_log_probs, ablated_log_probs, entropy)
    return CreditedAdvantages(
        *weigh_rollout(
            streams, role_ids, advantages, completion_mask=response_mask, credit=credit,
            function="token_credit_advantages", names=_NAMES,
        )
    )  # fmt: skip


def ablated_fields(
    fields: Mapping[str, Tensor], ablated: Tensor, *, positions: Literal["keep", "close"] = "keep"
) -> dict[str, Tensor]:
    """Hide completion tokens from a batch: through the attention mask when it is padded, by a cut when it is jagged.

    Args:
        fields: padded: `attention_mask` `[B, S]` and `position_ids` `[B, S]` or `[B, rows, S]`; the engines drop tokens
            that the mask leaves out. Jagged: `input_ids` and `position_ids` of whole sequences, `responses`,
            `response_mask` and `loss_mask` of completions.
        ablated: `[B, T]` bool.
        positions: `"keep"` or `"close"`, as in `CreditSettings`.

    Returns: the same fields, changed.
    """
    if "attention_mask" in fields:
        mask, ids = fields["attention_mask"], fields["position_ids"]
        gone = functional.pad(ablated, (mask.shape[1] - ablated.shape[1], 0))
        kept = [_positions(x, row, positions) for x, row in zip(ids, gone, strict=True)]
        return {"attention_mask": mask * ~gone, "position_ids": torch.stack(kept)}
    rows = {name: x.unbind() for name, x in fields.items()}
    cut: dict[str, list[Tensor]] = {name: [] for name in fields}
    for i, ids in enumerate(rows["input_ids"]):
        own = ablated[i, : len(rows["responses"][i])]
        gone = functional.pad(own, (len(ids) - len(own), 0))
        for name, x in rows.items():
            row = _positions(x[i], gone, positions) if name == "position_ids" else x[i]
            cut[name].append(row[..., ~(own if name in _COMPLETION_FIELDS else gone)])
    return {name: jagged(x) for name, x in cut.items()}


def realigned_log_probs(
    scored: Tensor,
    visible: Tensor,
    elsewhere: Tensor,
    *,
    layout: Literal["packed", "columns"] = "packed",
    where: Tensor | bool = True,
) -> Tensor:
    """Put the log-probs of a batch without some tokens back into the columns of the whole completion.

    Args:
        scored: `[B, T']` nats.
        visible: `[B, T]` bool, tokens that are neither ablated nor padding.
        elsewhere: `[B, T]`, the values of other tokens.
        layout: `"packed"`: `scored` has the visible tokens from the left, as verl returns them. `"columns"`: each is in
            the column after its last visible predecessor, as EasyR1 does with `padding_free`.
        where: `[B, 1]` bool, the rows whose scores count.

    Returns: `[B, T]` in the dtype of `elsewhere`.
    """
    if layout == "packed":
        source = visible.long().cumsum(dim=1) - 1
    else:
        after = torch.arange(1, visible.shape[1] + 1, device=visible.device)
        source = functional.pad(torch.where(visible, after, 0).cummax(dim=1).values, (1, -1))
    scored = functional.pad(scored, (0, max(visible.shape[1] - scored.shape[1], 0)))
    return torch.where(visible & where, scored.gather(1, source.clamp(min=0)).to(elsewhere.dtype), elsewhere)


def jagged(rows: Sequence[Tensor]) -> Tensor:
    """Make a nested tensor of rows that differ in their last dimension."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def padded(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Pad the rows of a nested tensor with zeros on the right: `[B, T]`."""
    rows = rows.unbind() if isinstance(rows, Tensor) else rows
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class CreditStages:
    """Score the contrast streams of a batch in verl's transfer queue, and weigh its advantages.

    Args:
        settings: of the credit stage.
        tokenizer: of the policy.
        layout: of its pictures; None: it sees none.
        queue: the `transfer_queue` module, or what has its `kv_batch_get`, `kv_batch_put` and `kv_clear`.
        pack: makes what `kv_batch_put` takes, from columns and the number of rows.
    """

    def __init__(
        self,
        settings: CreditSettings,
        tokenizer: Any,
        layout: PixelLayout | None,
        queue: Any,
        pack: Callable[[dict[str, Any], int], Any],
    ) -> None:
        check_log_probs_alone(settings, "CreditStages")
        self.settings, self.tokenizer, self.layout, self.queue, self.pack = settings, tokenizer, layout, queue, pack

    def score(self, batch: Any, compute_log_prob: Callable[[Any], Any], temperature: float, step: int) -> Any:
        """Put `role_ids`, `corrupted_log_probs` and `ablated_log_probs` beside the fields of a batch.

        Args:
            batch: `KVBatchMeta` of a batch whose `old_log_probs` are in the queue.
            compute_log_prob: of the worker group of the actor.
            temperature: sampling temperature.
            step: optimisation steps done.

        Returns: the `KVBatchMeta` of the batch, as `kv_batch_put` returns it.
        """
        streams = self.settings.streams_at(step)
        if not streams:
            return batch
        data = self._get(batch, [*_SEQUENCE_FIELDS, *_COMPLETION_FIELDS, "old_log_probs", _PICTURES])
        copied = {name: data[name] for name in (*_SEQUENCE_FIELDS, *_COMPLETION_FIELDS)}
        pictures = [getattr(x, "data", x) or {} for x in data[_PICTURES]]
        ids, mask, clean = (padded(data[name]) for name in ("responses", "response_mask", "old_log_probs"))
        roles = parsed_roles(ids, mask, self.tokenizer, self.settings.role_grammar)
        lengths = _lengths(data["responses"])
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        nothing = no_evidence(clean).expand_as(clean)  # to be contrasted with
        results = {"role_ids": roles, **{f"{name}_log_probs": nothing for name in streams}}
        with_picture = torch.tensor(["pixel_values" in x for x in pictures])[:, None]
        if "corrupted" in streams and self.layout is not None and with_picture.any():
            sequences = zip(data["input_ids"].unbind(), lengths.tolist(), strict=True)
            prompts = [row[: len(row) - n] for row, n in sequences]
            bad = corrupted_rows(pictures, prompts, self.settings.corruption, self.layout, "CreditStages.score")
            scored = self._scored(batch, "corrupted", {**copied, _PICTURES: bad}, compute_log_prob, temperature)
            results["corrupted_log_probs"] = realigned_log_probs(scored, inside, nothing, where=with_picture)
        perception = roles == Role.PERCEPTION
        if "ablated" in streams and perception.any():
            cut = ablated_fields(copied, perception, positions=self.settings.ablated_positions)
            scored = self._scored(batch, "ablated", {**cut, _PICTURES: pictures}, compute_log_prob, temperature)
            visible, seen = inside & ~perception, perception.any(dim=1, keepdim=True)
            results["ablated_log_probs"] = realigned_log_probs(scored, visible, nothing, where=seen)
        return self._put(batch, results, lengths)

    def weigh(self, batch: Any, step: int) -> tuple[Any, dict[str, float]]:
        """Multiply the token weights into the advantages of a batch in the queue; return its meta, and metrics."""
        credit, streams = self.settings.credit_at(step), self.settings.streams_at(step)
        if not streams:
            return batch, {}
        names = ["advantages", "response_mask", "old_log_probs", "role_ids", *(f"{name}_log_probs" for name in streams)]
        names += ["entropy"] if "entropy" in getattr(credit, "needs", ()) else []
        data = self._get(batch, names)
        credited = token_credit_advantages(**{name: padded(data[name]) for name in names}, credit=credit)
        lengths = _lengths(data["response_mask"])
        return self._put(batch, {"advantages": credited.advantages}, lengths), credited.metrics

    def _scored(
        self, batch: Any, name: str, columns: dict[str, Any], compute_log_prob: Callable[[Any], Any], temperature: float
    ) -> Tensor:
        """Let the workers score a copy of the batch; it has keys of its own, because they write where they read."""
        place = {"keys": [f"{key}_{name}" for key in batch.keys], "partition_id": PARTITION}
        fields = self.pack(columns, len(batch.keys))
        meta = self.queue.kv_batch_put(**place, fields=fields, tags=[{} for _ in batch.keys])
        meta.extra_info.update(calculate_entropy=False, compute_loss=False, temperature=temperature)
        compute_log_prob(meta)
        log_probs = self.queue.kv_batch_get(**place, select_fields=["log_probs"])["log_probs"].unbind()
        self.queue.kv_clear(**place)
        kept = _lengths(columns["responses"]).tolist()
        # the log-prob of a token lies in the place of the token before it
        return padded([x[len(x) - n - 1 : len(x) - 1] for x, n in zip(log_probs, kept, strict=True)])

    def _get(self, batch: Any, names: list[str]) -> Any:
        return self.queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)

    def _put(self, batch: Any, columns: dict[str, Tensor], lengths: Tensor) -> Any:
        ends = lengths.tolist()
        rows = {name: jagged([row[:end] for row, end in zip(x, ends, strict=True)]) for name, x in columns.items()}
        fields = self.pack(rows, len(ends))
        return self.queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def easyr1_streams(
    batch: Any,
    compute_log_probs: Callable[[Any], Any],
    tokenizer: Any,
    settings: CreditSettings,
    *,
    load_image: Callable[[Any], Any],
    processor: Any,
    step: int,
) -> dict[str, Tensor]:
    """Score the contrast streams of a batch of EasyR1, with `worker.actor.padding_free`.

    Args:
        batch: `DataProto` with `old_log_probs`.
        compute_log_probs: of the worker group of the actor.
        tokenizer: of the policy.
        settings: of the credit stage.
        load_image: turns an entry of `multi_modal_data["images"]` into the picture that the workers would make of it.
        processor: of the policy, which `corrupt_images` asks for the number of image tokens.
        step: optimisation steps done.

    Returns: `role_ids` and the log-probs of the streams, `[B, T]`, by the names of `token_credit_advantages`.
    """
    check_log_probs_alone(settings, "easyr1_streams")
    tensors, objects, clean = batch.batch, batch.non_tensor_batch, batch.batch["old_log_probs"]
    mask = tensors["response_mask"]
    roles = parsed_roles(tensors["responses"], mask, tokenizer, settings.role_grammar).to(mask.device)
    streams = settings.streams_at(step)
    nothing = no_evidence(clean).expand_as(clean)  # to be contrasted with
    results = {"role_ids": roles, **{f"{name}_log_probs": nothing for name in streams}}
    if "corrupted" in streams and "multi_modal_data" in objects:
        bad: dict[Any, Any] = {}  # by uid: the workers prepare the pictures of a prompt once
        T = mask.shape[1]
        ids, valid = (tensors[name][:, :-T] for name in ("input_ids", "attention_mask"))
        for i, (uid, data) in enumerate(zip(objects["uid"], objects["multi_modal_data"], strict=True)):
            if uid not in bad:
                pictures, prompt = [load_image(x) for x in data.get("images", ())], ids[i, valid[i] != 0]
                (dark,) = corrupt_images([pictures], settings.corruption, seed=[prompt], processor=processor)
                bad[uid] = {**data, "images": dark} if pictures else data
        column = np.empty(len(clean), dtype=object)
        column[:] = [bad[uid] for uid in objects["uid"]]
        # other uids: under the same ones the workers take the clean pictures from their cache
        uids = np.array([f"{uid}_corrupted" for uid in objects["uid"]], dtype=object)
        copy = replace(batch, non_tensor_batch={**objects, "multi_modal_data": column, "uid": uids})
        with_picture = torch.tensor([bool(x.get("images")) for x in objects["multi_modal_data"]], device=mask.device)
        scored = compute_log_probs(copy).batch["old_log_probs"]
        results["corrupted_log_probs"] = torch.where(with_picture[:, None], scored, nothing)
    perception = (roles == Role.PERCEPTION) & (mask != 0)
    if "ablated" in streams and perception.any():
        own = {name: tensors[name] for name in ("attention_mask", "position_ids")}
        copy = tensors.copy()
        copy.update(ablated_fields(own, perception, positions=settings.ablated_positions))
        scored = compute_log_probs(replace(batch, batch=copy)).batch["old_log_probs"]
        visible = (tensors["attention_mask"][:, -perception.shape[1] :] != 0) & ~perception
        seen = perception.any(dim=1, keepdim=True)
        results["ablated_log_probs"] = realigned_log_probs(scored, visible, nothing, layout="columns", where=seen)
    return results


def _positions(ids: Tensor, gone: Tensor, positions: str) -> Tensor:
    """Return the positions `[S]` or `[rows, S]` of a row whose tokens `gone` `[S]` are ablated."""
    return ids if positions == "keep" else ids - gone.cumsum(dim=-1)


def _lengths(rows: Tensor) -> Tensor:
    return torch.tensor([len(x) for x in rows.unbind()])

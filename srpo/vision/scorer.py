"""One pass over sequences: the streams of a batch, and the road on which prompts are computed once."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.errors import ConfigError, ShapeError
from srpo.methods.table import Method
from srpo.roles import Role
from srpo.streams import STREAMS, no_evidence, not_scored
from srpo.vision.ablation import hide, swap
from srpo.vision.access import (
    counted_positions,
    head_of,
    head_states,
    is_sharded,
    own_logits,
    positions_given,
    takes_positions,
    vision_features,
)
from srpo.vision.inputs import ModelInputs, row_cuts
from srpo.vision.prefix import PROOFS, Groups, agree, groups_of, with_positions
from srpo.vision.rows import Rows
from srpo.vision.shared import Contrast, SharedRoad, first_alike, shared_groups


class Scorer:
    """The model, and what the first forward tells about its head."""

    def __init__(
        self, model: Any, temperature: float, ablation: str, streams: tuple[str, ...], reader: CreditConfig | Method
    ) -> None:
        self.model, self.temperature, self.ablation = model, temperature, ablation
        self.wanted, self.reader = streams, reader
        self.reads_kl = reader.reads_kl
        self.in_step = is_sharded(model)
        self.head_is_bare = False if self.in_step else None  # None: not known yet

    def streams(
        self, inputs: ModelInputs, corrupted: ModelInputs | None, roles: Tensor, other: tuple[Tensor, Tensor] | None
    ) -> list[Tensor | None]:
        """Score the streams of some sequences, in the order of `StreamLogps`."""
        B, T = roles.shape
        start = inputs.input_ids.shape[1] - T
        ids, valid = inputs.input_ids[:, start:], inputs.attention_mask[:, start:] != 0
        before = torch.arange(start - 1, start + T - 1, device=ids.device).expand(B, T)
        seen = valid & (roles == Role.PERCEPTION)
        visual, reasoned = (self.reader.rows(name, roles, valid) for name in STREAMS)
        reasons = reasoned & seen.any(dim=1, keepdim=True)
        shares = "ablated" in self.wanted and inputs.has_pixels() and bool(reasons.any())
        if shares:
            inputs = inputs.with_features(vision_features(self.model, inputs.multimodal))
        with positions_given(self.model, *inputs.input_ids.shape) as positions:
            clean = self.rows(inputs, before)
        logps, entropy = clean.score(ids, valid, self.temperature)
        clean = clean if self.reads_kl else None
        results = Results(logps, entropy, self.reads_kl)
        if "corrupted" in self.wanted:
            found, scored = self._without_image(inputs, corrupted, visual, before, ids, clean)
            results.put(0, visual, found, scored)
        if "ablated" in self.wanted:
            scored = None
            if reasons.any() or (self.in_step and other is None):  # finding positions may take a forward
                context, source = self._ablated(inputs, seen, other, positions)
                scored = self._contrast(context, source, ids, reasons, clean)
            else:
                self._keep_in_step(inputs)
            results.put(1, reasoned, reasons, scored)
        return results.columns()

    def shared(
        self,
        whole: ModelInputs,
        corrupted: ModelInputs | None,
        roles: Tensor,
        other: tuple[Tensor, Tensor] | None,
        batch_size: int,
        cache_bytes: int,
    ) -> list[Tensor | None] | None:
        """Score the streams of all sequences with their prompts computed once; None where they cannot be."""
        proven, T = PROOFS.known(self.model), roles.shape[1]
        if self.in_step or proven is False:
            return None
        try:
            cuts = row_cuts(checks.Call("score_streams", whole.input_ids, "input_ids"), whole)
        except ShapeError:
            return None  # nothing tells what belongs to a sequence
        groups = shared_groups(whole, T, cuts)
        if groups is None:
            return None
        try:
            found = self._on_shared_road(whole, corrupted, roles, other, cuts, groups, batch_size, cache_bytes)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            if proven or isinstance(error, torch.OutOfMemoryError):
                raise
            PROOFS.keep(self.model, False, repr(error))
            return None
        if found is None:
            PROOFS.keep(self.model, False, "positions, head or cache")
        elif proven is None and not self._proves(whole, found[0], cuts):
            return None
        return found

    def _proves(self, whole: ModelInputs, logps: Tensor | None, cuts: Any) -> bool:
        """Compare the first sequence with a plain forward, and remember."""
        assert logps is not None
        T = logps.shape[1]
        i = int((whole.attention_mask[:, -T:] != 0).sum(dim=1).argmax())
        row, start = whole.rows(slice(i, i + 1), cuts), whole.input_ids.shape[1] - T
        valid = row.attention_mask[:, start:] != 0
        before = torch.arange(start - 1, start + T - 1, device=valid.device)[None]
        own = self.rows(row, before).logps(row.input_ids[:, start:], valid, self.temperature)
        dtype = head_of(self.model).weight.dtype
        return PROOFS.keep(self.model, agree(own, logps[i : i + 1], valid, dtype), "compared with a plain forward")

    def _on_shared_road(
        self,
        whole: ModelInputs,
        corrupted: ModelInputs | None,
        roles: Tensor,
        other: tuple[Tensor, Tensor] | None,
        cuts: Any,
        groups: Groups,
        batch_size: int,
        cache_bytes: int,
    ) -> list[Tensor | None] | None:
        placed, T = with_positions(self.model, whole), roles.shape[1]
        if placed is None or placed.position_ids is None:
            return None
        road = SharedRoad(self.model, placed, T, self.temperature, batch_size, cache_bytes)
        groups = groups.at_equal_positions(placed, road.P)
        valid, ids = placed.attention_mask[:, -T:] != 0, placed.input_ids[:, -T:]
        seen = valid & (roles == Role.PERCEPTION)
        visual, reasoned = (self.reader.rows(name, roles, valid) for name in STREAMS)
        dark, dark_groups = None, groups
        if "corrupted" in self.wanted and corrupted is not None:
            dark = replace(corrupted, position_ids=placed.position_ids)
            dark_groups = groups_of(dark, road.P, cuts).at_equal_positions(dark, road.P)
        # equal rollouts are scored once
        where = (placed.position_ids[..., -T:] * valid).movedim(-2, 0)
        once = first_alike(groups.of_row, dark_groups.of_row, ids * valid, valid, roles * valid, where, *(other or ()))
        is_first = (once == torch.arange(len(once), device=once.device))[:, None]
        prefix = road.prefix(placed, cuts, groups)
        if prefix is None:
            return None
        clean = road.score(prefix, road.as_it_is(placed, valid & is_first), is_clean=True, keeps=self.reads_kl)
        results = Results(clean.logps[once], clean.entropy[once], self.reads_kl)
        if "ablated" in self.wanted:
            reasons = reasoned & seen.any(dim=1, keepdim=True)
            what = road.without(seen, reasons & is_first)
            if other is not None:
                what = road.with_other(seen, reasons & is_first, other)
            if what is None:
                return None
            results.put(1, reasoned, reasons, road.score(prefix, what, against=clean.states).contrast(once))
        del prefix
        if "corrupted" in self.wanted:
            found = torch.zeros_like(visual) if dark is None else visual & dark.with_picture()[:, None]
            scored = None
            if dark is not None and found.any():
                prefix = road.prefix(dark, cuts, dark_groups)
                if prefix is None:
                    return None
                what = road.as_it_is(dark, found & is_first)
                scored = road.score(prefix, what, against=clean.states).contrast(once)
            results.put(0, visual, found, scored)
        return results.columns()

    def _without_image(
        self,
        inputs: ModelInputs,
        corrupted: ModelInputs | None,
        rows: Tensor,
        before: Tensor,
        ids: Tensor,
        clean: Rows | None,
    ) -> tuple[Tensor, Contrast | None]:
        """Score some tokens with the image corrupted; return which of them have one, and what was scored of those."""
        start = inputs.input_ids.shape[1] - rows.shape[1]
        rows = torch.zeros_like(rows) if corrupted is None else rows & corrupted.with_picture()[:, None]
        if corrupted is None or not rows.any():
            self._keep_in_step(inputs)
            return rows, None
        end = self._last_needed(corrupted, rows, start)
        short = corrupted.columns(slice(0, start + end - 1))
        clean = None if clean is None else replace(clean, values=clean.values[:, :end])
        scored = self._contrast(short, before[:, :end], ids[:, :end], rows[:, :end], clean)
        behind = (0, rows.shape[1] - end)
        return rows, Contrast(*(None if x is None else torch.nn.functional.pad(x, behind) for x in scored))

    def _keep_in_step(self, inputs: ModelInputs) -> None:
        """Run a forward that this rank has no use for: others gather parameters in theirs, and would wait for ever."""
        if self.in_step:
            own_logits(self.model, inputs.kwargs(), 1)

    def _ablated(
        self, inputs: ModelInputs, seen: Tensor, other: tuple[Tensor, Tensor] | None, positions: list[Tensor]
    ) -> tuple[ModelInputs, Tensor]:
        if other is not None:
            return swap(inputs, seen, *other)
        if inputs.position_ids is None and takes_positions(self.model):
            found = positions[0] if positions else self._counted(inputs)
            inputs = replace(inputs, position_ids=found)
        return hide(inputs, seen, cut=self.ablation == "delete")

    def _counted(self, inputs: ModelInputs) -> Tensor:
        found = counted_positions(self.model, inputs.input_ids, inputs.attention_mask)
        if found is None:
            call = checks.Call("score_streams", inputs.input_ids, "input_ids")
            fix = "pass position_ids of prompt and completion, or streams=('clean', 'corrupted')"
            got, expected = f"{type(self.model).__name__}, whose positions do not show", "positions to keep"
            call.fail(ConfigError, "model", got, expected, fix)
        return found

    def _contrast(self, inputs: ModelInputs, source: Tensor, ids: Tensor, mask: Tensor, clean: Rows | None) -> Contrast:
        """Score `ids` in the context of a contrast: log-probs, and divergences from the `clean` rows if there are."""
        rows = self.rows(inputs, source)
        if clean is None:
            return Contrast(rows.logps(ids, mask, self.temperature), None)
        kl, logps = rows.against(clean, ids, mask, self.temperature)
        return Contrast(logps, kl)

    def rows(self, inputs: ModelInputs, source: Tensor) -> Rows:
        """Run the model, and return what it has at columns `source` `[B, T]`."""
        S = inputs.input_ids.shape[1]
        keep = S - int(source.min()) if source.numel() else 1
        index = (source - (S - keep))[..., None]
        if self.head_is_bare is not False:
            states, self.head_is_bare, _ = head_states(self.model, inputs.kwargs(), keep)
            if self.head_is_bare:
                return Rows(self.model, _at(states, index), True)
        return Rows(self.model, _at(own_logits(self.model, inputs.kwargs(), keep), index), False)

    @staticmethod
    def _last_needed(inputs: ModelInputs, seen: Tensor, start: int) -> int:
        """Return how many completion tokens the corrupted forward needs: images in the rest would lack their place."""
        end = int(seen.any(dim=0).nonzero()[-1]) + 1
        return seen.shape[1] if inputs.picture_tokens()[:, start + end - 1 :].any() else end


class Results:
    """What is scored of some sequences, and what is said of the cells that are not."""

    def __init__(self, logps: Tensor, entropy: Tensor, reads_kl: bool) -> None:
        self.logps, self.entropy, self.reads_kl = logps, entropy, reads_kl
        self.contrasts = [Contrast(None, None)] * len(STREAMS)

    def put(self, stream: int, wanted: Tensor, found: Tensor, scored: Contrast | None) -> None:
        """Take what was scored of a stream where it was `found`; nothing was where it is None."""
        nothing = torch.zeros_like(self.logps)
        logps, kl = scored or Contrast(nothing, nothing if self.reads_kl else None)
        cells = (None if x is None else _cells(self.logps, wanted, found, x) for x in (logps, kl))
        self.contrasts[stream] = Contrast(*cells)

    def columns(self) -> list[Tensor | None]:
        """Return the fields of `StreamLogps`, or of `StreamDivergences`."""
        logps, divergences = zip(*self.contrasts, strict=True)
        return [self.logps, *logps, self.entropy, *(divergences if self.reads_kl else ())]


def _cells(like: Tensor, wanted: Tensor, found: Tensor, scored: Tensor) -> Tensor:
    """Return what was scored where it was `found`; elsewhere say whether it was wanted at all."""
    return torch.where(found, scored.to(like), torch.where(wanted, no_evidence(like), not_scored(like)))


def _at(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.expand(-1, -1, rows.shape[-1]))

"""The rows that predict some tokens in one context: what the head is called on, or what it returned."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from srpo.loss import Divergence, SelectedLogps, selected_logps, vocabulary_kl
from srpo.vision.access import head_divergence, head_logps


@dataclass(frozen=True)
class Rows:
    """Rows `[B, T, ...]` that predict tokens `[B, T]`.

    Args:
        model: whose head they belong to.
        values: hidden states `[B, T, H]`, or the model's own logits `[B, T, V]`.
        bare: whether they are hidden states of a head that alone makes the logits.
    """

    model: Any
    values: Tensor
    bare: bool

    def score(self, ids: Tensor, mask: Tensor, temperature: float) -> SelectedLogps:
        """Return log-probs and entropies of `ids`, 0 where the mask is."""
        return self._selected(ids, temperature=temperature, mask=mask, return_entropy=True)

    def logps(self, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """Return the log-probs alone, for less."""
        return self._selected(ids, temperature=temperature, mask=mask)

    def _selected(self, ids: Tensor, **options: Any) -> Any:
        if self.bare:
            return head_logps(self.model, self.values, ids, **options)
        return selected_logps(self.values, ids, **options)

    def against(self, clean: "Rows", ids: Tensor, mask: Tensor, temperature: float) -> Divergence:
        """Return the divergence of these rows from the clean ones, and their log-probs."""
        assert self.bare == clean.bare
        if self.bare:
            return head_divergence(self.model, clean.values, self.values, ids, temperature=temperature, mask=mask)
        return vocabulary_kl(clean.values, self.values, ids, temperature=temperature, mask=mask)

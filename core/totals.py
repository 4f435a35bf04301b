"""What was put into batches, counted as each is formed."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.histogram import Histogram

#: Sequences of a batch, as its histogram tells them apart.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: What a batch still weighs after each further one in what is told of late: the last fifty or so count.
_DECAY = 0.98


@dataclass(slots=True)
class Totals:
    """Of all batches so far."""

    num_batches: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    #: The same with padding: what the device computed.
    num_padded_tokens: int = 0
    #: What the batches might have had.
    num_budget_tokens: int = 0

    def add(self, num_sequences: int, num_tokens: int, num_padded_tokens: int, budget: int) -> None:
        """Count one batch."""
        self.num_batches += 1
        self.num_sequences += num_sequences
        self.num_tokens += num_tokens
        self.num_padded_tokens += num_padded_tokens
        self.num_budget_tokens += budget

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0

    @property
    def fill(self) -> float:
        """Share of the budgets that was used; sequences longer than the budget count in full."""
        return self.num_padded_tokens / self.num_budget_tokens if self.num_budget_tokens else 0.0


@dataclass(slots=True)
class ModelTotals(Totals):
    """Of one model's batches: also of the last ones, and how large they were."""

    #: Sequences of each batch.
    sizes: Histogram = field(default_factory=lambda: Histogram(SIZES))
    _tokens: float = 0.0
    _padded_tokens: float = 0.0
    _budget_tokens: float = 0.0

    def add(self, num_sequences: int, num_tokens: int, num_padded_tokens: int, budget: int) -> None:
        """Count one batch."""
        Totals.add(self, num_sequences, num_tokens, num_padded_tokens, budget)
        self.sizes.add(num_sequences)
        self._tokens = _DECAY * self._tokens + num_tokens
        self._padded_tokens = _DECAY * self._padded_tokens + num_padded_tokens
        self._budget_tokens = _DECAY * self._budget_tokens + budget

    @property
    def late_padding_share(self) -> float:
        """`padding_share` of the last batches."""
        return 1 - self._tokens / self._padded_tokens if self._padded_tokens else 0.0

    @property
    def late_fill(self) -> float:
        """`fill` of the last batches."""
        return self._padded_tokens / self._budget_tokens if self._budget_tokens else 0.0

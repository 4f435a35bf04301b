"""stand-in"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.sequence import Sequence


@dataclass
class Limits:
    max_batch_tokens: int
    max_batch_sequences: int
    is_padded: bool = True
    overhead_tokens: int = 64


@dataclass
class Counters:
    batches: int = 0


class Scheduler:
    def __init__(self, limits: Mapping[str, Limits], max_batch_s: float, max_bulk_wait_s: float) -> None:
        self.limits = dict(limits)
        self.counters = Counters()
        self._w: dict[Sequence, None] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._w)

    def num_tokens(self, is_bulk: bool) -> int:
        return sum(s.length for s in self._w if s.is_bulk == is_bulk)

    def add(self, s: Sequence) -> None:
        self._w[s] = None

    def remove(self, s: Sequence) -> None:
        self._w.pop(s, None)

    def promote(self, s: Sequence) -> None:
        s.is_bulk = False

    def finished(self, model: str, n: int, sec: float) -> None:
        pass

    def lower_budget(self, model: str, n: int) -> None:
        self.limits[model].max_batch_tokens = min(n, self.limits[model].max_batch_tokens)

    def budget(self, model: str, is_bulk: bool) -> int:
        return self.limits[model].max_batch_tokens

    def next_batch(self, now_s: float) -> list[Sequence]:
        if not self._w:
            return []
        order = sorted(self._w, key=lambda s: (s.is_bulk, s.arrived_s))
        first = order[0]
        out: list[Sequence] = []
        longest = 0
        for s in sorted(
            (s for s in order if s.key == first.key and s.is_bulk == first.is_bulk), key=lambda s: s is not first
        ):
            l = max(longest, s.length)
            lim = self.limits[first.model]
            if out and (l * (len(out) + 1) > lim.max_batch_tokens or len(out) >= lim.max_batch_sequences):
                break
            out.append(s)
            longest = l
        for s in out:
            del self._w[s]
        return out

"""Lays the tokens of a batch out in memory: in one line (`TokenLayout`), or padded (`pad`).

In one line, one sequence behind the other, nothing is padded: products with weights, most of an encoder's work, compute
real tokens only. A row is a token's place in that line. Attention and pooling look up here where sequences begin and
end.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from embedq.core.models.transfer import to_device
from embedq.core.sequence import Sequence


class TokenLayout:
    """The places of `batch`'s sequences in one line of tokens."""

    def __init__(self, batch: list[Sequence], device: str) -> None:
        self.batch = batch
        self.device = device
        #: (num_sequences,) number of tokens of each, and its first row.
        self.lengths = np.array([sequence.length for sequence in batch])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_tokens = int(self.lengths.sum())

    @cached_property
    def ids(self) -> np.ndarray:
        """(num_tokens,) int64 token ids."""
        return np.concatenate([sequence.tokens.ids for sequence in self.batch], dtype=np.int64)

    @cached_property
    def types(self) -> np.ndarray:
        """(num_tokens,) int64 segment of each token; 0 for sequences without segments."""
        given = ((sequence.tokens.type_ids, sequence.length) for sequence in self.batch)
        each = [np.zeros(length, np.int32) if types is None else types for types, length in given]
        return np.concatenate(each, dtype=np.int64)

    @cached_property
    def places(self) -> np.ndarray:
        """(num_tokens,) int64 place of each token in its sequence, from 0."""
        places: np.ndarray = np.arange(self.num_tokens) - np.repeat(self.starts, self.lengths)
        return places

    @cached_property
    def offsets(self) -> torch.Tensor:
        """(num_sequences + 1,) int32 on the device: sequence i has the rows offsets[i] to offsets[i + 1]."""
        (offsets,) = self.on_device(np.append(self.starts, self.num_tokens).astype(np.int32))
        return offsets

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """Of `rows` (num_tokens, dim) each sequence's first: (num_sequences, dim)."""
        return rows.index_select(0, self.offsets[:-1])

    def last(self, rows: torch.Tensor) -> torch.Tensor:
        """Of `rows` (num_tokens, dim) each sequence's last: (num_sequences, dim)."""
        return rows.index_select(0, self.offsets[1:] - 1)

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Of `rows` (num_tokens, dim) each sequence's mean, in float32: (num_sequences, dim)."""
        lengths = self.offsets.diff()
        if reduces_segments(self.device):
            return mean_of_each(rows, lengths)
        (owners,) = self.on_device(np.repeat(np.arange(len(self.lengths)), self.lengths))
        sums = torch.zeros(len(self.lengths), rows.shape[1], device=rows.device)
        return sums.index_add_(0, owners, rows.float()) / lengths.unsqueeze(1)

    def without_padding(self, padded: torch.Tensor) -> torch.Tensor:
        """Remove the padding behind each sequence: (num_sequences, longest, dim) to (num_tokens, dim)."""
        longest = padded.shape[1]
        rows = padded.reshape(-1, padded.shape[-1])
        if self.num_tokens == len(rows):
            return rows
        places = np.repeat(np.arange(len(self.lengths)) * longest, self.lengths) + self.places
        return rows.index_select(0, *self.on_device(places))

    def split(self, rows: np.ndarray, num_left_out: int = 0) -> list[np.ndarray]:
        """Split host rows (num_tokens, ...) by sequence, leaving out the first `num_left_out` of each."""
        return [
            rows[start + num_left_out : start + length]
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        ]

    def on_device(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Copy host arrays (n,) of one dtype to the batch's device. One copy for all: each copy costs the host time."""
        if self.device == "cpu":  # no copy, and no operation that releases the interpreter's lock
            return tuple(torch.from_numpy(array) for array in arrays)
        whole = to_device(torch.from_numpy(np.concatenate(arrays)), self.device)
        return torch.split(whole, [len(array) for array in arrays])


def reduces_segments(device: str) -> bool:
    """Returns True if torch's `segment_reduce` runs on `device`."""
    return device == "cpu" or device.startswith("cuda")


def mean_of_each(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of `rows` (num_tokens, dim) the mean of each sequence of `lengths` (num_sequences,), in float32.

    Sequence by sequence: a product with a matrix of shares would spread one text's NaN to all others. `unsafe` skips
    the check of the lengths, for which the host would wait for all queued work of the device.
    """
    return torch.segment_reduce(rows.float(), "mean", lengths=lengths, axis=0, unsafe=True)


def pad(batch: list[Sequence], pad_token_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad on the right: (ids (num_sequences, longest) int64, mask of that shape, or None if nothing is padded)."""
    longest = max(sequence.length for sequence in batch)
    ids = torch.full((len(batch), longest), pad_token_id, dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : sequence.length] = torch.from_numpy(sequence.tokens.ids)
    if all(sequence.length == longest for sequence in batch):
        return to_device(ids, device), None
    lengths = torch.tensor([sequence.length for sequence in batch])
    mask = (torch.arange(longest) < lengths[:, None]).to(torch.int64)  # (num_sequences, longest)
    return to_device(ids, device), to_device(mask, device)


def padded_inputs(layout: TokenLayout, pad_token_id: int, has_types: bool = False) -> dict[str, torch.Tensor | None]:
    """The batch padded on the right, under the names of transformers' arguments; segments only with `has_types`."""
    ids, mask = pad(layout.batch, pad_token_id, layout.device)
    types = {"token_type_ids": _pad_types(layout.batch, layout.device)} if has_types else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def _pad_types(batch: list[Sequence], device: str) -> torch.Tensor:
    """Pad segment ids on the right: (num_sequences, longest) int64; padding is segment 0."""
    longest = max(sequence.length for sequence in batch)
    types = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, sequence in enumerate(batch):
        if sequence.tokens.type_ids is not None:
            types[row, : sequence.length] = torch.from_numpy(sequence.tokens.type_ids)
    return to_device(types, device)

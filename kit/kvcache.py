"""A key-value cache with room for the whole reply: it copies nothing to append a token (on a GPU Unsloth's attention still copies what it is given),
and rows that have ended leave. Imports transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows, heads, room, head size], of which the first `used` positions are taken."""

    def __init__(self, like: Any, rows: int, room: int, used: int) -> None:
        super().__init__()
        self.used, self.is_initialized = used, True
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.room = [t.new_zeros(rows, t.shape[1], room, t.shape[3]) for t in (like.keys, like.values)]

    def put(self, layer: Any, row: int) -> None:
        """Another layer's rows from `row` on, their last positions where this one's last are."""
        for room, made in zip(self.room, (layer.keys, layer.values), strict=True):
            room[row : row + made.shape[0], :, self.used - made.shape[2] : self.used] = made

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        end = self.used + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.used : end] = states
        self.used = end
        return self.room[0][:, :, :end], self.room[1][:, :, :end]

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Any) -> None:
        self.room = [room[indices] for room in self.room]


class RoomyCache(Cache):  # type: ignore[misc]
    """Filled by `put` from left-padded prompts that were read a few at a time."""

    layers: list[Any]

    def __init__(self, rows: int, longest: int, replies: int) -> None:
        super().__init__(layers=[])
        self.rows, self.longest, self.replies = rows, longest, replies

    def put(self, read: DynamicCache, row: int) -> None:
        """The keys and values of prompts that take the rows from `row` on."""
        if not self.layers:
            self.layers = [RoomyLayer(layer, self.rows, self.longest + self.replies, self.longest) for layer in read.layers]
        for mine, layer in zip(self.layers, read.layers, strict=True):
            mine.put(layer, row)

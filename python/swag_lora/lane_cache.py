"""A key-value cache that grows in place: appending a token to many lanes copies that token, not the whole cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 16


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` of transformers with room for tokens to come; ``keys`` and ``values`` are views ``[..., length, D]``.

    The room is made anew each time the cache has grown by a quarter, or by 16 tokens if that is more, so that n tokens
    cost O(n) copies and not O(n^2).
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end or not self._is_in_room(keys, values):
            self._room = (self._larger(keys, key_states, end), self._larger(values, value_states, end))
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def _is_in_room(self, *cached: Tensor) -> bool:
        """Whether the cache is still what was written here, and not cut, moved or reordered since."""
        assert self._room is not None
        return all(
            held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0]
            for held, room in zip(cached, self._room, strict=True)
        )

    @staticmethod
    def _larger(held: Tensor, states: Tensor, length: int) -> Tensor:
        room = states.new_empty(*states.shape[:-2], length + max(_LEAST_ROOM, length // 4), states.shape[-1])
        if held.numel():
            room[..., : held.shape[-2], :] = held
        return room


def grow_in_place(cache: Any) -> None:
    """Make the layers of an empty dynamic cache `GrowingLayer`; other kinds of layers stay."""
    if not isinstance(cache, Cache) or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()

"""Memory that keeps its address: buffers that are lent out and come back when nobody looks at them.

A CUDA graph reads and writes the addresses that it was captured with. So what a group leaves for later waves
lies in a buffer of a pool, and which one depends on nothing but which are free: two calls that do the same
use the same addresses in the same order.

A *loan* is a tensor over a buffer with a storage of its own. The buffer is free again when that storage is
gone, that is, when no view of the loan is left anywhere. A loan may have *spare* rows in front of those that
were asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

__all__ = ["Buffers"]


class _Buffer:
    """One piece of memory and what shows whether it is lent."""

    __slots__ = ("_loan", "memory", "spare")

    def __init__(self, memory: torch.Tensor, spare: int) -> None:
        self.memory, self.spare = memory, spare
        self._loan: weakref.ref | None = None

    @property
    def is_free(self) -> bool:
        return self._loan is None or self._loan() is None

    def lend(self) -> torch.Tensor:
        loan = from_dlpack(to_dlpack(self.memory))
        self._loan = weakref.ref(loan.untyped_storage())
        return loan


class Buffers:
    """A pool of buffers, by whatever tells one sort from another.

    Attributes
    ----------
    bytes
        What all buffers take together.
    """

    def __init__(self) -> None:
        self._sorts: dict[tuple, list[_Buffer]] = {}
        self._at: dict[int, _Buffer] = {}  # by address
        self.bytes = 0

    def lend(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 0,
        spare: int = 0,
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor; its memory is the borrower's for as long as it is looked at.

        Parameters
        ----------
        shape, dtype, device
            Of the tensor.
        rows
            The buffer has at least so many rows: waves of a ramp then use the memory of those of the steady
            state.
        spare
            The tensor has so many rows more than ``shape`` says, which come first.
        """
        count = spare + shape[0]
        whole = (max(spare + rows, count), *shape[1:])
        sort = self._sorts.setdefault((whole, spare, dtype, device), [])
        for buffer in sort:
            if buffer.is_free:
                return buffer.lend().narrow(0, 0, count)
        with torch.inference_mode(False):
            buffer = _Buffer(torch.empty(whole, dtype=dtype, device=device), spare)
        sort.append(buffer)
        self._at[buffer.memory.data_ptr()] = buffer
        self.bytes += buffer.memory.numel() * buffer.memory.element_size()
        return buffer.lend().narrow(0, 0, count)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in one of the buffers."""
        return tensor.untyped_storage().data_ptr() in self._at

    def at(self, address: int) -> torch.Tensor:
        """The buffer at an address: its memory, which is not lent by this."""
        return self._at[address].memory

    def spare(self, address: int) -> range:
        """The spare rows of the buffer at an address."""
        return range(self._at[address].spare)

    def settled(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same place by its buffer, which this does not lend; a tensor outside of buffers as it is."""
        buffer = self._at.get(tensor.untyped_storage().data_ptr())
        if buffer is None:
            return tensor
        return buffer.memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @property
    def are_free(self) -> bool:
        """Whether nothing is lent."""
        return all(buffer.is_free for sort in self._sorts.values() for buffer in sort)

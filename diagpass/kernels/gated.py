"""Gated products, ``activation(x @ first.T) * (x @ second.T)``, in one kernel: SwiGLU and its relatives.

Between the products of a gated MLP (Shazeer 2020, arXiv 2002.05202) two large values are written, read again
and joined. cuBLAS has no epilogue for that; the kernel in :mod:`diagpass.kernels.tiles` computes both
products at once and leaves what they are joined to. Whether it is the faster way is measured.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from diagpass.kernels.choose import choose

log = logging.getLogger(__name__)

#: What may be applied to the first product, by name; ``identity`` is a product of two products.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda value: value,
}
#: See :func:`diagpass.kernels.tiles.gated`.
TILES = ([128, 128, 64, 3, 8, 1], [128, 128, 64, 3, 8, 0], [64, 128, 64, 4, 4, 1])

DTYPES = (torch.bfloat16, torch.float16)
BUDGET = 0.05  # seconds of timing
ROUNDS = 8  # runs in a row, so that a launch from Python does not count
CLEARLY = 0.97  # of the time of the products apart
MOST_CELLS, MOST_BYTES = 8, 2**29  # of made-up operands

__all__ = ["ACTIVATIONS", "best_tiles", "gated_product"]


@torch.library.custom_op("diagpass::gated_product", mutates_args=())
def gated_product(rows: Tensor, first: Tensor, second: Tensor, activation: str, tiles: list[int]) -> Tensor:
    """``activation(rows @ first.mT) * (rows @ second.mT)``, rounded once.

    Parameters
    ----------
    rows
        Of shape (cells, rows, inner) or (rows, inner).
    first, second
        The weights as ``nn.Linear`` stores them: (cells, columns, inner) or (columns, inner).
    activation
        A name in :data:`ACTIVATIONS`.
    tiles
        What :func:`best_tiles` returned.

    Returns
    -------
    Tensor
        Of shape (cells, rows, columns) or (rows, columns).
    """
    if not _is_ready(rows, first, second):
        return _apart(rows, first, second, activation)
    from diagpass.kernels.tiles import gated

    result = rows.new_empty((*rows.shape[:-1], first.shape[-2]))
    x, u, v, y = map(_with_cells, (rows, first, second, result))
    with torch.cuda.device(rows.device):
        gated(x, u, v, y, activation, tiles, _multiprocessors(rows.device))
    return result


@gated_product.register_fake
def _(rows: Tensor, first: Tensor, second: Tensor, activation: str, tiles: list[int]) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], first.shape[-2]))


def best_tiles(rows: Tensor, first: Tensor, activation: str) -> list[int] | None:
    """How the kernel goes about operands like these; None where the products apart are as fast.

    Measured once for a process, with made-up operands.

    Parameters
    ----------
    rows, first
        Tensors, perhaps without memory, of the shapes and data type that :func:`gated_product` is given.
    """
    if not _is_served(rows.device, rows.dtype) or not all(map(_is_even, (rows, first))):
        return None
    cells = _cells(rows, first)
    shape = (cells, *map(_size, (*rows.shape[-2:], first.shape[-2])))
    key = ("gated", shape, rows.dtype, rows.device, activation)
    try:
        ways = _ways(shape, rows, activation)
        made = choose(key, ways, rows.device, f"gated product of {shape}", BUDGET, CLEARLY)
    except torch.OutOfMemoryError:
        log.info("a gated product of %s is not measured: there is no memory for it", shape)
        return None
    return TILES[int(made.name)] if made.name != "apart" else None


def _cells(rows: Tensor, first: Tensor) -> int:
    """How many cells the made-up operands have."""
    if rows.dim() == 2:
        return 1
    each = 2 * _size(first.shape[-1]) * _size(first.shape[-2]) * first.element_size()
    return max(1, min(_size(rows.shape[0]), MOST_CELLS, MOST_BYTES // each))


def _size(value: Any) -> int:
    """A size; of one that is not known what a compiler supposes, without asking, which would fix it."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def _ways(shape: tuple[int, ...], like: Tensor, activation: str) -> dict[str, Callable[[], Any]]:
    """The products apart with a pass over them behind, then the kernel with each of its tilings."""
    cells, rows, inner, columns = shape
    generator = torch.Generator(like.device).manual_seed(0)  # the user's numbers are not drawn

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)

    @functools.cache
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        return made(cells, rows, inner), made(cells, columns, inner), made(cells, columns, inner)

    def apart() -> None:
        x, first, second = operands()
        for _ in range(ROUNDS):
            torch.mul(torch.bmm(x, first.mT), torch.bmm(x, second.mT))

    def together(tiles: list[int]) -> None:
        x, first, second = operands()
        for _ in range(ROUNDS):
            gated_product(x, first, second, activation, tiles)

    ways: dict[str, Callable[[], Any]] = {"apart": apart}
    for at, tiles in enumerate(TILES):
        way = functools.partial(together, tiles)
        if _works(way):
            ways[str(at)] = way
    return ways


def _works(way: Callable[[], Any]) -> bool:
    """Whether the kernel can be built: a device may have less shared memory than its tiles take."""
    try:
        with _disable_current_modes(), torch.no_grad():
            way()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler raises what it likes; there is another way
        log.info("no kernel for a gated product: %s", str(error).split("\n")[0])
        return False
    return True


def _apart(rows: Tensor, first: Tensor, second: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](rows @ first.mT) * (rows @ second.mT)


def _is_ready(rows: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether the kernel can read operands as they lie."""
    return (
        _is_served(rows.device, rows.dtype)
        and rows.numel() > 0
        and first.stride() == second.stride()
        and first.data_ptr() != second.data_ptr()
        and all(map(_is_even, (rows, first, second)))
        and all(value.data_ptr() % 16 == 0 for value in (rows, first, second))
    )


def _is_even(value: Tensor) -> bool:
    """Whether the last axis is packed and all other steps are multiples of 16 bytes."""
    *steps, last = value.stride()
    sizes = value.shape
    even = all(
        step > 0 and step * value.element_size() % 16 == 0
        for size, step in zip(sizes, steps, strict=False)
        if isinstance(size, torch.SymInt) or size > 1
    )
    return bool(last == 1 and even and value.shape[-1] * value.element_size() % 16 == 0)


@functools.cache
def _is_served(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel: it loads by the tensor memory accelerator, in devices since Hopper."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in DTYPES:
        return False
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _with_cells(value: Tensor) -> Tensor:
    return value if value.dim() == 3 else value.unsqueeze(0)

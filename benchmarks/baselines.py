"""What the wavefront has to beat.

``StrongestSequential``: each layer compiled by Inductor, a whole segment in one CUDA graph, the memory
written in place. ``FullAttention``: the same Llama over all tokens at once, its layers compiled. Both
compile one layer and run it with the weights of each, so that compilation takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from examples.armt import AssociativeMemoryCell


def compiled(function: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The function, traced with these operands and compiled by Inductor."""
    from torch._inductor import compile as compile_graph

    with torch.no_grad():
        graph = make_fx(function)(*operands)
        return compile_graph(graph, list(operands))


def _call_of(layer: nn.Module, call: Callable[[], Any]) -> dict[str, Any]:
    """The keyword arguments with which ``call`` calls the layer."""
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return seen


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


class _LayerFunction:
    """One layer as a function of its weights, compiled for the weights of any layer like it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.template = layers[0]
        self.names = [name for name, _ in self.template.named_parameters()]
        self.weights = [[dict(layer.named_parameters())[name] for name in self.names] for layer in layers]

    def call(self, weights: Sequence[torch.Tensor], hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        named = dict(zip(self.names, weights, strict=True))
        return _first(functional_call(self.template, named, (hidden,), kwargs))


class StrongestSequential:
    """Segments one after the other, as fast as a sequential run gets.

    Parameters
    ----------
    cell
        The memory cell; its weights are used, its state is not.
    segment_size
        Tokens of a segment; the input is a multiple of it.
    logits_to_keep
        Of how many positions, memory tokens among them, the head is computed; 0 for all.
    """

    def __init__(self, cell: AssociativeMemoryCell, segment_size: int, logits_to_keep: int = 0) -> None:
        self.segment_size = segment_size
        device = cell.memory.device
        self.ids = torch.zeros(1, segment_size, dtype=torch.long, device=device)
        layers = list(cell.layers)
        cell.zero_mem()
        kwargs = _call_of(layers[0], lambda: cell(self.ids))
        self.state = [(layer.W_mem.clone(), layer.z.clone()) for layer in layers]
        function = _LayerFunction(layers)
        count = len(function.names)
        hidden = torch.randn(
            1, segment_size + cell.num_mem_tokens, int(cell.d_model), dtype=cell.memory.dtype, device=device
        )
        template: Any = function.template

        def run(first: bool) -> Callable[..., Any]:
            def layer(*operands: torch.Tensor) -> torch.Tensor:
                memory, norm = operands[count + 1 :]
                template.first_seg = first
                template.W_mem = torch.zeros_like(memory) if first else memory
                template.z = torch.zeros_like(norm) if first else norm
                out = function.call(operands[:count], operands[count], kwargs)
                memory.copy_(template.W_mem)
                norm.copy_(template.z)
                return out

            return layer

        example = [*function.weights[0], hidden, *(item.clone() for item in self.state[0])]
        layer = {first: compiled(run(first), example) for first in (True, False)}
        llama: Any = cell.model

        def before(ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([llama.get_input_embeddings()(ids), cell.memory.repeat(1, 1, 1)], dim=1)

        def after(hidden: torch.Tensor) -> torch.Tensor:
            kept = hidden[:, -logits_to_keep:]  # -0 begins at the beginning
            return llama.lm_head(llama.model.norm(kept))[:, : -cell.num_mem_tokens]

        before, after = compiled(before, [self.ids]), compiled(after, [hidden])

        def segment(first: bool) -> torch.Tensor:
            hidden = before(self.ids)
            for weights, state in zip(function.weights, self.state, strict=True):
                hidden = layer[first](*weights, hidden, *state)
            return after(hidden)

        cell.zero_mem()
        self._read = layer, before, after  # a CUDA graph does not keep the constants that it reads
        self.run, self.out = {}, {}
        for first in (True, False):
            self.run[first], self.out[first] = _graphed(lambda first=first: segment(first), device.type)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token numbers [1, N] -> outputs [1, N, ...]."""
        with torch.no_grad():
            _, length, *rest = self.out[True].shape
            count = ids.shape[1] // self.segment_size
            result = torch.empty(1, count * length, *rest, dtype=self.out[True].dtype, device=ids.device)
            pairs = zip(ids.split(self.segment_size, 1), result.split(length, 1), strict=True)
            for at, (part, kept) in enumerate(pairs):
                self.ids.copy_(part)
                found = self.run[at == 0]()
                kept.copy_(self.out[at == 0] if found is None else found)
            return result


def _graphed(function: Callable[[], torch.Tensor], device: str) -> tuple[Callable[[], Any], torch.Tensor]:
    """The function in a CUDA graph, and where its result will be; on the CPU the function itself."""
    with torch.no_grad():
        if device != "cuda":
            return function, function()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result


class FullAttention:
    """The Llama over all tokens at once, causal attention over all of them, its layers compiled.

    Parameters
    ----------
    llama
        A Hugging Face causal LM.
    ids
        Token numbers [1, N]; compiled for their number.
    last
        Whether the head is computed for the last position alone.
    """

    def __init__(self, llama: Any, ids: torch.Tensor, last: bool = False) -> None:
        layers = list(llama.model.layers)
        hidden = llama.get_input_embeddings()(ids).detach()
        with torch.no_grad():
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            rotary = llama.model.rotary_emb(hidden, positions)
        function = _LayerFunction(layers)
        count = len(function.names)

        def layer(*operands: torch.Tensor) -> torch.Tensor:
            kwargs = {"attention_mask": None, "position_embeddings": tuple(operands[count + 1 :])}
            return function.call(operands[:count], operands[count], kwargs)

        self.rotary = rotary
        self.layer = compiled(layer, [*function.weights[0], hidden, *rotary])
        self.weights, self.llama = function.weights, llama
        self.kept = slice(-1, None) if last else slice(None)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token numbers [1, N] -> outputs [1, N, ...]."""
        with torch.no_grad():
            hidden = self.llama.get_input_embeddings()(ids)
            for weights in self.weights:
                hidden = self.layer(*weights, hidden, *self.rotary)
            return self.llama.lm_head(self.llama.model.norm(hidden[:, self.kept]))


def compiled_step(
    cell: AssociativeMemoryCell, segment_size: int, **kwargs: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loop with its step under ``torch.compile``, as a user would write it; the step gets ``kwargs``.

    The counter of each layer would make Dynamo compile anew at every segment; it is told not to.
    """
    import torch._dynamo.config

    config: Any = torch._dynamo.config
    config.allow_unspec_int_on_nn_module = True
    step: Any = torch.compile(cell)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            cell.zero_mem()
            outs = [step(part, **kwargs)["logits"] for part in ids.split(segment_size, dim=1)]
            return torch.cat(outs, dim=1)

    return run

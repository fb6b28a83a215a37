"""The models in examples/ are what they say they are, before any pass sees them.

Each runs in every dtype, is recurrent over segments, and is captured whole by Dynamo with bitwise
equal results. Beyond that every one is compared with something independent: ARMT's memory with the
delta rule's defining property, the Transformer-XL with full attention, the RNN stacks with
`nn.GRU` and `nn.LSTM`.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from examples import armt, rmt, rnn_stack, transformer_xl

Built = tuple[nn.Module, tuple[Any, ...]]

TINY = {"segment_size": 5, "d_model": 16, "heads": 2}
TINY_ARMT = TINY | {"num_mem_tokens": 2, "d_mem": 4}

BUILDS: dict[str, Callable[..., Built]] = {
    "armt-llama": functools.partial(armt.build, base="llama", **TINY_ARMT),
    "armt-gpt2": functools.partial(armt.build, base="gpt2", **TINY_ARMT),
    "rmt-llama": functools.partial(rmt.build, base="llama", num_mem_tokens=2, **TINY),
    "rmt-gpt2": functools.partial(rmt.build, base="gpt2", num_mem_tokens=2, **TINY),
    "gru": functools.partial(rnn_stack.build, kind="gru", d_model=16),
    "lstm": functools.partial(rnn_stack.build, kind="lstm", d_model=16),
    "txl": functools.partial(transformer_xl.build, **TINY),
}

each = pytest.mark.parametrize("name", BUILDS)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors of a call's result; the first holds the outputs of all segments."""
    result = model(*inputs)
    return tree_leaves(list(result.values()) if hasattr(result, "values") else result)


def memories(model: nn.Module) -> Iterator[Tensor]:
    """What an ARMT's layers hold; nothing of other models."""
    for layer in model.modules():
        if isinstance(layer, armt.AssociativeLayerWrapper):
            yield layer.W_mem
            yield layer.z


def changed_at(inputs: tuple[Any, ...], token: int) -> tuple[Any, ...]:
    """Inputs with one token changed in every sequence."""
    changed = inputs[0].clone()
    changed[:, token] = changed[:, token] + 1 if changed.is_floating_point() else 96
    return (changed,)


# --------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("module", ["armt", "rmt", "rnn_stack", "transformer_xl"])
def test_examples_use_only_torch_and_transformers_and_their_docs_run(module: str) -> None:
    loaded = importlib.import_module(f"examples.{module}")
    roots = set()
    for node in ast.walk(ast.parse(Path(str(loaded.__file__)).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(str(node.module).split(".")[0])
    assert roots <= {"__future__", "typing", "torch", "transformers", "examples"}
    results = doctest.testmod(loaded)
    assert results.attempted > 0
    assert results.failed == 0


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_runs_in_its_dtype_and_segments_are_recurrent(name: str, dtype: torch.dtype) -> None:
    model, inputs = BUILDS[name](layers=2, segments=3, dtype=dtype)
    assert not model.training
    first, again = outputs(model, inputs), outputs(model, inputs)
    assert all(t.dtype == dtype and t.isfinite().all() for t in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    changed = outputs(model, changed_at(inputs, 0))
    assert not torch.equal(first[0][:, -1], changed[0][:, -1]), "segment 0 must reach the last one"
    changed = outputs(model, changed_at(inputs, -1))
    assert torch.equal(first[0][:, 0], changed[0][:, 0]), "later tokens must not reach earlier ones"


@each
def test_weights_and_inputs_depend_only_on_the_seed(name: str) -> None:
    state = torch.random.get_rng_state()
    model, inputs = BUILDS[name](layers=1, segments=2)
    same, same_inputs = BUILDS[name](layers=1, segments=2, dtype=torch.float64)
    other, _ = BUILDS[name](layers=1, segments=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(inputs[0], same_inputs[0].to(inputs[0].dtype))
    for mine, its in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine.double(), its)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(mine, its) for mine, its in pairs)


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "rmt-gpt2"])
@torch.no_grad()
def test_is_captured_whole_with_bitwise_equal_results(name: str) -> None:
    model, inputs = BUILDS[name](layers=2, segments=2)
    expected = outputs(model, inputs)
    expected_memories = list(memories(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        # the second call must find what the first has compiled
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = outputs(compiled, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        got_memories = zip(memories(model), expected_memories, strict=True)
        assert all(torch.equal(a, b) for a, b in got_memories)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------- ARMT


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("gating", [False, True], ids=["per head", "gating"])
@torch.no_grad()
def test_armt_memory_holds_the_value_last_written_for_a_key(heads: int, gating: bool) -> None:
    layer = armt.AssociativeLayerWrapper(nn.Linear(8, 8), 8, 1, 4, n_heads=heads, gating=gating)
    layer.double()
    nn.init.normal_(layer.W_mv.weight)
    nn.init.constant_(layer.W_mb.bias, 50.0)  # write at full strength
    torch.manual_seed(0)
    token = torch.randn(3, 1, 8, dtype=torch.float64)
    key = layer._features(layer.W_mk(token))
    for written in (1, 2, 3):
        # the same key with another value: what the key held is replaced, not added to
        layer.W_mv.weight.mul_(-1.7)
        layer.update_mem(token)
        layer.first_seg = False
        assert layer.seg_num == written
        held = layer._from_heads(layer._read(key)[0])
        torch.testing.assert_close(held, layer.W_mv(token), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.z.unsqueeze(2), key, rtol=1e-3, atol=1e-3)
    assert layer.W_mem.shape == (3, heads, layer.d_key // heads, 8 // heads)
    layer.zero_mem()
    assert layer.first_seg
    assert layer.seg_num == 0
    assert not layer.associate(token).any()


def features_by_hand(x: Tensor, nu: int = 3) -> Tensor:
    """DPFP of one vector [d] as its definition has it, scaled to unit length."""
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)])
    phi = torch.stack([r[i] * r[i - j] for j in range(1, nu + 1) for i in range(len(r))])
    return phi / phi.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"n_heads": 2}, {"gating": True, "n_heads": 2}, {"correction": False}] + [{"use_denom": False}],
    ids=str,
)
@torch.no_grad()
def test_armt_memory_against_loops_over_tokens(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    batch, tokens, width, d_mem = 2, 3, 8, 4
    layer = armt.AssociativeLayerWrapper(nn.Linear(width, width), width, tokens, d_mem, **options)
    layer.double()
    nn.init.normal_(layer.W_mv.weight)
    segments = torch.randn(3, batch, tokens, width, dtype=torch.float64)
    queries = torch.randn(batch, 5, width, dtype=torch.float64)
    for segment in segments:
        layer.update_mem(segment)
        layer.first_seg = False
    got = layer.associate(queries)

    heads = layer.n_heads

    def part(x: Tensor, head: int) -> Tensor:
        return x.chunk(heads)[head]

    def read(key: Tensor, memory: Tensor, z: Tensor) -> Tensor:
        return key @ memory / (key @ z + 1e-5 if layer.use_denom else 1)

    for b in range(batch):
        for head in range(heads):
            memory = torch.zeros(6 * d_mem // heads, width // heads, dtype=torch.float64)
            z = torch.zeros(6 * d_mem // heads, dtype=torch.float64)
            for s, segment in enumerate(segments):
                # all tokens of a segment see the memory as the segment before has left it
                before, z_before = memory.clone(), z.clone()
                for x in segment[b]:
                    key = features_by_hand(part(layer.W_mk(x), head))
                    strength = part(layer.W_mb(x).sigmoid(), head)
                    known = read(key, before, z_before) if s else 0
                    value = part(layer.W_mv(x), head)
                    memory += torch.outer(key, strength * (value - known))
                    is_new = 1 - (key @ z_before + 1e-5) if s and layer.correction else 1
                    z += max(float(is_new), 0) * key
            torch.testing.assert_close(layer.W_mem[b, head], memory)
            if layer.use_denom:
                torch.testing.assert_close(layer.z[b, head], z)
            for t, x in enumerate(queries[b]):
                expected = read(features_by_hand(part(layer.W_mq(x), head)), memory, z)
                torch.testing.assert_close(part(got[b, t], head), expected)


@pytest.mark.parametrize("option", [{"correction": False}, {"use_denom": False}, {"gating": True}])
@torch.no_grad()
def test_armt_options_change_the_result(option: dict[str, Any]) -> None:
    model, inputs = BUILDS["armt-llama"](layers=1, segments=3)
    other, _ = BUILDS["armt-llama"](layers=1, segments=3, **option)
    shared = {k: v for k, v in model.state_dict().items() if "W_mb" not in k}
    other.load_state_dict(shared, strict=False)
    expected, got = model(*inputs), other(*inputs)
    assert torch.equal(got.logits_0, expected.logits_0), "nothing is read in the first segment"
    assert got.logits_2.isfinite().all()
    assert not torch.equal(got.logits_2, expected.logits_2)


@torch.no_grad()
def test_armt_outputs_segment_by_segment() -> None:
    model, (ids,) = BUILDS["armt-gpt2"](layers=2, segments=3)
    ids = ids[:, :-3]  # the last segment has two of five tokens
    out = model(ids, labels=ids, output_hidden_states=True)
    names = ["logits", "hidden_states", "ce_loss"]
    assert set(out) == {"loss", *names} | {f"{name}_{s}" for name in names for s in range(3)}
    assert torch.equal(out.logits, torch.cat([out[f"logits_{s}"] for s in range(3)], dim=1))
    assert out.logits_2.shape == (2, 2, 97)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, 16)] * 3
    assert out.loss.shape == ()
    assert torch.equal(out.logits, model(ids).logits)
    assert [layer.seg_num for layer in model.memory_cell.layers] == [3, 3]


@torch.no_grad()
def test_armt_cell_alone_and_carrying_on() -> None:
    model, (ids,) = BUILDS["armt-llama"](layers=2, segments=4)
    expected = model(ids).logits
    cell = model.memory_cell
    cell.zero_mem()
    by_hand = [cell(segment).logits for segment in ids.split(model.segment_size, dim=1)]
    assert torch.equal(torch.cat(by_hand, dim=1), expected)
    halves = [model(ids[:, :10]).logits, model(ids[:, 10:], zero_mem=False).logits]
    assert torch.equal(torch.cat(halves, dim=1), expected)
    assert torch.equal(cell(ids[:, :5], zero_mem=True).logits, expected[:, :5])


@torch.no_grad()
def test_armt_attention_mask() -> None:
    model, (ids,) = BUILDS["armt-llama"](layers=2, segments=2)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[:, 2] = 0
    masked = model(ids, attention_mask=mask).logits
    assert not torch.equal(masked, model(ids).logits)
    changed = model(*changed_at((ids,), 2), attention_mask=mask).logits
    keep = torch.arange(ids.shape[1]) != 2
    assert torch.equal(changed[:, keep], masked[:, keep])


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@torch.no_grad()
def test_armt_generates_what_its_logits_say_and_writes_nothing_meanwhile(base: str) -> None:
    model, (ids,) = BUILDS[f"armt-{base}"](layers=2, segments=3)
    ids = ids[:, :-1]
    expected = model(ids).logits[:, -1].argmax(-1)
    model(ids[:, :10])
    before = list(memories(model))
    new = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert new.shape[0] == 2
    assert torch.equal(new[:, 0], expected)
    assert all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))
    assert not any(layer.generate_mode for layer in model.memory_cell.layers)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_armt_gradients_reach_every_parameter_through_the_memory(base: str) -> None:
    model, (ids,) = BUILDS[f"armt-{base}"](layers=2, segments=3)
    labels = ids.clone()
    labels[:, :10] = -100  # only the last segment is judged
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in model.memory_cell.layers:
        assert layer.W_mk.weight.grad.any()
        assert layer.W_mv.weight.grad.any()
    assert model.memory_cell.memory.grad.any()


@pytest.mark.parametrize("base", ["qwen2", "qwen3", "mistral", "gpt_neox", "gemma"])
@torch.no_grad()
def test_armt_over_other_families(base: str) -> None:
    model, inputs = armt.build(base=base, layers=2, segments=2, **TINY_ARMT)
    wrapped = model.memory_cell.layers
    assert [type(layer) for layer in wrapped] == [armt.AssociativeLayerWrapper] * 2
    out, changed = model(*inputs), model(*changed_at(inputs, 0))
    assert out.logits.isfinite().all()
    assert not torch.equal(out.logits_1, changed.logits_1)


@torch.no_grad()
def test_armt_untrained_memory_leaves_the_base_model_alone() -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    base = GPTNeoXForCausalLM(config).eval()
    ids = torch.randint(11, (2, 12))
    expected = torch.cat([base(part).logits for part in ids.split(4, dim=1)], dim=1)
    model = armt.wrap(base, segment_size=4, num_mem_tokens=2, d_mem=4).eval()
    torch.testing.assert_close(model(ids).logits, expected)


def test_armt_parameters_are_named_as_published() -> None:
    model, _ = BUILDS["armt-llama"](layers=1)
    names = dict(model.named_parameters())
    layer = "memory_cell.model.model.layers.0"
    assert names["memory_cell.memory"].shape == (2, 16)
    assert names[f"{layer}.W_mq.weight"].shape == (4, 16)
    assert names[f"{layer}.W_mk.weight"].shape == (4, 16)
    assert names[f"{layer}.W_mv.weight"].shape == (16, 16)
    assert names[f"{layer}.W_mb.weight"].shape == (1, 16)
    assert names[f"{layer}.W_mb.bias"].shape == (1,)
    assert f"{layer}.layer.self_attn.q_proj.weight" in names
    assert "memory_cell.layers.0.W_mq.weight" in model.state_dict()


def test_armt_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_mem_tokens must be at least 1, got 0"):
        BUILDS["armt-llama"](layers=1, **{"num_mem_tokens": 0})
    with pytest.raises(ValueError, match="n_heads=3 must divide d_mem=4 and d_model=16"):
        BUILDS["armt-llama"](layers=1, n_heads=3)
    with pytest.raises(ValueError, match="Linear holds no ModuleList"):
        armt.decoder_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'0' is a Linear, expected a ModuleList"):
        armt.decoder_layers(nn.Sequential(nn.Linear(2, 2)), "0")


# -------------------------------------------------------------------------------------- others


@torch.no_grad()
def test_rmt_memory_goes_from_the_top_to_the_next_bottom() -> None:
    model, (ids,) = BUILDS["rmt-llama"](layers=2, segments=3)
    cell, state, logits = model.memory_cell, None, []
    for segment in ids.split(model.segment_size, dim=1):
        start = cell.memory.repeat(2, 1, 1) if state is None else state
        embeds = torch.cat([start, cell.model.get_input_embeddings()(segment), start], dim=1)
        hidden = cell.model.model(inputs_embeds=embeds).last_hidden_state
        state = hidden[:, -2:]
        logits.append(cell.model.lm_head(hidden)[:, 2:-2])
    expected = torch.cat(logits, dim=1)
    out = model(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 15, 16)] * 3
    assert out.loss.isfinite()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@torch.no_grad()
def test_rnn_stack_is_torchs_own_rnn(kind: str) -> None:
    model, (x,) = rnn_stack.build(kind=kind, layers=3, segments=4, d_model=6, dtype=torch.float64)
    reference = {"gru": nn.GRU, "lstm": nn.LSTM}[kind](6, 6, 3, batch_first=True).double()
    for at, cell in enumerate(model.cells):
        for name, parameter in cell.named_parameters():
            getattr(reference, f"{name}_l{at}").copy_(parameter)
    got, states = model(x)
    expected, final = reference(x)
    torch.testing.assert_close(got, expected)
    stacked = [torch.stack(parts) for parts in zip(*states, strict=True)] if kind == "lstm" else []
    for mine, its in zip(stacked or [torch.stack(states)], tree_leaves(final), strict=True):
        torch.testing.assert_close(mine, its)
    start, state = model(x[:, :2])
    rest, _ = model(x[:, 2:], state)
    assert torch.equal(torch.cat([start, rest], dim=1), got)


def test_rnn_stack_names_the_kinds_it_knows() -> None:
    with pytest.raises(ValueError, match="kind must be one of gru, lstm, got 'elman'"):
        rnn_stack.build(kind="elman")


@torch.no_grad()
def test_relative_shift_moves_scores_from_distances_to_keys() -> None:
    rows, columns = 3, 5
    by_distance = torch.arange(columns - 1, -1, -1.0).expand(1, 1, rows, columns)
    shifted = transformer_xl.relative_shift(by_distance)[0, 0]
    for query in range(rows):
        for key in range(columns - rows + query + 1):
            assert shifted[query, key] == columns - rows + query - key


@torch.no_grad()
def test_relative_attention_against_loops_over_positions() -> None:
    torch.manual_seed(0)
    attn = transformer_xl.RelativeAttention(8, 2).double()
    context = torch.randn(1, 5, 8, dtype=torch.float64)  # two remembered, three of the segment
    r = transformer_xl.sinusoids(5, like=context)
    future = torch.ones(3, 5, dtype=torch.bool).triu(diagonal=3)
    got = attn(context[:, 2:], context, r, future)[0]
    for i in range(3):
        heads = []
        for h in range(2):
            e = slice(4 * h, 4 * h + 4)
            q, v = attn.W_q(context[0, 2 + i])[e], attn.W_v(context[0])[:, e]
            scores = []
            for j in range(2 + i + 1):
                distance = torch.tensor([2 + i - j]) / 10000 ** (torch.arange(0, 8, 2) / 8)
                encoding = torch.cat([distance.sin(), distance.cos()]).double()
                content = (q + attn.u[h]) @ attn.W_ke(context[0, j])[e]
                position = (q + attn.v[h]) @ attn.W_kr(encoding)[e]
                scores.append((content + position) / 4**0.5)
            heads.append(torch.stack(scores).softmax(0) @ v[: len(scores)])
        torch.testing.assert_close(got[i], attn.W_o(torch.cat(heads)), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_transformer_xl_with_a_long_memory_is_full_causal_attention() -> None:
    model, (ids,) = transformer_xl.build(layers=3, segments=4, mem_len=64, dtype=torch.float64, **TINY)
    ids = ids[:, :-2]
    got, mems = model(ids)
    assert [tuple(mem.shape) for mem in mems] == [(2, 18, 16)] * 3
    model.segment_size = ids.shape[1]
    torch.testing.assert_close(got, model(ids)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_transformer_xl_remembers_what_the_layer_below_put_out() -> None:
    model, (ids,) = transformer_xl.build(layers=2, segments=3, **TINY)
    _, mems = model(ids)
    assert torch.equal(mems[0], model.embed(ids[:, -5:]))
    # the top layer's own weights must not reach its memory
    nn.init.zeros_(model.layers[1].norm_ff.weight)
    logits, after = model(ids)
    assert all(torch.equal(a, b) for a, b in zip(mems, after, strict=True))
    assert torch.equal(model(ids[:, 10:], model(ids[:, :10])[1])[0], logits[:, 10:])

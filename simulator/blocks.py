"""Building blocks that families share: norms, rotary embedding, attention interfaces, MLPs, the loss head.

Each follows the Python of transformers 5.23 (file named per function): which intermediate has a name,
and therefore lives until its function returns, is part of what is modelled.
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.graph import Tensor
from simulator.model import AttentionSpec, FeedForwardSpec
from simulator.sizes import Dim
from simulator.tensor_parallel import Style
from simulator.trace import Trace


def llama_rms_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`LlamaRMSNorm` (models/llama/modeling_llama.py): statistics in fp32, weight applied in the input's dtype."""
    with t.call(name, x) as local:
        weight = t.parameter("weight", *x.shape[-1])
        hidden = local("hidden", ops.to(t, x, FP32))
        variance = local("variance", ops.mean(t, ops.power(t, hidden)))
        hidden = local("hidden", ops.mul(t, hidden, ops.rsqrt(t, ops.add_scalar(t, variance))))
        return ops.mul(t, weight, ops.to(t, hidden, x.dtype))


def gemma_rms_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`Gemma2RMSNorm` (models/gemma2/modeling_gemma2.py): all in fp32, weight stored minus one."""
    with t.call(name, x) as local:
        weight = t.parameter("weight", *x.shape[-1])
        upcast = ops.to(t, x, FP32)
        with t.call("", upcast):
            scale = ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.power(t, upcast))))
            normalised = ops.mul(t, upcast, scale)
        output = local("output", normalised)
        output = local("output", ops.mul(t, output, ops.add_scalar(t, ops.to(t, weight, FP32))))
        return ops.to(t, output, x.dtype)


def rotary_tables(t: Trace, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`LlamaRotaryEmbedding.forward`: cos and sin of shape ``[s, d]`` in the dtype of the hidden states."""
    with t.call("rotary_emb") as local:
        d = t.dim("d", head_dim)
        half = t.dim(f"{d}/2", head_dim // 2)
        frequencies = t.buffer("inv_freq", half, dtype=FP32)
        t.buffer("original_inv_freq", half, dtype=FP32)
        freqs = local("freqs", ops.constant(t, "mul.Tensor", frequencies, shape=(("s",), (half,))))
        emb = local("emb", ops.constant(t, "cat.default", freqs, shape=(("s",), (d,))))
        tables = []
        for name in ("cos", "sin"):
            raw = ops.constant(t, f"{name}.default", emb)
            tables.append(local(name, ops.constant(t, "mul.Tensor", raw)))
        cos, sin = (ops.to(t, table, like.dtype) for table in tables)
        return cos, sin


def apply_rotary(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One half of `apply_rotary_pos_emb`: ``x * cos + rotate_half(x) * sin``."""
    direct = ops.mul(t, x, cos)
    rotated = ops.mul(t, _rotate_half(t, x), sin)
    return ops.add(t, direct, rotated)


def _rotate_half(t: Trace, x: Tensor) -> Tensor:
    with t.call("", x) as local:
        d = x.shape[-1][0]
        half = (*x.shape[:-1], (t.dim(f"{d}/2", t.dimensions.bindings[str(d)] // 2),))
        first, second = (local(n, part) for n, part in zip(("x1", "x2"), ops.slices(t, x, half, 2), strict=True))
        return ops.cat(t, [ops.neg(t, second), first], x.shape, x.memory)


def repeat_kv(t: Trace, x: Tensor, heads: tuple[Dim, ...]) -> Tensor:
    """`repeat_kv`: keys or values for every query head of their group; nothing without groups.

    ``expand`` then ``reshape``: several heads have to be copied, a single one remains a view of stride 0.
    """
    shape = (x.shape[0], heads, *x.shape[2:])
    if x.shape[1] == heads:
        return x
    return ops.clone(t, x, shape) if x.shape[1] else ops.expand(t, x, shape)


def eager_attention(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spec: AttentionSpec, *, fp32_softmax: bool
) -> tuple[Tensor, Tensor]:
    """`eager_attention_forward` of the llama family (``fp32_softmax``) and of gpt2; returns output and weights."""
    with t.call("", query, key, value) as local:
        key = local("key", repeat_kv(t, key, query.shape[1]))
        value = local("value", repeat_kv(t, value, query.shape[1]))
        weights = local("weights", ops.mul_scalar(t, ops.matmul(t, query, ops.transpose(t, key, 2, 3))))
        if spec.softcap is not None:
            weights = local("weights", ops.div_scalar(t, weights))
            weights = local("weights", ops.tanh(t, weights))
            weights = local("weights", ops.mul_scalar(t, weights))
        if mask is not None:
            weights = local("weights", ops.add(t, weights, mask))
        if fp32_softmax:
            weights = local("weights", ops.to(t, ops.softmax(t, weights, FP32), query.dtype))
        else:
            weights = local("weights", ops.softmax(t, weights))
            weights = local("weights", ops.to(t, weights, value.dtype))
        weights = local("weights", ops.dropout(t, weights, spec.dropout))
        output = ops.transpose(t, ops.matmul(t, weights, value), 1, 2)
        return (ops.contiguous(t, output) if fp32_softmax else output), weights


def sdpa_attention(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """`sdpa_attention_forward` (integrations/sdpa_attention.py): grouped keys are passed on only without a mask."""
    if spec.softcap is not None:
        raise UnsupportedError(
            "'attention' must be eager or flash_attention_2 with soft-capped scores: 'sdpa' has none"
        )
    grouped = t.regime.torch >= (2, 5) and mask is None and spec.head_dim <= 256
    if not grouped:
        key, value = (repeat_kv(t, x, query.shape[1]) for x in (key, value))
    with t.call("", query, key, value) as local:
        out = local("out", ops.scaled_dot_product_attention(t, query, key, value, mask, spec.dropout, spec.head_dim))
        return ops.contiguous(t, ops.transpose(t, out, 1, 2))


def flash_attention_2(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`flash_attention_forward` (integrations/flash_attention.py): token-major views, 16 bits, no dense mask."""
    if t.regime.attention_mask == "padded":
        raise UnsupportedError(
            "'attention_mask' must be none or full with flash_attention_2: unpadding is not modelled; use sdpa or eager"
        )
    if t.regime.autocast is None and query.dtype == FP32:
        raise UnsupportedError(
            "'dtype' must be 16-bit or autocast with flash_attention_2, not fp32: the kernel has no fp32; use sdpa"
        )
    with t.call("", query, key, value) as local:
        views = [local(f"view{i}", ops.transpose(t, x, 1, 2)) for i, x in enumerate((query, key, value))]
        low = [local(f"low{i}", ops.to(t, x, t.regime.autocast or x.dtype)) for i, x in enumerate(views)]
        return ops.flash_attention_2(t, *low)


def attention(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spec: AttentionSpec, *, fp32_softmax: bool
) -> tuple[Tensor, Tensor | None]:
    """The attention interface that ``attn_implementation`` names; returns output ``[b, s, a, d]`` and weights."""
    if t.regime.attention == "eager":
        return eager_attention(t, query, key, value, mask, spec, fp32_softmax=fp32_softmax)
    if t.regime.attention == "flash_attention_2":
        return flash_attention_2(t, query, key, value), None
    if t.regime.attention != "sdpa":
        raise UnsupportedError(
            f"'attention' {t.regime.attention} is not modelled for implementation {t.regime.implementation!r}; use sdpa"
        )
    return sdpa_attention(t, query, key, value, mask, spec), None


def gated_mlp(
    t: Trace, x: Tensor, spec: FeedForwardSpec, names: Sequence[str] = ("mlp", "gate_proj", "up_proj", "down_proj")
) -> Tensor:
    """`LlamaMLP`: ``down(act(gate(x)) * up(x))`` (arXiv 2002.05202).

    Args:
        names: of the module and its gate, up and down projections.
    """
    width = t.shard((t.dim("f", spec.width),))
    with t.call(names[0], x) as local:
        x = local("x", module_input(t, names[0], x))
        gate = projection(t, names[1], x, width, spec.bias)
        with t.call("act_fn", gate):
            active = activation(t, spec.activation, gate)
        up = projection(t, names[2], x, width, spec.bias)
        return projection(t, names[3], ops.mul(t, active, up), ("h",), spec.bias)


def activation(t: Trace, name: str, x: Tensor) -> Tensor:
    """`ACT2FN[name]` (activations.py)."""
    if name == "gelu_new":
        return _gelu_new(t, x)
    if name not in _FUSED:
        known = ", ".join(sorted(["gelu_new", *_FUSED]))
        raise UnsupportedError(f"'activation' must be one of {known}: {name!r} is not modelled")
    return _FUSED[name](t, x)


_FUSED = {
    "silu": ops.silu,
    "swish": ops.silu,
    "relu": ops.relu,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu,
}


def _gelu_new(t: Trace, x: Tensor) -> Tensor:
    """`NewGELUActivation`: the tanh approximation spelled out in Python, so every factor is a tensor."""
    with t.call("", x):
        half = ops.mul_scalar(t, x)
        cubed = ops.mul_scalar(t, ops.power(t, x))
        inner = ops.mul_scalar(t, ops.add(t, x, cubed))
        return ops.mul(t, half, ops.add_scalar(t, ops.tanh(t, inner)))


def head_dims(t: Trace, spec: AttentionSpec) -> tuple[tuple[Dim, ...], tuple[Dim, ...], str]:
    """Names of one rank's query heads' dimensions, of its key heads' and of the head dimension.

    With grouped queries the query heads are key heads times groups, so that a key head is
    the same dimension everywhere.
    """
    dim = t.dim("d", spec.head_dim)
    if spec.groups == 1:
        heads = t.shard((t.dim("a", spec.heads),))
        return heads, heads, dim
    key_heads = t.shard((t.dim("k", spec.kv_heads),))
    return (*key_heads, t.dim("g", spec.groups)), key_heads, dim


def rotary_attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`LlamaAttention`: q, k, v projections, rotary positions, attention, output projection; and the weights."""
    heads, key_heads, d = head_dims(t, spec)
    with t.call("self_attn", x) as local:
        made = []
        for name, own in (("q", heads), ("k", key_heads), ("v", key_heads)):
            states = projection(t, f"{name}_proj", x, (*own, d), spec.bias)
            split = ops.reshape(t, states, (*x.shape[:-1], own, (d,)))
            made.append(local(name, ops.transpose(t, split, 1, 2)))
        query, key, value = made
        with t.call("", query, key) as inner:
            query = inner("q_embed", apply_rotary(t, query, *tables))
            key = apply_rotary(t, key, *tables)
        local("q", query)
        local("k", key)
        out, weights = attention(t, query, key, value, mask, spec, fp32_softmax=True)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        return projection(t, "o_proj", out, ("h",), spec.bias), weights


def causal_flash(t: Trace, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """``F.scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`` on token-major ``[b, s, a, d]``."""
    for field, only in (("attention", "sdpa"), ("attention_mask", "none")):
        value_given = getattr(t.regime, field)
        if value_given != only:
            raise UnsupportedError(
                f"{field!r} must be {only} with implementation {t.regime.implementation!r}, not {value_given!r}"
            )
    by_head = [ops.transpose(t, x, 1, 2) for x in (query, key, value)]
    with t.call("", *by_head):
        query, key, value = by_head
        out = ops.scaled_dot_product_attention(t, query, key, value, None, 0.0, spec.head_dim)
    return ops.transpose(t, out, 1, 2)


def check_feed_forward(t: Trace, spec: FeedForwardSpec, activations: Sequence[str], *, bias: bool) -> None:
    """Refuse what an implementation with one activation, or without biases, does not compute."""
    name = t.regime.implementation
    if spec.activation not in activations:
        raise UnsupportedError(
            f"'activation' must be {' or '.join(activations)} with implementation {name!r}, not {spec.activation!r}"
        )
    if spec.bias != bias:
        raise UnsupportedError(f"biases of the feed-forward must be {str(bias).lower()} with implementation {name!r}")


#: Names of the tanh approximation, which one kernel computes.
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
SILU = ("silu", "swish")


def layer_inputs(t: Trace, *arguments: Tensor) -> tuple[Tensor, ...]:
    """What a layer's forward sees of `arguments`: FSDP2 casts floating-point ones to the compute dtype.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_state.py `_cast_forward_inputs`, a pre-forward hook.
    """
    if not t.regime.cast_inputs:
        return arguments
    return tuple(ops.to(t, x, t.regime.weights) if x.dtype.floating else x for x in arguments)


def vocabulary_table(t: Trace, path: str) -> Tensor:
    """The weight of an `nn.Embedding` of the vocabulary, at module `path`."""
    if t.style(path.rpartition(".")[2]) is not Style.VOCABULARY:
        return t.matrix(f"{path}.weight", ("V",), ("h",))
    table = t.matrix(f"{path}.weight", t.shard(("V",)), ("h",))
    t.graph.placements[table.storage] = "clone.default"  # each rank has the whole gradient, and keeps its chunk
    return table


def look_up(t: Trace, table: Tensor, ids: Tensor, name: str) -> Tensor:
    """The `nn.Embedding` `name` of the vocabulary: hidden states of `ids`."""
    with t.call(name, ids):
        if t.style(name) is not Style.VOCABULARY:
            return ops.embedding(t, table, ids)
        return _reduced(t, ops.vocabulary_embedding(t, table, ids, ("V",)))


def module_input(t: Trace, module: str, x: Tensor) -> Tensor:
    """What `module` sees of `x`: the whole sequence, gathered once for all linear layers in it."""
    return _whole_sequence(t, x) if t.style(module) is Style.INPUT else x


def _whole_sequence(t: Trace, x: Tensor) -> Tensor:
    return ops.all_gather(t, x, 1, ("s",))


def _column_input(t: Trace, x: Tensor) -> Tensor:
    """The input of a column-parallel layer: gathered, prepared by the module around it, or replicated anyway."""
    parallel = t.regime.tensor_parallel
    if parallel is None or not parallel.sequence:
        return ops.replicated_input(t, x)
    return x if x.shape[1] == t.squeezed((("s",),))[0] else _whole_sequence(t, x)


def _reduced(t: Trace, x: Tensor) -> Tensor:
    """The partial output of a row-parallel layer, as the residual stream wants it."""
    with t.call("", x):
        sequence = t.sequence()
        return ops.all_reduce(t, x) if sequence == ("s",) else ops.reduce_scatter(t, x, 1, sequence)


def layer_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """An `nn.LayerNorm` over the last axis."""
    with t.call(name, x):
        return ops.layer_norm(t, x, t.parameter("weight", *x.shape[-1]), t.parameter("bias", *x.shape[-1]))


def vocabulary_head(t: Trace, name: str, x: Tensor, tied: Tensor | None) -> Tensor:
    """The `nn.Linear` from hidden states to logits, with the embedding's weight where it is `tied`."""
    parallel = t.regime.tensor_parallel if t.style(name) is Style.HEAD else None
    if parallel and tied is not None:
        t.graph.placements[tied.storage] = None  # what the head adds to is a shard
    with t.loss_head(), t.call(name, x) as local:
        x = local("input", _column_input(t, x)) if parallel else x
        rows = t.shard(("V",)) if parallel else ("V",)
        logits = ops.linear(t, x, t.matrix("weight", rows, ("h",)) if tied is None else tied)
        if parallel is None or parallel.loss:
            return logits
        return ops.gather_output(t, local("output", logits), 2, ("V",))


def projection(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], bias: bool) -> Tensor:
    """An `nn.Linear` from the last axis of `x` to `out`, column- or row-parallel where its style says so."""
    style = t.style(name)
    with t.call(name, x) as local:
        if style is Style.COLUMN:
            x = local("input", _column_input(t, x))
        weight = t.matrix("weight", out, x.shape[-1])
        offset = t.vector("bias", out) if bias else None
        if style is not Style.ROW:
            return ops.linear(t, x, weight, offset, out)
        with t.call("") as call:
            if offset is not None:  # Replicate -> Partial (placement_types.py `Partial._partition_value`)
                call("bias", ops.constant(t, "div.Tensor", offset))
            partial = ops.linear(t, x, weight, offset, out)
        return _reduced(t, partial)

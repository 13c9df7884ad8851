"""GPT-Neo (Black et al. 2021): global and local attention in turn, scores in fp32 and without a scale."""

from __future__ import annotations

from typing import Any

import attrs

from hardware.dtypes import BOOL, FP32
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_WIDTH, is_count, shown
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
"""attribute_map of GPTNeoConfig."""
LOCAL, GLOBAL = "local", "global"


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GPT-Neo config; defaults are those of GPTNeoConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 2048)
    heads, head_dim = read_even_heads(config, hidden, 16, key="num_heads")
    dropout = config.rate("attention_dropout", 0.0)
    width = config.derived_size("intermediate_size", 4 * hidden, "4 * hidden_size", LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("activation_function", "gelu_new"), gated=False, bias=True)
    window = config.size("window_size", 256, LARGEST_POSITIONS)
    layers = [
        LayerSpec(AttentionSpec(heads, heads, head_dim, dropout=dropout, output_bias=True, window=own), feed_forward)
        for own in (window if kind == LOCAL else None for kind in _kinds(config))
    ]
    spec = read_decoder(config, hidden, layers, vocab=50257, tied=True)
    return attrs.evolve(
        spec,
        embedding_dropout=config.rate("embed_dropout", 0.0),
        residual_dropout=config.rate("resid_dropout", 0.0),
    )


def _kinds(config: ConfigReader) -> list[str]:
    """The kind of each layer: ``attention_types`` is ``[[[kind, ...], times], ...]``."""
    depth = config.required_size("num_layers", 24, LARGEST_LAYERS)
    key = "attention_types"
    given: Any = config.values[key] if config.given(key) else [[[GLOBAL, LOCAL], 12]]
    named = [kind for kinds, times in given for kind in times * list(kinds)] if _are_types(given) else []
    rule = f"{key} must be [[[kinds], times], ...] that name {depth} layers (num_layers) as {GLOBAL} or {LOCAL}"
    config.check(len(named) == depth, f"{rule}, not {shown(given)}", key, "num_layers")
    return named if len(named) == depth else [GLOBAL] * depth


def _are_types(given: object) -> bool:
    if not isinstance(given, list | tuple):
        return False
    return all(
        isinstance(item, list | tuple)
        and len(item) == 2
        and isinstance(item[0], list | tuple)
        and all(kind in (GLOBAL, LOCAL) for kind in item[0])
        and is_count(item[1], LARGEST_LAYERS)
        for item in given
    )


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`GPTNeoForCausalLM` (transformers models/gpt_neo/modeling_gpt_neo.py)."""
    decoder.only_eager(t, spec)
    ids, labels = decoder.batch(t)
    vocabulary = t.matrix("transformer.wte.weight", ("V",), ("h",))
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", t.embedded(ops.embedding(t, vocabulary, ids)))
        position_ids = local("position_ids", masks.positions(t, ids))
        mask = masks.causal_mask(t, embeds)
        assert mask is not None
        local("causal_mask", mask)
        table = t.matrix("wpe.weight", (t.dim("P", spec.max_positions),), ("h",))
        places = local("position_embeds", ops.embedding(t, table, position_ids))
        hidden = local("hidden", ops.add(t, embeds, places))
        with t.call("drop"):
            hidden = local("hidden", ops.dropout(t, hidden, spec.embedding_dropout))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask):
                hidden, weights = _block(t, hidden, mask, spec, layer)
                local("outputs", weights)  # the tuple that a block returned lives until the next one returns
                local("hidden", hidden)
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)
    t.order_layer_parameters("ln_1", "k_proj", "v_proj", "q_proj", "out_proj", "ln_2", "mlp")


def _block(t: Trace, x: Tensor, mask: Tensor, spec: ModelSpec, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """`GPTNeoBlock`: returns the attention weights, too."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.layer_norm(t, "ln_1", x))
        attended, weights = _attention(t, hidden, mask, spec, layer.attention)
        local("attn_output", attended)
        local("attn_weights", weights)
        residual = local("residual", local("hidden", ops.add(t, attended, x)))
        hidden = local("hidden", blocks.layer_norm(t, "ln_2", residual))
        names = ("mlp", "c_fc", "act", "c_proj")
        mixed = local("mlp", blocks.plain_mlp(t, hidden, layer.feed_forward, names, spec.residual_dropout))
        return ops.add(t, residual, mixed), weights


def _attention(t: Trace, x: Tensor, mask: Tensor, spec: ModelSpec, layer: AttentionSpec) -> tuple[Tensor, Tensor]:
    """`GPTNeoSelfAttention`: each layer has a mask of its own, as wide as the positions, beside the causal one."""
    heads, _, d = blocks.head_dims(t, layer)
    with t.call("attn", x) as local:
        places = t.dim("P", spec.max_positions)
        own_mask = t.buffer("bias", places, places, dtype=BOOL)
        states = [blocks.projection(t, f"{name}_proj", x, (*heads, d), layer.bias) for name in "qkv"]
        query, key, value = (
            local(name, ops.transpose(t, ops.view(t, one, (*x.shape[:-1], heads, (d,))), 1, 2))
            for name, one in zip("qkv", states, strict=True)
        )
        out, weights = _attend(t, query, key, value, mask, own_mask, layer.dropout)
        local("weights", weights)
        local("out", out)
        out = local("out", blocks.merge_heads(t, out))
        out = local("out", blocks.projection(t, "out_proj", out, ("h",), layer.out_bias))
        with t.call("resid_dropout"):
            return ops.dropout(t, out, spec.residual_dropout), weights


def _attend(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, own_mask: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """`GPTNeoSelfAttention._attn`: queries and keys in fp32, both masks one after the other."""
    with t.call("", query, key, value) as local:
        query, key = (local(name, ops.to(t, x, FP32)) for name, x in (("query", query), ("key", key)))
        weights = local("weights", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        least = local("mask_value", ops.constant(t, "_to_copy.default", weights, shape=()))
        weights = local("weights", ops.where(t, own_mask, weights, least))
        weights = local("weights", ops.add(t, weights, mask))
        weights = local("weights", ops.softmax(t, weights))
        weights = local("weights", ops.to(t, weights, value.dtype))
        with t.call("attn_dropout"):
            weights = local("weights", ops.dropout(t, weights, rate))
        return ops.matmul(t, weights, value), weights


families.add(
    "gpt_neo",
    Family("gpt_neo", read, forward=forward, config_class="GPTNeoConfig", aliases=_ALIASES, bounded_positions=True),
)

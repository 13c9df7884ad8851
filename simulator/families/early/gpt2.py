"""GPT-2 (Radford et al. 2019): learned positions, plain MLP with biases, dropout everywhere."""

from __future__ import annotations

from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.early.gpt import ALIASES, gpt_block, read_gpt
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.model import AttentionSpec, FeedForwardSpec, ModelSpec
from simulator.sizes import Dim
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GPT-2 config; defaults are those of GPT2Config in transformers 5.23.0."""
    config.refuse("reorder_and_upcast_attn", (False, None), "set it to false")
    return read_gpt(config, activation="gelu_new")


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`GPT2LMHeadModel` (transformers models/gpt2/modeling_gpt2.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = t.matrix("transformer.wte.weight", ("V",), ("h",))
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", t.embedded(ops.embedding(t, vocabulary, ids)))
        position_ids = local("position_ids", masks.positions(t, ids))
        table = t.matrix("wpe.weight", (t.dim("P", spec.max_positions),), ("h",))
        position_embeds = local("position_embeds", ops.embedding(t, table, position_ids))
        hidden = local("hidden", ops.add(t, embeds, position_embeds))
        mask = masks.causal_mask(t, embeds)
        if mask is not None:
            local("mask", mask)
        with t.call("drop"):
            hidden = local("hidden", ops.dropout(t, hidden, spec.embedding_dropout))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, position_ids, positional=2):
                hidden = local("hidden", gpt_block(t, hidden, mask, spec, layer, _attention, _mlp))
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)


def _attention(
    t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`GPT2Attention`: one fused projection, split three ways."""
    heads, _, d = blocks.head_dims(t, layer)
    with t.call("attn", x) as local:
        fused = _conv1d(t, "c_attn", x, (3, *heads, d))
        parts = ops.split(t, fused, (*x.shape[:-1], (*heads, d)), 3)
        states = {}
        for name, part in (("k", parts[1]), ("v", parts[2]), ("q", parts[0])):
            split = ops.reshape(t, part, (*x.shape[:-1], heads, (d,)))
            states[name] = local(name, ops.transpose(t, split, 1, 2))
        query, key, value = (states[name] for name in "qkv")
        out, weights = blocks.attention(t, query, key, value, mask, layer, blocks.Softmax.TO_VALUES)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        out = local("out", _conv1d(t, "c_proj", out, ("h",)))
        with t.call("resid_dropout", out):
            return ops.dropout(t, out, spec.residual_dropout), weights


def _mlp(t: Trace, x: Tensor, spec: ModelSpec, layer: FeedForwardSpec) -> Tensor:
    """`GPT2MLP`."""
    with t.call("mlp", x) as local:
        hidden = local("hidden", _conv1d(t, "c_fc", x, (t.dim("f", layer.width),)))
        with t.call("act", hidden):
            hidden = local("hidden", blocks.activation(t, layer.activation, hidden))
        hidden = local("hidden", _conv1d(t, "c_proj", hidden, ("h",)))
        with t.call("dropout", hidden):
            return ops.dropout(t, hidden, spec.residual_dropout)


def _conv1d(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...]) -> Tensor:
    """`Conv1D` (pytorch_utils.py): a linear layer whose weight is stored ``[in, out]``."""
    with t.call(name, x):
        weight = t.matrix("weight", x.shape[-1], out)
        return ops.addmm(t, t.vector("bias", out), x, weight, out)


_OTHERS = {
    "plain": "simulator.implementations.plain_gpt",
    "megatron": "simulator.implementations.megatron",
    "megatron_te": "simulator.implementations.megatron",
}
families.add(
    "gpt2",
    Family(
        "gpt2",
        read,
        forward=forward,
        config_class="GPT2Config",
        aliases=ALIASES,
        implementations=_OTHERS,
        bounded_positions=True,
    ),
)

"""Both ends of a language model: the embedding of the vocabulary and the head."""

from __future__ import annotations

from simulator import ops
from simulator.blocks.linear import column_input, reduced
from simulator.graph import Tensor
from simulator.tensor_parallel import Style
from simulator.trace import Trace


def vocabulary_table(t: Trace, path: str) -> Tensor:
    """The weight of an `nn.Embedding` of the vocabulary, at module `path`."""
    if t.style(path.rpartition(".")[2]) is not Style.VOCABULARY:
        return t.matrix(f"{path}.weight", ("V",), ("h",))
    table = t.matrix(f"{path}.weight", t.shard(("V",)), ("h",))
    t.graph.placements[table.storage] = "clone.default"  # each rank has the whole gradient, and keeps its chunk
    return table


def look_up(t: Trace, table: Tensor, ids: Tensor, name: str) -> Tensor:
    """The `nn.Embedding` `name` of the vocabulary: hidden states of `ids`."""
    return t.embedded(_rows(t, table, ids, name))


def _rows(t: Trace, table: Tensor, ids: Tensor, name: str) -> Tensor:
    with t.call(name, ids):
        if t.style(name) is not Style.VOCABULARY:
            return ops.embedding(t, table, ids)
        return reduced(t, ops.vocabulary_embedding(t, table, ids, ("V",)))


def token_embeddings(t: Trace, table: Tensor, ids: Tensor) -> Tensor:
    """``embed_tokens``."""
    return look_up(t, table, ids, "embed_tokens")


def scaled_embeddings(t: Trace, table: Tensor, ids: Tensor, *, buffer: bool = True) -> Tensor:
    """`Gemma2TextScaledWordEmbedding` (models/gemma2/modeling_gemma2.py): times the root of the hidden size.

    Args:
        buffer: whether that is a buffer; else a number (`BioGptScaledWordEmbedding`).
    """
    embeds = _rows(t, table, ids, "embed_tokens")
    with t.call("embed_tokens"):
        if not buffer:
            return t.embedded(ops.mul_scalar(t, embeds))
        return t.embedded(ops.mul(t, embeds, t.buffer("embed_scale", dtype=t.regime.weights)))


def head_weight(t: Trace, name: str) -> Tensor:
    """The weight of the head `name`, which was run before."""
    return next(weight for weight in t.graph.parameters if weight.storage.label == f"{name}.weight")


def vocabulary_head(t: Trace, name: str, x: Tensor, tied: Tensor | None, *, bias: bool = False) -> Tensor:
    """The `nn.Linear` from hidden states to logits, with the embedding's weight where it is `tied`."""
    parallel = t.regime.tensor_parallel if t.style(name) is Style.HEAD else None
    if parallel and tied is not None:
        t.graph.placements[tied.storage] = None  # what the head adds to is a shard
    with t.loss_head(), t.call(name, x) as local:
        x = local("input", column_input(t, x)) if parallel else x
        rows = t.shard(("V",)) if parallel else ("V",)
        weight = t.matrix("weight", rows, x.shape[-1]) if tied is None else tied
        logits = ops.linear(t, x, weight, t.vector("bias", rows) if bias else None)
        if parallel is None or parallel.loss:
            return logits
        return ops.gather_output(t, local("output", logits), 2, ("V",))

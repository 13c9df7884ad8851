"""torch's ring attention: ``context_parallel`` on ``scaled_dot_product_attention`` with the flash kernel.

Source, torch 2.13: torch/distributed/tensor/experimental/_context_parallel/_attention.py (`_templated_ring_attention`
and its backward, `_SDPAMerger`, the rotaters); names are those of its locals. Each rank has two chunks of a sequence,
one from either end: a step with keys of a rank before this one needs the first chunk of those, one with keys of a rank
after it the second chunk of the queries. Tensors are ``[b, heads, s, d]``.
"""

from __future__ import annotations

from hardware.dtypes import FP32, UINT64, DType
from simulator.autograd import Autograd
from simulator.context_parallel import AXIS
from simulator.frame import Frame
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.attention import flash_dims, flash_workspace
from simulator.ops.elementwise import constant
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]

FLASH = "_scaled_dot_product_flash_attention.default"
CAT, EXCHANGE, GATHER = "cat.default", "all_to_all_single.default", "all_gather_into_tensor.default"


def ring_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention to whole sequences: partial outputs are merged in fp32, step by step.

    Saves what it was given, the output and its log-sum-exp.
    """
    context = t.regime.context_parallel
    assert context is not None
    ranks, rank = int(t.dimensions.bindings[AXIS]), context.rank
    chunk: Axis = (t.dim("s/2", t.dimensions.bindings["s"] // 2),)
    pair: Shape = ((2,), *key.shape)
    with t.call("", query, key, value) as local:
        for names, x in ((("key", "k"), key), (("value", "v"), value)):
            if not x.contiguous:
                copy = constant(t, "clone.default", x)
                for name in names:
                    local(name, copy)
        buffer: Tensor | None = None
        for step in range(ranks):
            here = buffer
            if here is not None:
                local("key", here)
                local("value", here)
            if step < ranks - 1:
                with t.call("") as sending:
                    sending("next_kv", constant(t, CAT, key, shape=pair))
                    if context.communication == "a2a":
                        buffer = local("buffer", constant(t, EXCHANGE, key, shape=pair))
                    elif buffer is None:
                        buffer = local("buffer", constant(t, GATHER, key, shape=((AXIS,), *pair)))
            if here is not None:
                local("k", here)
                local("v", here)
            _attend(t, local, query, chunk if step > rank else ("s",))
            _merge(t, local, query, chunk if step > rank else ("s",), first=step == 0)
        kept = [local.held(name) for name in ("merged_lse", "rng_state", "unused")]
        out = t.fresh("_to_copy.default", query.shape, query.dtype, query.memory if rank == ranks - 1 else None)
        inputs = [query, key, value]
        attributes = {"ranks": ranks, "rank": rank, "half": chunk, "exchanges": context.communication == "a2a"}
        t.emit("ring_attention", [*inputs, *kept], [out], saves=[*inputs, out, *kept], backward=_backward, **attributes)
    return out


def _tokens(x: Tensor, tokens: Axis) -> Shape:
    return (*x.shape[:2], tokens, *x.shape[3:])


def _attend(t: Trace, local: Frame, query: Tensor, tokens: Axis) -> None:
    """The kernel: its results replace those of the step before."""
    flash_dims(t, query, tokens)
    made = {
        "out": constant(t, FLASH, query, shape=_tokens(query, tokens)),
        "logsumexp": constant(t, FLASH, query, dtype=FP32, shape=(*query.shape[:2], tokens)),
        "rng_state": constant(t, FLASH, query, dtype=UINT64, shape=((2,),)),
        "unused": constant(t, FLASH, query, dtype=UINT64, shape=()),
    }
    for name, tensor in made.items():
        local(name, tensor)


def _merge(t: Trace, local: Frame, query: Tensor, tokens: Axis, *, first: bool) -> None:
    """`_SDPAMerger.step`: the output in fp32, its log-sum-exp as it is; of a chunk, both are joined to the rest."""
    rows, block = (*query.shape[:2], tokens), _tokens(query, tokens)

    def made(name: str, shape: Shape) -> Tensor:
        return constant(t, name, query, dtype=FP32, shape=shape)

    with t.call("") as names:
        out, lse = names("out", made("_to_copy.default", block)), local.held("logsumexp")
        if not first:
            with t.call("") as whole:
                with t.call("") as product:
                    with t.call("") as difference:
                        difference("lse", made("sub.Tensor", rows))
                        product("sigmoid", made("sigmoid.default", rows))
                    product("out", made("sub.Tensor", block))
                    whole("product", made("mul.Tensor", block))
                out = names("merged_out", made("sub.Tensor", block))
            with t.call("") as whole:
                with t.call("") as difference:
                    difference("lse", made("sub.Tensor", rows))
                    whole("logsigmoid", made("log_sigmoid_forward.default", rows))
                lse = names("merged_lse", made("sub.Tensor", rows))
            if tokens != ("s",):
                lse = local("merged_lse", made(CAT, query.shape[:3]))
                out = made(CAT, query.shape)
        local("merged_lse", lse)
        local("merged_out", out)


class _Names:
    """The locals of a backward function: what no name is bound to any more is freed."""

    def __init__(self, engine: Autograd) -> None:
        self._engine = engine
        self._bound: dict[str, Tensor] = {}

    def held(self, name: str) -> Tensor:
        return self._bound[name]

    def __call__(self, tensor: Tensor, *names: str) -> Tensor:
        """Bind all of `names` to `tensor`, one after the other."""
        for name in names:
            old = self._bound.get(name)
            self._bound[name] = tensor
            if old is not None and all(each is not old for each in self._bound.values()):
                self._engine.free(old)
        return tensor


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """`_templated_ring_attention_backward`: gradients of keys and values go round in fp32, always by all-to-all."""
    query, key, value, *_ = op.inputs
    ranks, rank, chunk = op.attributes["ranks"], op.attributes["rank"], op.attributes["half"]
    pair: Shape = ((2,), *key.shape)
    names = _Names(engine)
    for name, x in (("grad_query", query), ("grad_key", key), ("grad_value", value)):
        names(engine.fresh("zeros_like.default", x.shape, FP32), name)
    for bound, x in ((("key", "k"), key), (("value", "v"), value)):
        if not x.contiguous:
            names(engine.fresh("clone.default", x.shape, x.dtype), *bound)
    buffer: Tensor | None = None
    for step in range(ranks):
        here = buffer
        if here is not None:
            names(here, "buffer", "key", "value")
        if step < ranks - 1:
            names(engine.fresh(CAT, pair, key.dtype), "next_kv")
            buffer = _rotated(engine, names, op, pair, here)
        if step > rank and any(query.shape[:2]):  # of a single row it is a view
            names(engine.fresh("clone.default", (*query.shape[:2], chunk), FP32), "lse")
        if here is not None:
            names(here, "k", "v")
        _attend_back(engine, names, op, step)
        _pass_on(engine, names, op, step, pair)
        if step > rank:
            names(engine.fresh(CAT, query.shape, FP32), "grad_query")
    memory = query.memory if rank == ranks - 1 else flat(query.shape)
    for_query = names(engine.fresh("_to_copy.default", query.shape, query.dtype, memory), "grad_query")
    for_pair = names(engine.fresh("_to_copy.default", pair, key.dtype), "next_grad_kv", "grad_key", "grad_value")
    views = [engine.view(for_pair, x.shape, flat(x.shape)) for x in (key, value)]
    return [for_query, *views, *([None] * (len(op.inputs) - 3))]


def _rotated(engine: Autograd, names: _Names, op: Op, pair: Shape, held: Tensor | None) -> Tensor:
    """What the rotater of keys and values holds: those of the next step, or of all ranks from the first step on."""
    dtype: DType = op.inputs[1].dtype
    if op.attributes["exchanges"]:
        return names(engine.fresh(EXCHANGE, pair, dtype), "rotated")
    return held or names(engine.fresh(GATHER, ((AXIS,), *pair), dtype), "rotated")


def _attend_back(engine: Autograd, names: _Names, op: Op, step: int) -> None:
    """The kernel's backward: its results replace those of the step before."""
    query, key, value, *_ = op.inputs
    whole: Axis = ("s",)
    chunk: Axis = op.attributes["half"]
    queries = chunk if step > op.attributes["rank"] else whole
    keys = chunk if 0 < step <= op.attributes["rank"] else whole
    shapes = [(query, queries), (key, keys), (value, keys)]
    results = [engine.prepare("attention_backward", _tokens(x, tokens), x.dtype) for x, tokens in shapes]
    expanded = _tokens(query, keys)
    workspace = flash_workspace(
        engine, query, query.shape[1], key.shape[1], batch=query.shape[0], queries=queries, expanded=expanded
    )
    engine.kernel("_scaled_dot_product_flash_attention_backward", results)
    engine.free(*workspace)
    for tensor, name in zip(results, ("grad_query_", "grad_key_", "grad_value_"), strict=True):
        names(tensor, name)


def _pass_on(engine: Autograd, names: _Names, op: Op, step: int, pair: Shape) -> None:
    """Add the step's gradients of keys and values to those received, and send them on."""
    key = op.inputs[1]
    if step:
        names(names.held("sent"), "next_grad_kv", "grad_key", "grad_value")
        if step <= op.attributes["rank"]:
            for name in ("grad_key", "grad_value"):
                names(engine.fresh(CAT, key.shape, FP32), name)
    strided = step == 0 and not key.contiguous
    rows = [engine.fresh("flatten.using_ints", key.shape, FP32) for _ in range(2 * strided)]
    joined = engine.fresh(CAT, pair, FP32)
    engine.free(*rows)
    names(joined, "next_grad_kv")
    names(engine.fresh(EXCHANGE, pair, FP32), "sent")

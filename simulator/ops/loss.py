"""Cross-entropy as torch runs it: log-softmax over the vocabulary, then negative log-likelihood."""

from __future__ import annotations

from hardware.dtypes import BOOL, FP32, DType
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.collective import REDUCE
from simulator.ops.elementwise import constant, to, unary
from simulator.ops.embedding import vocabulary_mask
from simulator.trace import Trace

Gradients = list[Tensor | None]


def log_softmax(t: Trace, logits: Tensor) -> Tensor:
    """``torch.log_softmax``: saves its output.

    Cross-entropy asks for it in the dtype of the logits, which autocast leaves alone
    (torch aten/src/ATen/native/LossNLL.cpp `cross_entropy_loss`, autocast_mode.h `CastPolicy::fp32_set_opt_dtype`).
    """
    return unary(t, "_log_softmax.default", logits, ("_log_softmax_backward_data.default",), saves="output")


def nll_loss(t: Trace, log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """``torch.nn.functional.nll_loss``, mean over the targets: its gradient is as big as the log-probabilities.

    Autocast runs it in fp32.
    """
    if t.regime.autocast:
        log_probabilities = to(t, log_probabilities, FP32)
    loss = t.fresh("nll_loss_forward.default", (), log_probabilities.dtype)
    weight = t.fresh("nll_loss_forward.total_weight", (), log_probabilities.dtype)
    saves = [log_probabilities, targets, weight]
    inputs = [log_probabilities, targets]
    t.emit("nll_loss_forward.default", inputs, [loss, weight], saves=saves, backward=_nll_loss_backward)
    return loss


def parallel_cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy on logits sharded along the vocabulary: ranks exchange maxima, sums and the targets' scores.

    Source: torch/distributed/tensor/parallel/loss.py `_log_softmax`, `_nll_loss_forward`.
    """
    return _sharded_nll_loss(t, _sharded_log_softmax(t, logits), targets)


def _sharded_log_softmax(t: Trace, x: Tensor) -> Tensor:
    rows = x.shape[:-1]
    with t.call("") as local:
        with t.call("") as inner:
            inner("amax", constant(t, "amax.default", x, shape=rows))
            maxima = local("x_max", constant(t, REDUCE, x, shape=rows))
        shifted = local("shifted", constant(t, "sub.Tensor", x))
        with t.call("") as inner:
            with t.call("") as power:
                power("exp", constant(t, "exp.default", shifted))
                sums = inner("sum", constant(t, "sum.dim_IntList", shifted, shape=rows))
            local("sumexp", constant(t, REDUCE, sums))
        local("log", constant(t, "log.default", maxima))
        out = t.fresh("sub.Tensor", x.shape, x.dtype)
        t.emit("sub.Tensor", [x, shifted], [out], saves=[out], backward=_passed_on)
        return out


def _passed_on(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The gradient of the loss has gone through the log-softmax already."""
    return [gradients[0], None]


def _sharded_nll_loss(t: Trace, x: Tensor, targets: Tensor) -> Tensor:
    rows = x.shape[:-1]
    with t.call("") as local:
        local("safe_target", _where_counted(t, targets))
        with t.call("") as masked:
            local("safe_target_partial", vocabulary_mask(t, targets, masked))
            local("result_partial", constant(t, "gather.default", x, shape=rows))
        reduced = local("result_reduced", constant(t, REDUCE, x, shape=rows))
        with t.call("") as inner:
            inner("neg", constant(t, "neg.default", reduced))
            local("result", _where_counted(t, reduced))
        with t.call("") as inner:
            with t.call("") as counted:
                counted("ne", constant(t, "ne.Scalar", targets, dtype=BOOL))
                inner("sum", constant(t, "sum.default", targets, shape=()))
            weight = constant(t, "to.dtype", targets, dtype=x.dtype, shape=())
        with t.call("") as inner:
            inner("sum", constant(t, "sum.default", reduced, shape=()))
            loss = t.fresh("div.Tensor", (), x.dtype)
            t.emit("div.Tensor", [x, targets, weight], [loss], saves=[x, targets, weight], backward=_sharded_backward)
    return loss


def _where_counted(t: Trace, x: Tensor) -> Tensor:
    """``where(target != ignore_index, x, 0)``."""
    with t.call("") as local:
        local("ne", constant(t, "ne.Scalar", x, dtype=BOOL))
        return constant(t, "where.ScalarOther", x)


def _sharded_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """`_nll_loss_and_log_softmax_backward`: ``(grad_input + exp(x)) * grad_output`` with a one-hot grad_input."""
    x, targets, _ = op.inputs
    rows = x.shape[:-1]

    def small(name: str, dtype: DType, shape: Shape = rows) -> Tensor:
        return engine.fresh(name, shape, dtype)

    mean = small("div.Tensor", x.dtype, ())
    counted = small("ne.Scalar", BOOL)
    small("where.ScalarOther", targets.dtype)
    engine.free(counted)
    engine.like("zeros_like.default", x)
    bounds = [small(f"{name}.Scalar", BOOL) for name in ("lt", "ge")]
    small("__or__.Tensor", BOOL)
    engine.free(*bounds)
    copy = small("clone.default", targets.dtype)
    small("sub.Tensor", targets.dtype)
    engine.free(copy)
    update = small("to.dtype", x.dtype)
    small("sub.Tensor", x.dtype)
    engine.free(update)
    small("arange.default", targets.dtype)
    counted = small("ne.Scalar", BOOL)
    small("where.ScalarOther", x.dtype)
    engine.free(counted, mean)
    power = engine.like("exp.default", x)
    total = engine.like("add.Tensor", x)
    engine.free(power)
    product = engine.like("mul.Tensor", x)
    engine.free(total)
    return [product, None, None]


def _nll_loss_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    return [engine.fresh("nll_loss_backward.default", x.shape, x.dtype), None]


def compiled_cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    """``F.cross_entropy(logits.float(), targets)`` as torch.compile fuses it: no fp32 copy of the logits is made.

    What is saved is that of torch/_inductor's usual partition: the logits as they came, and per row the maximum and
    the logarithm of the sum.
    """
    name = "compiled_cross_entropy"
    rows = logits.shape[:-1]
    loss = t.fresh(name, (), FP32)
    statistics = [t.fresh(f"{name}.{part}", rows, FP32) for part in ("amax", "log")]
    saves = [logits, targets, *statistics]
    t.emit(name, [logits, targets], [loss, *statistics], saves=saves, backward=_compiled_backward)
    return loss


def _compiled_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.like("compiled_cross_entropy_backward", op.inputs[0]), None]

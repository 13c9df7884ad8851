"""Float8 training of linear layers with dynamic scales (Micikevicius et al., arXiv:2209.05433), as torchao does it.

Source: torchao 0.18 float8/float8_linear.py `Float8Linear`, by `convert_to_float8_training` without compilation. The
linear layers of the model but the head are converted where both sides are multiples of 16; weights, gradients and
optimizer states keep their element types.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.ops.float8 import ALIGNMENT, ROWWISE, TENSORWISE
from simulator.plan import Plan
from strategies.options import choice, option

#: Families without an ``nn.Linear`` in their layers, or with a class of their own that conversion would replace.
_OTHER_LINEAR = ("falcon", "gpt2")


@attrs.frozen
class Float8:
    """Run linear layers on float8 copies of inputs, weights and gradients, made anew for each product."""

    recipe: str = option(TENSORWISE, choice(TENSORWISE, ROWWISE), "one scale per tensor, or one per row")
    name: str = attrs.field(default="float8", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with linear layers converted.

        Raises:
            UsageError: tokens that the kernels cannot multiply.
            UnsupportedError: models and frameworks whose linear layers are others.
        """
        model, training = plan.model, plan.training
        if model.family in _OTHER_LINEAR:
            raise UnsupportedError(f"{self.name}: the layers of {model.family} have no plain nn.Linear; leave it out")
        if training.implementation != "transformers":
            rule = "is modelled for implementation 'transformers' only"
            raise UnsupportedError(f"{self.name} {rule}, not {training.implementation!r}")
        tokens = training.micro_batch * training.seq_len
        if tokens % ALIGNMENT:
            rule = f"micro-batch x seq-len must be a multiple of {ALIGNMENT}"
            raise UsageError(f"'float8' needs whole blocks: {rule}, not {tokens}")
        line = f"float8 {self.recipe}: run eagerly, as torchao does without torch.compile, which would fuse its casts"
        return attrs.evolve(plan, float8=self.recipe, assumptions=(*plan.assumptions, line))

"""What ZeRO-3 keeps for its optimizer, and what a step makes of it, sub-group by sub-group.

Source: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage3.py (function named per method).
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import BOOL, FP16, FP32, FP64, DType
from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.roles import Role
from simulator.runtime import Job, buffer
from simulator.sizes import Dim, FlatSize, size_of
from strategies.deepspeed.coordinator import Weight


class Partitions:
    """Flat buffers over a rank's partitions, each weight padded to the ranks by itself."""

    def __init__(self, job: Job, weights: Sequence[Weight], sub_group_size: int, accumulates: DType) -> None:
        self.job = job
        self._dtype, self._accumulates = job.plan.training.weights, accumulates
        self._weights = list(weights)
        self._groups = self._sub_groups(sub_group_size)
        self._dims: list[Dim] = []
        self._masters = [
            self._flat(f"fp32 partition {i}", group, FP32, Role.MASTER_WEIGHT) for i, group in enumerate(self._groups)
        ]
        bindings = job.plan.dimensions.bindings
        for number, master in enumerate(self._masters):
            self._dims.append(job.plan.dimensions.bind(f"sub_group.{number}", master.size.elements(bindings)))
        self._gradients = self._flat("gradient partitions", self._weights, accumulates, Role.GRADIENT)
        self._norm = self._scalar("gradient norm", Role.BUFFER)
        self._held: list[Storage] = []
        self._stepped = False

    @property
    def resident(self) -> list[Storage]:
        """16-bit and fp32 partitions, and gradients; the flag that records overflows."""
        shards = self._flat("lp_param_buffer", self._weights, self._dtype, Role.PARAMETER)
        tracker = self._scalar("inf_or_nan_tracker", Role.BUFFER)
        tracker.persistent = True
        return [shards, *self._masters, self._gradients, tracker]

    def _sub_groups(self, elements: int) -> list[list[Weight]]:
        """`_create_fp16_sub_groups`: weights in order, until their partitions fill a group."""
        groups: list[list[Weight]] = [[]]
        filled = 0
        for weight in self._weights:
            groups[-1].append(weight)
            filled += self._share(weight)
            if filled >= elements:
                groups.append([])
                filled = 0
        return [group for group in groups if group]

    def _share(self, weight: Weight) -> int:
        return -(-weight.elements // self.job.plan.mesh.dp_shard)

    def _flat(self, label: str, weights: Sequence[Weight], dtype: DType, role: Role) -> Storage:
        """`_create_fp16_partitions_with_defragmentation`: a flat buffer over the partitions of `weights`."""
        made = buffer(label, self._size(weights, dtype), dtype, role)
        made.persistent = True
        return made

    @staticmethod
    def _size(weights: Sequence[Weight], dtype: DType) -> FlatSize:
        members = tuple((1, weight.dims) for weight in weights)
        return FlatSize(members, dtype.bits, member_multiple="dp_shard", shards=("dp_shard",))

    @staticmethod
    def _scalar(label: str, role: Role = Role.OPTIMIZER) -> Storage:
        return buffer(label, size_of((), FP64.bits), FP64, role)

    # the step ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[Parameter]:
        """One flat parameter per sub-group."""
        return [
            Parameter(master, self._gradient(number), ((dim,),), group=number)
            for number, (master, dim) in enumerate(zip(self._masters, self._dims, strict=True))
        ]

    def _gradient(self, number: int) -> Storage:
        """fp32 gradients of a sub-group; of one weight with such gradients they are its partition itself."""
        if self._accumulates == FP32 and len(self._groups[number]) == 1:
            return self._gradients
        size = size_of((self._dims[number],), FP32.bits)
        return buffer(f"fp32 gradient {number}", size, FP32, Role.GRADIENT)

    def begin(self, step: OptimizerStep) -> None:
        """`has_overflow` with fp16, then the norm: of each sub-group a scalar stays until the step returns."""
        if self._dtype == FP16:
            for check in ("isinf", "isnan"):
                found = buffer(check, self._size(self._weights, BOOL), BOOL, Role.OPTIMIZER)
                step.allocate(check, found)
                step.free([found])
        self._held = [self._group_norm(step, number) for number in range(len(self._groups))]
        self._held.append(self._scalar("scaled_global_grad_norm"))
        step.allocate("where", self._held[-1])
        self._keep_norm(step)

    def _group_norm(self, step: OptimizerStep, number: int) -> Storage:
        """`get_grad_norm_direct`: each gradient in fp64 by turns; their norms live until the group's is there."""
        norms = []
        for index, weight in enumerate(self._groups[number]):
            cast = buffer(f"norm.{number}.{index}.cast", self._size([weight], FP64), FP64, Role.OPTIMIZER)
            norms.append(self._scalar(f"norm.{number}.{index}"))
            step.allocate("_to_copy", cast)
            step.allocate("linalg_vector_norm", norms[-1])
            step.free([cast])
        for kernel in ("stack", "pow"):
            listed = buffer(f"norms.{kernel}", size_of((len(norms),), FP64.bits), FP64, Role.OPTIMIZER)
            step.allocate(kernel, listed)
            step.free([listed])
        for name in ("sum", "pow", "isinf", "isnan", "logical_or", "err"):
            norms.append(self._scalar(f"norm.{number}.{name}"))
            step.allocate(name, norms[-1])
        result = self._scalar(f"norm.{number}")
        step.allocate("where", result)
        step.free(norms)
        return result

    def _keep_norm(self, step: OptimizerStep) -> None:
        """`_global_grad_norm`: the engine holds the last until the step returns (engine.py `_take_model_step`)."""
        norm = self._norm if not self._stepped else self._scalar("gradient norm (new)", Role.BUFFER)
        step.allocate("div", norm)
        if self._stepped:
            self._held.append(norm)
        self._stepped = True

    def prepare(self, step: OptimizerStep) -> None:
        """`_prepare_fp32_grad_for_sub_group`: flattened, then cast."""
        (parameter,) = step.parameters
        group = self._groups[parameter.group]
        if parameter.gradient.persistent:
            return
        if self._accumulates == FP32:
            step.allocate("cat", parameter.gradient)
            return
        flat = [] if len(group) == 1 else [self._copy(group)]
        for copy in flat:
            step.allocate("cat", copy)
        step.allocate("_to_copy", parameter.gradient)
        step.free(flat)

    def _copy(self, group: Sequence[Weight]) -> Storage:
        return buffer("flat gradient", self._size(group, self._accumulates), self._accumulates, Role.GRADIENT)

    @staticmethod
    def release(step: OptimizerStep) -> None:
        """`_release_sub_group`."""
        step.free([parameter.gradient for parameter in step.parameters if not parameter.gradient.persistent])

    def end(self, step: OptimizerStep) -> None:
        """The step returns: its norms go."""
        step.free(self._held)
        self._held = []

"""One definition of a size, three number systems."""

from __future__ import annotations

import numpy as np
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.fold import Folder
from simulator.lowering import lower
from simulator.plan import make_plan
from simulator.sizes import Dimensions, FlatSize, JoinedSize, maximum, minimum, product, round_up, size_of, symbol
from tests.strategies import model_specs, trainings, uniform_llama

NAMES = ("b", "s", "h")
dims = st.lists(st.sampled_from(NAMES) | st.integers(1, 9), max_size=5).map(tuple)
widths = st.sampled_from([1, 4, 8, 16, 32, 64])
values = st.lists(st.tuples(*[st.integers(1, 2**12 - 1)] * 3), min_size=1, max_size=5)


@given(dims, widths, values)
def test_ints_arrays_and_symbols_agree(dims, bits, points):
    size = size_of(dims, bits)
    columns = dict(zip(NAMES, np.array(points, dtype=np.int64).T, strict=True))
    array = np.broadcast_to(size.allocated(columns), len(points))
    formula = size.allocated({name: symbol(name) for name in NAMES})
    for index, point in enumerate(points):
        bindings = dict(zip(NAMES, point, strict=True))
        exact = size.allocated(bindings)
        assert exact == array[index]
        assert exact == sympy.sympify(formula).subs({symbol(n): v for n, v in bindings.items()})


@given(dims, widths, values)
def test_rounding(dims, bits, points):
    """Allocated bytes are the exact ones rounded up to 512, and those the bits rounded up to bytes."""
    bindings = dict(zip(NAMES, points[0], strict=True))
    size = size_of(dims, bits)
    assert 0 <= 8 * size.nbytes(bindings) - bits * size.elements(bindings) < 8
    assert 0 <= size.allocated(bindings) - size.nbytes(bindings) < 512
    assert size.allocated(bindings) % 512 == 0


members = st.lists(st.tuples(st.integers(1, 5), dims), min_size=1, max_size=4).map(tuple)
flat_sizes = st.builds(
    FlatSize,
    members,
    st.just(16),
    st.sampled_from((1, 8, 64)),
    st.booleans(),
    st.sampled_from(((), ("d",), ("d", 3), (128,))),
    st.sampled_from(((), ("d",))),
)


@given(st.lists(flat_sizes, min_size=1, max_size=3).map(tuple), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_flat_buffers_in_three_systems(parts, shards):
    """A buffer's bytes are the same from ints, arrays and symbols; joined ones have the elements of all."""
    fixed = {"b": 2, "s": 3, "h": 5}
    joined = JoinedSize(parts)
    array = np.broadcast_to(joined.allocated({**fixed, "d": np.array(shards)}), len(shards))
    formula = sympy.sympify(joined.allocated({**fixed, "d": symbol("d")}))
    for index, degree in enumerate(shards):
        bindings = {**fixed, "d": degree}
        assert joined.elements(bindings) == sum(part.elements(bindings) for part in parts)
        assert joined.allocated(bindings) == array[index] == formula.subs({symbol("d"): degree})


@given(flat_sizes, st.integers(1, 40))
def test_flat_buffers_as_frameworks_lay_them_out(size, degree):
    """Weight after weight at aligned starts (and, where asked, an aligned end), the whole padded and divided."""
    bindings = {"b": 2, "s": 3, "h": 5, "d": degree}
    end = 0
    for count, own in size.members:
        for _ in range(count):
            end = round_up(end, size.member_multiple) + product(own, bindings)
    if size.last_padded:
        end = round_up(end, size.member_multiple)
    end = round_up(end, product(size.total_multiple, bindings))
    assert size.elements(bindings) == -(-end // product(size.shards, bindings))


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_min_max_and_round_up_in_three_systems(value, other):
    x, y = sympy.Integer(value), np.array([value])
    for function in (minimum, maximum, round_up):
        assert function(value, other) == function(x, sympy.Integer(other)) == function(y, np.array([other]))[0]


def test_order_of_dimensions_does_not_matter():
    assert size_of(("s", "b", 2, "h", 3), 16) == size_of((6, "h", "b", "s"), 16)


def test_unlike_layers_get_names_of_their_own():
    table = Dimensions()
    assert [table.bind("f", 8), table.bind("f", 16), table.bind("f", 8)] == ["f", "f.2", "f"]
    assert table.bindings == {"f": 8, "f.2": 16}


def test_a_folded_program_prices_ints_arrays_and_symbols():
    """The folded steady step of one plan, evaluated for a batch sweep and as a formula, equals single estimates."""
    training = Training(micro_batch=2, seq_len=32)  # a batch of one is laid out differently: a graph of its own
    plan = make_plan(uniform_llama(layers=5), training)
    program, folder = lower(plan), Folder()
    for node in (program.load, program.cold):
        folder.fold(node)
    steady = folder.fold(program.steady)
    start = folder.fold(program.load).net + folder.fold(program.cold).net
    steady = steady.after(start)
    batches = np.arange(2, 9)
    swept = steady.bytes(steady.prices({**plan.dimensions.bindings, "b": batches})).max(axis=0)
    formulas = steady.bytes(steady.prices({**plan.dimensions.bindings, "b": symbol("b")}))
    for index, batch in enumerate(batches.tolist()):
        single = simulate(uniform_llama(layers=5), Training(micro_batch=batch, seq_len=32)).steady.nbytes
        assert swept[index] == single
        assert max(int(sympy.sympify(f).subs({symbol("b"): batch})) for f in formulas) == single


@settings(max_examples=30)
@given(model_specs(max_layers=4), trainings())
def test_dimensions_bind_every_size(model, training):
    """Every storage of every plan can be priced: no name is left unbound."""
    try:
        plan = make_plan(model, training)
        edges = plan.graph.edges
    except UnsupportedError:
        return
    for node in edges:
        if hasattr(node, "size"):
            assert node.size.nbytes(plan.dimensions.bindings) >= 0

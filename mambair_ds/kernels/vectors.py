"""Sixteen float32 numbers as one value in functions that numba compiles.

Where a loop is short, runs over several arrays, or should keep its numbers in registers, the compiler does not make
vectors of its own accord. Written with these it has no choice: `load` sixteen numbers, compute, `store` them. Between
two vectors, or a vector and a float32, +, -, * and / work as on numbers, and a product is fused with the sum that it
goes into; so do min and max of two values, where a left side that is not a number stays.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16
_FLAGS = ("contract", "nsz")
_INTEGER = ir.IntType(32)
_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INTEGER, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(f"float32x{LANES}")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _FLOATS)


def _spread(builder, value):
    """A number as a vector; a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _INTEGER(0))
    return _shuffle(builder, one, one, [0] * LANES)


def _shuffle(builder, a, b, lanes):
    """Numbers of two vectors by their places; those of the second are counted from `LANES`."""
    return builder.shuffle_vector(a, b, ir.Constant(_INTEGERS, lanes))


def _define(function: Callable[..., Any], build: Callable[..., Any]) -> None:
    """`function` of two vectors, or of one and a float32."""

    @type_callable(function)
    def _type(_context):
        def typer(a, b):
            return _vector if {a, b} in ({_vector}, {_vector, types.float32}) else None

        return typer

    def lower(_context, builder, _signature, arguments):
        return build(builder, *(_spread(builder, value) for value in arguments))

    for kinds in ((_vector, _vector), (_vector, types.float32), (types.float32, _vector)):
        lower_builtin(function, *kinds)(lower)


def _add(builder, a, b):
    return builder.fadd(a, b, flags=_FLAGS)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


_define(operator.add, _add)
_define(operator.iadd, _add)
_define(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=_FLAGS))
_define(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=_FLAGS))
_define(operator.truediv, lambda builder, a, b: builder.fdiv(a, b, flags=_FLAGS))
_define(max, _larger)
_define(min, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", b, a), b, a))


def _pointer(context, builder, signature, array, index):
    kind, index_kind = signature.args[:2]
    place = context.make_array(kind)(context, builder, array)
    several = isinstance(index_kind, types.BaseTuple)
    index = cgutils.unpack_tuple(builder, index) if several else [index]
    kinds = index_kind.types if several else [index_kind]
    index = [context.cast(builder, i, each, types.intp) for i, each in zip(index, kinds, strict=True)]
    pointer = cgutils.get_item_pointer(context, builder, kind, place, index, wraparound=False, boundscheck=False)
    return builder.bitcast(pointer, _FLOATS.as_pointer())


@intrinsic
def load(_context, array, index):
    """Sixteen numbers of a float32 array, one behind the other in memory, from `index` (an integer or several) on.

    Nothing checks that they exist.
    """

    def build(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, signature, *arguments), align=4)

    return _vector(array, index), build


@intrinsic
def store(_context, array, index, value):
    """Write a vector to where `load` reads it."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(context, builder, signature, *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), build


@intrinsic
def prefetch(_context, array, index):
    """Ask for what `load` will read there before long."""

    def build(context, builder, signature, arguments):
        place = builder.bitcast(_pointer(context, builder, signature, *arguments), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INTEGER, _INTEGER, _INTEGER])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, _INTEGER(0), _INTEGER(3), _INTEGER(1)])  # to read, to the first cache, data
        return context.get_dummy_value()

    return types.void(array, index), build


@intrinsic
def spread(_context, value):
    """A vector with the same number in all places."""
    return _vector(types.float32), lambda _context, builder, _signature, arguments: _spread(builder, *arguments)


def _reduce(combine: Callable[..., Any]) -> Callable[..., Any]:
    """One number of a vector's sixteen: each half with the other, until one is left."""

    def build(_context, builder, _signature, arguments):
        (value,) = arguments
        for half in (8, 4, 2, 1):
            value = combine(builder, value, _shuffle(builder, value, value, [i ^ half for i in range(LANES)]))
        return builder.extract_element(value, _INTEGER(0))

    return build


@intrinsic
def total(_context, value):
    """The sum of a vector's numbers, in a fixed order."""
    return types.float32(value), _reduce(_add)


@intrinsic
def largest(_context, value):
    """The largest of a vector's numbers."""
    return types.float32(value), _reduce(_larger)


@intrinsic
def totals(_context, array, row):
    """The sums of sixteen rows of an array (…, 16) from `row` on, as a vector, each in a fixed order.

    Two vectors become one that holds half of a sum of each, and so on: 45 instructions instead of 144.
    """

    def build(context, builder, signature, arguments):
        first, signature = arguments[1], types.void(array, types.UniTuple(row, 2))
        vectors = []
        for i in range(LANES):
            index = cgutils.pack_array(builder, [builder.add(first, first.type(i)), first.type(0)])
            vectors.append(builder.load(_pointer(context, builder, signature, arguments[0], index), align=4))
        for half in (8, 4, 2, 1):  # places with this bit are the second vector's from now on
            kept = [i + LANES * bool(i & half) for i in range(LANES)]
            moved = [(i ^ half) + LANES * bool(i & half) for i in range(LANES)]
            pairs = zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True)
            vectors = [_add(builder, _shuffle(builder, a, b, kept), _shuffle(builder, a, b, moved)) for a, b in pairs]
        return vectors[0]

    return _vector(array, row), build


@intrinsic
def power_of_two(_context, shifted):
    """2^k, of a number or a vector, from k + 1.5 * 2^23, a float32 in whose lowest bits k stands."""

    def build(_context, builder, _signature, arguments):
        (value,) = arguments
        vector = isinstance(value.type, ir.VectorType)
        bits = builder.bitcast(value, _INTEGERS if vector else _INTEGER)
        places, one = (ir.Constant(bits.type, [n] * LANES if vector else n) for n in (23, 127 << 23))
        return builder.bitcast(builder.add(builder.shl(bits, places), one), value.type)

    return shifted(shifted), build

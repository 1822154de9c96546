"""The axis algebra against numpy: whatever it equates, splits or selects must be what reshapes, concatenations and index arrays do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune import axes as ax
from graphprune.axes import Axis, Factor
from graphprune.errors import NotPrunable, Reason

WHY = NotPrunable(Reason.OUTPUT, "output")
quick = settings(max_examples=150, deadline=None)


def axis(*sizes: int) -> Axis:
    return [Factor(n) for n in sizes]


def frozen(dim: Axis) -> list[bool]:
    return [leaf.frozen is not None for leaf in ax.leaves_of(dim)]


def sizes(dim: Axis) -> list[int]:
    return [leaf.size for leaf in ax.leaves_of(dim)]


# ---- unify: one case of each kind


def test_equal_sizes_are_not_equal_axes() -> None:
    a, b = axis(6), axis(6)
    assert ax.find(a[0]) is not ax.find(b[0])
    ax.unify(a, b, "n")
    assert ax.find(a[0]) is ax.find(b[0])


def test_a_reshape_refines() -> None:
    flat, grid = axis(12), axis(3, 4)
    ax.unify(flat, grid, "n")
    assert ax.normal(flat) == ax.normal(grid) and sizes(flat) == [3, 4]


def test_a_refinement_reaches_all_names_of_an_axis() -> None:
    a, b, grid = axis(12), axis(12), axis(3, 4)
    ax.unify(a, b, "n")
    ax.unify(b, grid, "n")
    assert ax.normal(a) == ax.normal(grid)


def test_common_refinement_of_two_products() -> None:
    left, right = axis(6, 4), axis(3, 8)
    ax.unify(left, right, "n")
    assert sizes(left) == sizes(right) == [3, 2, 4] and not any(frozen(left))


def test_without_common_refinement_only_the_block_is_frozen() -> None:
    left, right = axis(5, 6, 10, 7), axis(5, 4, 15, 7)
    ax.unify(left, right, "here")
    assert frozen(left) == [False, True, True, False]
    assert [leaf.frozen.node for leaf in ax.leaves_of(right) if leaf.frozen] == ["here", "here"]
    assert ax.find(left[0]) is ax.find(right[0]) and ax.find(left[3]) is ax.find(right[3])


def test_a_sum_is_split_where_the_other_is() -> None:
    x, y = [ax.sum_of([axis(3), axis(5)])], [ax.sum_of([axis(2), axis(6)])]
    ax.unify(x, y, "n")
    assert sizes(x) == sizes(y) == [2, 5] and ax.size(x) == 8  # the part of one position between them has no factor: it stays
    assert [row.tolist() for row in ax.index(x).values()] == [[[0], [1]], [[3], [4], [5], [6], [7]]]
    assert list(ax.leaves_of(x)) == list(ax.leaves_of(y))


def test_a_common_tail_is_drawn_out_of_a_sum() -> None:
    """Channel shuffle: (6 + 9) against 5 * 3."""
    parts, grid = [ax.sum_of([axis(6), axis(9)])], axis(5, 3)
    ax.unify(parts, grid, "n")
    assert not any(frozen(parts)) and sizes(parts) == [2, 3, 3]
    assert [rows.shape for rows in ax.index(parts).values()] == [(2, 3), (3, 3), (3, 5)]
    assert list(ax.leaves_of(parts)) == list(ax.leaves_of(grid))


def test_a_sum_whose_parts_do_not_divide_is_frozen() -> None:
    parts, grid = [ax.sum_of([axis(4), axis(11)])], axis(5, 3)
    ax.unify(parts, grid, "n")
    assert all(frozen(parts)) and all(frozen(grid))


def test_size_one_is_the_empty_list() -> None:
    assert ax.normal(axis(1, 1)) == [] and sizes(axis(1, 5, 1)) == [5]
    x, y = axis(1, 6), axis(6, 1)
    ax.unify(x, y, "n")
    assert ax.normal(x) == ax.normal(y)


def test_sizes_must_agree() -> None:
    with pytest.raises(AssertionError, match="between sizes 6 and 5 at n"):
        ax.unify(axis(6), axis(5), "n")


# ---- what is known of a factor goes where it goes


def test_freezing_reaches_parts_and_other_names() -> None:
    a, b, grid = axis(12), axis(12), axis(3, 4)
    ax.unify(a, b, "n")
    ax.freeze(a, WHY)
    ax.unify(b, grid, "n")
    assert all(frozen(grid))


def test_a_leaf_inside_a_frozen_axis_stays_frozen_when_it_joins_a_free_one() -> None:
    a, b = axis(6), axis(6)
    ax.freeze(a, WHY)
    ax.unify(a, b, "n")
    assert frozen(b) == [True] and next(ax.leaves_of(b)).frozen is WHY


def test_the_first_reason_and_the_first_mark_are_kept() -> None:
    a = axis(6)
    ax.freeze(a, WHY)
    ax.freeze(a, NotPrunable(Reason.FIXED, "later"))
    ax.mark(a, "head", "first")
    ax.mark(a, "head", "second")
    assert a[0].frozen is WHY and a[0].marks == {"head": "first"}


def test_marks_are_copied_on_refinement_and_pushed_on_merge() -> None:
    a, grid, b = axis(12), axis(3, 4), axis(12)
    ax.mark(a, "conv", "n")
    ax.unify(a, grid, "n")
    ax.mark(b, "renorm", "m")
    ax.unify(b, grid, "n")
    assert all(set(leaf.marks) == {"conv", "renorm"} for leaf in ax.leaves_of(grid))


# ---- against numpy


def factors(draw: st.DrawFn, n: int) -> list[int]:
    """A random factorisation of n."""
    out = []
    while n > 1:
        f = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        out.append(f)
        n //= f
    return out


@st.composite
def trees(draw: st.DrawFn, n: int, depth: int = 2) -> tuple[Axis, list[tuple[Factor, np.ndarray]]]:
    """A random axis of n positions, and for each leaf the positions of its units: built by numpy alone."""
    leaves: list[tuple[Factor, np.ndarray]] = []

    def build(n: int, at: np.ndarray, depth: int) -> Axis:
        out: Axis = []
        shape = factors(draw, n)
        grid = at.reshape(*shape, at.shape[1])
        for i, f in enumerate(shape):
            rows = np.moveaxis(grid, i, 0).reshape(f, -1)
            if depth and f > 1 and draw(st.booleans()):
                cut = draw(st.integers(1, f - 1))
                out.append(ax.sum_of([build(cut, rows[:cut], depth - 1), build(f - cut, rows[cut:], depth - 1)]))
            else:
                out.append(Factor(f))
                leaves.append((out[-1], rows))
        return out

    return build(n, np.arange(n)[:, None], depth), leaves


SIZES = st.sampled_from([1, 2, 6, 12, 30, 36, 48])


@quick
@given(st.data())
def test_index_is_what_numpy_reshapes_say(data: st.DataObject) -> None:
    dim, leaves = data.draw(SIZES.flatmap(trees))
    found = ax.index(dim)
    assert {id(leaf) for leaf in found} == {id(leaf) for leaf, _ in leaves}
    for leaf, rows in leaves:
        np.testing.assert_array_equal(found[leaf], np.sort(rows, axis=1))


@quick
@given(st.data())
def test_mask_keeps_the_positions_of_kept_units(data: st.DataObject) -> None:
    dim, leaves = data.draw(SIZES.flatmap(trees))
    kept = {
        leaf: np.array(data.draw(st.lists(st.booleans(), min_size=leaf.size, max_size=leaf.size)))
        for leaf, _ in leaves
        if data.draw(st.booleans())
    }
    expected = np.ones(ax.size(dim), bool)
    for leaf, rows in leaves:
        if leaf in kept:
            expected[rows[~kept[leaf]].ravel()] = False
    mask = ax.mask(dim, kept)
    assert (mask is None) == (not kept)
    if mask is not None:
        np.testing.assert_array_equal(mask, expected)


@quick
@given(st.data())
def test_a_unified_pair_is_one_axis_or_is_frozen(data: st.DataObject) -> None:
    """Units of a leaf that is still free have the same positions on both sides, and no leaf is free on one side only."""
    n = data.draw(SIZES)
    (x, _), (y, _) = data.draw(trees(n)), data.draw(trees(n))
    ax.unify(x, y, "n")
    left, right = ax.index(x), ax.index(y)
    free_left = {leaf for leaf in left if leaf.frozen is None}
    free_right = {leaf for leaf in right if leaf.frozen is None}
    assert free_left == free_right
    for leaf in free_left:
        np.testing.assert_array_equal(left[leaf], right[leaf])


@quick
@given(st.data())
def test_removing_a_unit_survives_a_chain_of_reshapes(data: st.DataObject) -> None:
    """Reshapes and transpositions of an array of numbers: what the last shape loses is what the first shape loses."""
    n = data.draw(st.sampled_from([12, 24, 36, 60]))
    shape = factors(data.draw, n)
    dims: list[Axis] = [[Factor(f)] for f in shape]
    first, first_shape = [list(d) for d in dims], list(shape)
    array = np.arange(n).reshape(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(dims))))
            dims, array = [dims[i] for i in order], array.transpose(order)
        else:
            shape = factors(data.draw, n)
            new: list[Axis] = [[Factor(f)] for f in shape]
            ax.unify([f for d in dims for f in d], [f for d in new for f in d], "reshape")
            dims, array = new, array.reshape(shape)
    leaves = dict.fromkeys(leaf for d in dims for leaf in ax.leaves_of(d) if leaf.frozen is None)
    for leaf in leaves:
        stays = np.ones(leaf.size, bool)
        stays[data.draw(st.integers(0, leaf.size - 1))] = False
        source = np.arange(n).reshape(first_shape)
        for i, d in enumerate(first):
            mask = ax.mask(d, {leaf: stays})
            source = source if mask is None else source.compress(mask, axis=i)
        result = array
        for i, d in enumerate(dims):
            mask = ax.mask(d, {leaf: stays})
            result = result if mask is None else result.compress(mask, axis=i)
        assert sorted(source.ravel()) == sorted(result.ravel())


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_concatenated_parts_are_found_again_by_slices(lengths: list[int], data: st.DataObject) -> None:
    """cat, then cut elsewhere: every free unit has one position before and after."""
    parts = [axis(n) if n > 1 else [] for n in lengths]
    joined = [ax.sum_of(parts)] if len(lengths) > 1 else parts[0]
    total = sum(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
    bounds = [0, *cuts, total]
    slices = [axis(b - a) if b - a > 1 else [] for a, b in pairwise(bounds)]
    target = [ax.sum_of(slices)] if len(slices) > 1 else slices[0]
    ax.unify(joined, target, "n")
    assert not any(frozen(joined))
    for (a, b), piece in zip(pairwise(bounds), slices):
        inside = {leaf: rows + a for leaf, rows in ax.index(piece).items()}
        whole = ax.index(joined)
        for leaf, rows in inside.items():
            np.testing.assert_array_equal(whole[leaf], rows)
            assert rows.max() < b


@quick
@given(st.data())
def test_unify_ends_and_the_order_of_equations_does_not_invent_units(data: st.DataObject) -> None:
    """Random equations between axes of one size: the algebra stops, and every equation holds or is frozen."""
    n = data.draw(st.sampled_from([12, 24, 60]))
    pool = [data.draw(trees(n))[0] for _ in range(4)]
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6))
    for i, j in pairs:
        ax.unify(pool[i], pool[j], "n")
    for i, j in pairs:
        left, right = ax.index(pool[i]), ax.index(pool[j])
        free = {leaf for leaf in (*left, *right) if leaf.frozen is None}
        for leaf in free:
            np.testing.assert_array_equal(left[leaf], right[leaf])

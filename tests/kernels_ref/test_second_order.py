import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import (
    PerAxis,
    PerBlock,
    Term,
    half_range,
    merge_digits,
    realize,
    round_second_order,
    series_scales,
    spread,
)
from onnxq.kernels_ref.digit import wide_half_range
from onnxq.kernels_ref.offset import offset_range, spanned_offset, spanning_scales

KINDS = ("fixed_ratio", "digit", "joint")


def granularity_of(block_size):
    return PerAxis(0) if block_size is None else PerBlock(1, block_size)


def scales_of(kind, w, bits, terms, block_size=None):
    return series_scales(kind, w, bits=bits, terms=terms, granularity=granularity_of(block_size))


def total(terms, scales, block_size=None):
    shape = terms[0].shape
    parts = zip(terms, scales, strict=True)
    return sum(q * spread(s, shape, granularity_of(block_size)) for q, s in parts)


def squared(error, h):
    return np.einsum("oi,ij,oj->o", error, h, error)


def correlated(rng, inputs, rank=None, rows=None):
    """Second moments of inputs that are mixtures of `rank` sources."""
    rank = rank or inputs
    sources = rng.standard_normal((rows or 4 * inputs, rank)) + 0.5
    x = sources @ rng.standard_normal((rank, inputs))
    return x.T @ x


def gptq(target, scales, h, *, kind, bits, block_size, damping, act_order):
    """The algorithm as published: inverse Hessian, its Cholesky factor, one column at a time."""
    w, inputs = target.copy(), target.shape[1]
    diagonal = np.diag(h)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(inputs)
    damped = h + damping * diagonal.mean() * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    q = [np.zeros(target.shape, dtype=np.int8) for _ in scales]
    for i, column in enumerate(order):
        at = [s if block_size is None else s[:, column // block_size] for s in scales]
        piece = w[:, [column]]
        series = realize(kind, piece, at, bits=bits, granularity=PerAxis(0))
        for target_q, term in zip(q, series.terms, strict=True):
            target_q[:, column] = term.q[:, 0]
        error = (piece - series.dequantize())[:, 0] / upper[i, i]
        w[:, order[i + 1 :]] -= np.outer(error, upper[i, i + 1 :])
    return q


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize(("kind", "bits", "terms"), [(k, 3, 2) for k in KINDS] + [("joint", 4, 1)])
def test_is_the_published_algorithm(kind, bits, terms, block_size, act_order):
    rng = np.random.default_rng(0)
    w, h = rng.standard_normal((12, 150)), correlated(rng, 150)
    scales = scales_of(kind, w, bits, terms, block_size)
    options = {"kind": kind, "bits": bits, "block_size": block_size, "act_order": act_order}
    found = round_second_order(w, scales, h, damping=0.01, **options)
    assert found.damping == 0.01
    assert found.fallback is None
    published = gptq(w, scales, h, damping=0.01, **options)
    plain = realize(kind, w, scales, bits=bits, granularity=granularity_of(block_size))
    before = squared(w - plain.dequantize(), h)
    better = squared(w - total(published, scales, block_size), h) < before
    assert better.sum() > 6
    assert found.plain_rows == (~better).sum()
    for got, wanted, old in zip(found.terms, published, plain.terms, strict=True):
        np.testing.assert_array_equal(got, np.where(better[:, np.newaxis], wanted, old.q))


def test_two_equal_inputs_share_their_error():
    # Both weights round to 0 alone, though together they are worth 0.8: one of them must be 1.
    w, h = np.array([[0.4, 0.4]]), np.ones((2, 2))
    found = round_second_order(w, [np.array([1.0])], h, bits=4, kind="fixed_ratio", damping=1e-9)
    assert sorted(found.terms[0][0]) == [0, 1]
    error = w - found.terms[0]
    assert squared(error, h)[0] == pytest.approx((0.8 - 1.0) ** 2)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    rank, rows = draw(st.integers(1, inputs)), draw(st.integers(1, 40))
    h = correlated(rng, inputs, rank, rows) * 10.0 ** draw(st.integers(-8, 8))
    if draw(st.booleans()):
        dead = rng.random(inputs) < 0.3
        h[dead], h[:, dead] = 0.0, 0.0
    return rng.standard_normal((out, inputs)), h


OPTIONS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "bits": st.integers(2, 5),
        "block_size": st.sampled_from([None, 3]),
        "damping": st.sampled_from([0.0, 1e-4, 0.01]),
        "act_order": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(problems(), OPTIONS, st.integers(1, 3))
def test_no_row_is_worse_than_rounded_plainly(problem, options, terms):
    w, h = problem
    kind, bits, block_size = options["kind"], options["bits"], options["block_size"]
    scales = scales_of(kind, w, bits, terms, block_size)
    found = round_second_order(w, scales, h, **options)
    plain = realize(kind, w, scales, bits=bits, granularity=granularity_of(block_size))
    for got in found.terms:
        assert got.dtype == np.int8
        assert got.shape == w.shape
        assert got.flags.c_contiguous
    after = squared(w - total(found.terms, scales, block_size), h)
    error = np.abs(w - plain.dequantize())
    before = squared(w - plain.dequantize(), h)
    # Two quadratic forms of this size, each rounded in at most 20 * 20 places.
    slack = 1000 * np.finfo(np.float64).eps * squared(error + 1e-9, np.abs(h))
    assert np.all(after <= before + slack)


@pytest.mark.parametrize(("bits", "terms"), [(3, 1), (4, 1), (3, 2)])
def test_the_full_range_is_that_of_an_offset_and_never_worse_than_nearest(bits, terms):
    rng = np.random.default_rng(0)
    w, h = rng.standard_normal((40, 12)) + 1.0, correlated(rng, 12, 12, 30)
    lowest, highest = offset_range(bits, terms)
    scales = spanning_scales(w, bits=bits, terms=terms)
    beta = spanned_offset(w, scales[-1], bits, terms)
    shifted = w - beta[:, None]
    found = round_second_order(shifted, scales, h, bits=bits, kind="digit", full_range=True)
    wide = sum(q.astype(int) << (bits * (terms - 1 - i)) for i, q in enumerate(found.terms))
    assert wide.min() == lowest and wide.max() == highest
    nearest = np.clip(np.rint(shifted / scales[-1][:, None]), lowest, highest)
    after = squared(shifted - wide * scales[-1][:, None], h)
    before = squared(shifted - nearest * scales[-1][:, None], h)
    assert np.all(after <= before * (1 + 1e-9))
    assert after.sum() < 0.9 * before.sum()


def test_correlated_inputs_gain_on_average():
    rng = np.random.default_rng(1)
    w, h = rng.standard_normal((64, 48)), correlated(rng, 48, rank=12, rows=400)
    h += 0.01 * np.trace(h) / 48 * np.eye(48)
    scales = scales_of("fixed_ratio", w, 4, 1)
    found = round_second_order(w, scales, h, bits=4, kind="fixed_ratio")
    plain = realize("fixed_ratio", w, scales, bits=4, granularity=PerAxis(0))
    ratio = squared(w - total(found.terms, scales), h) / squared(w - plain.dequantize(), h)
    # Three in four directions are quiet, and the error can be moved into them.
    assert ratio.mean() < 0.5


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_do_not_correlate_are_rounded_plainly(kind, block_size, act_order):
    rng = np.random.default_rng(2)
    w = rng.standard_normal((6, 70))
    scales = scales_of(kind, w, 3, 2, block_size)
    plain = realize(kind, w, scales, bits=3, granularity=granularity_of(block_size))
    for diagonal in (np.ones(70), rng.random(70) + 0.1):
        found = round_second_order(
            w, scales, np.diag(diagonal), bits=3, kind=kind, block_size=block_size,
            act_order=act_order,
        )  # fmt: skip
        for got, wanted in zip(found.terms, plain.terms, strict=True):
            np.testing.assert_array_equal(got, wanted.q)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_are_rounded_plainly(damping):
    rng = np.random.default_rng(3)
    w, h = rng.standard_normal((5, 30)), correlated(rng, 30)
    dead = np.arange(30) % 3 == 0
    h[dead], h[:, dead] = 0.0, 0.0
    scales = scales_of("fixed_ratio", w, 4, 1)
    found = round_second_order(w, scales, h, bits=4, kind="fixed_ratio", damping=damping)
    plain = realize("fixed_ratio", w, scales, bits=4, granularity=PerAxis(0)).terms[0].q
    np.testing.assert_array_equal(found.terms[0][:, dead], plain[:, dead])
    assert not np.array_equal(found.terms[0], plain)
    assert found.plain_rows < 5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sample_leaves_half_a_step_in_its_direction(sign):
    # x = (1, …, 1): only the sum of the errors counts, and the last column can mend all but s/2.
    # No weight comes near the largest level, so that none saturates.
    rng = np.random.default_rng(4)
    w = sign * rng.uniform(0.0, 5.0, (20, 100))
    h = np.ones((100, 100))
    found = round_second_order(
        w, [np.ones(20)], h, bits=5, kind="fixed_ratio", damping=1e-9, act_order=False
    )
    assert np.abs(found.terms[0]).max() < half_range(5)
    # The damping takes 1e-9 * 100 of the feedback, and the errors sum up to less than 100.
    assert np.all(np.abs((w - found.terms[0]).sum(axis=1)) <= 0.5 + 1e-5)


def test_digits_make_up_the_wide_integer():
    rng = np.random.default_rng(5)
    w, h = rng.standard_normal((8, 40)), correlated(rng, 40, rank=10)
    scales = scales_of("digit", w, 2, 3)
    found = round_second_order(w, scales, h, bits=2, kind="digit")
    assert found.plain_rows == 0
    parts = zip(found.terms, scales, strict=True)
    wide = merge_digits([Term(q, s, 0, 2, PerAxis(0)) for q, s in parts])
    assert np.abs(wide).max() <= wide_half_range(2, 3)
    fine = scales[-1][:, np.newaxis]
    np.testing.assert_allclose(wide * fine, total(found.terms, scales), rtol=1e-12)
    for i, digit in enumerate(found.terms):
        assert digit.min() >= (-2 if i else -1)
        assert digit.max() <= 1


@pytest.mark.parametrize(("groups", "rows", "inputs"), [(40, 1, 9), (3, 4, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_rounded_as_if_alone(kind, groups, rows, inputs):
    rng = np.random.default_rng(6)
    w = rng.standard_normal((groups * rows, inputs))
    h = np.stack([correlated(rng, inputs) for _ in range(groups)])
    h[1] = 0.0
    scales = scales_of(kind, w, 3, 2, 4)
    found = round_second_order(w, scales, h, bits=3, kind=kind, block_size=4)
    assert found.fallback is None
    for group in range(groups):
        mine = slice(group * rows, (group + 1) * rows)
        alone = round_second_order(
            w[mine], [s[mine] for s in scales], h[group], bits=3, kind=kind, block_size=4
        )
        for got, wanted in zip(found.terms, alone.terms, strict=True):
            np.testing.assert_array_equal(got[mine], wanted)


def test_the_unit_of_the_inputs_does_not_matter():
    rng = np.random.default_rng(7)
    w, h = rng.standard_normal((6, 20)), correlated(rng, 20)
    scales = scales_of("fixed_ratio", w, 4, 1)
    for unit in (2.0**-200, 2.0**200):
        found = [
            round_second_order(w, scales, matrix, bits=4, kind="fixed_ratio").terms[0]
            for matrix in (h, h * unit)
        ]
        np.testing.assert_array_equal(*found)


def test_damping_is_raised_until_the_decomposition_holds():
    # Eigenvalues 3 and -1: more than 1 must be added.
    w = np.array([[0.3, -0.8]])
    found = round_second_order(
        w, [np.array([0.5])], np.array([[1.0, 2.0], [2.0, 1.0]]), bits=3, kind="fixed_ratio"
    )
    assert found.damping == pytest.approx(10.0)
    assert found.fallback is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_falls_back_to_plain_rounding_with_a_reason(value):
    rng = np.random.default_rng(8)
    w, h = rng.standard_normal((4, 6)), correlated(rng, 6)
    if value == 0.0:
        h[:] = 0.0
    h[2, 3] = h[3, 2] = value
    scales = scales_of("fixed_ratio", w, 4, 2)
    found = round_second_order(w, scales, h, bits=4, kind="fixed_ratio")
    plain = realize("fixed_ratio", w, scales, bits=4, granularity=PerAxis(0))
    for got, wanted in zip(found.terms, plain.terms, strict=True):
        np.testing.assert_array_equal(got, wanted.q)
    assert found.plain_rows == 4
    assert ("all inputs were zero" if value == 0.0 else "not finite") in found.fallback
    assert np.isfinite(found.damping)


def test_one_bad_group_leaves_the_others_alone():
    rng = np.random.default_rng(9)
    w, good = rng.standard_normal((6, 12)), correlated(rng, 12, rank=4)
    scales = scales_of("fixed_ratio", w, 4, 1)
    both = np.stack([np.full((12, 12), np.nan), good])
    found = round_second_order(w, scales, both, bits=4, kind="fixed_ratio")
    assert "in 1 of 2 groups" in found.fallback
    alone = round_second_order(w[3:], [scales[0][3:]], good, bits=4, kind="fixed_ratio")
    np.testing.assert_array_equal(found.terms[0][3:], alone.terms[0])
    assert found.plain_rows == 3 + alone.plain_rows


def test_refuses_what_does_not_fit():
    w, s = np.ones((4, 3)), [np.ones(4)]
    fine = {"bits": 4, "kind": "fixed_ratio"}
    with pytest.raises(ValueError, match=r"hessian has shape \(4, 4\)"):
        round_second_order(w, s, np.eye(4), **fine)
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        round_second_order(w, s, np.stack([np.eye(3)] * 3), **fine)
    with pytest.raises(ValueError, match="damping is -1"):
        round_second_order(w, s, np.eye(3), damping=-1, **fine)
    with pytest.raises(ValueError, match="scale 0 has shape"):
        round_second_order(w, [np.ones(3)], np.eye(3), **fine)
    with pytest.raises(ValueError, match="w holds NaN"):
        round_second_order(w * np.nan, s, np.eye(3), **fine)

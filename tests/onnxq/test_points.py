"""`--points`: further terms for the output channels that need them, from the option to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command import refused, works, write
from small import feeds, model, run, weights

import onnxq
from onnxq.errors import ConfigError
from onnxq.model import load
from onnxq.options import Options
from onnxq.passes.plan_points import PlanPoints
from onnxq.pipeline import canonicalize
from onnxq.points import PointsGoal
from onnxq.progressive import truncate

HARD = [1, 5]  # channels of `one` with outliers
CHANNELS = 16 + 24 + 10
DATA = {"x": np.random.default_rng(3).standard_normal((24, 3, 8, 8)).astype(np.float32)}
UNSEEN = {"x": np.random.default_rng(4).standard_normal((16, 3, 8, 8)).astype(np.float32)}


def net() -> onnx.ModelProto:
    """x [N, 3, 8, 8] -> Conv `one` -> Relu -> Conv `two` -> GlobalAveragePool -> MatMul `three`."""
    w = weights(16, 3, 3, 3)
    w[HARD, 0, 0, 0] = 8
    return model(
        """g (float[N,3,8,8] x) => (float[N,10] y) {
            [one] a = Conv <pads = [1,1,1,1]> (x, w, b)
            [relu] r = Relu (a)
            [two] c = Conv <group = 2> (r, v)
            [pool] p = GlobalAveragePool (c)
            [flat] f = Flatten (p)
            [three] y = MatMul (f, u)
        }""",
        {
            "w": w,
            "b": weights(16, seed=5),
            "v": weights(24, 8, 3, 3, seed=1),
            "u": weights(24, 10, seed=2),
        },
    )


def made(calibrated: bool = False, **options: object) -> onnxq.Result:
    given = {"priors": False, "offset": "off", **options}
    if calibrated:
        given["calibration"] = DATA
    return onnxq.quantize(net(), data=UNSEEN, **given)


def stored(result: onnxq.Result) -> dict[str, list[int]]:
    return {t.name: list(t.dims) for t in result.model.graph.initializer}


class TestGoal:
    @pytest.mark.parametrize(
        ("text", "error", "budget"),
        [
            ("15%", 0.15, None),
            (" 2.5 % ", 0.025, None),
            ("40KB", None, 40_000),
            ("0.02x", None, 20),
        ],
    )
    def test_is_read(self, text: str, error: float | None, budget: int | None) -> None:
        goal = PointsGoal.parse(text)
        assert goal.error == pytest.approx(error) if error else goal.error is None
        if budget is not None:
            assert goal.budget(1000) == budget

    @pytest.mark.parametrize("text", ["", "much", "-3%", "5pt", "0KB", "x"])
    def test_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"--points .*15%, or the bytes .* 40KB or 0\.02x"):
            PointsGoal.parse(text)

    @pytest.mark.parametrize("text", ["15", " 15 ", "0.5", "40000"])
    def test_a_number_without_a_unit(self, text: str) -> None:
        bare = text.strip()
        with pytest.raises(ConfigError, match=f"--points {bare}: .* give {bare}% .* {bare}KB"):
            PointsGoal.parse(text)

    @pytest.mark.parametrize("text", ["0%", "100%"])
    def test_an_error_that_says_nothing(self, text: str) -> None:
        with pytest.raises(ConfigError, match=f"--points {text}: give an error of more than 0"):
            PointsGoal.parse(text)

    def test_less_than_a_byte(self) -> None:
        with pytest.raises(ConfigError, match=r"--points '0\.02x'"):
            PointsGoal.parse("0.02x").budget(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 1}, "--points with --terms 1"),
        ({"terms": 1, "activations": "static"}, "--points with --terms 1"),
        ({"centre": "on"}, "--points with --centre on"),
        ({"matmul": "nbits"}, "--points with --matmul nbits"),
        ({"tolerance": "error=1%"}, "--points 15% beside --tolerance.*--points auto"),
        ({"max_size": "1MB"}, "--points 15% beside --max-size.*--points auto"),
        ({"points": "auto", "terms": 2}, "--points auto is for bits that are chosen per node"),
        ({"points": "auto", "activations": "dynamic"}, "--points auto with --activations dynamic"),
        (
            {"points": "auto", "outliers": 3},
            "--points auto needs --activations none, but --outliers 3 needs --activations dynamic",
        ),
        ({"points": "lots"}, "--points 'lots'"),
    ],
)
def test_contradictions(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.checked(**{"points": "15%", **options})


def test_points_ask_for_the_same_bits_everywhere() -> None:
    select = Options.checked(points="15%").select()
    assert (select.bits, select.terms) == (4, 2)
    select = Options.checked(points="15%", activations="static").select()
    assert (select.bits, select.terms) == (4, 2)
    # terms that cost time, and are for few channels, are no gain
    assert Options.checked(points="15%", activations="none").select().layout == "merged"
    assert Options.checked(points="15%").choose_centre(calibrated=False) is None
    assert not Options.checked(points="auto", activations="none").uniform


FORMS = [
    {"activations": "none", "layout": "merged"},
    {"activations": "none", "layout": "parallel"},
    {"activations": "none", "offset": "on"},
    {"activations": "none", "series": "joint"},
    {"activations": "dynamic"},
    {"activations": "dynamic", "layout": "merged"},
    {"activations": "static", "layout": "merged"},
]
IDS = [" ".join(form.values()) for form in FORMS]


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_end_to_end(form: dict[str, str], calibrated: bool) -> None:
    """What is made lies between one term and two, in bytes and in error, and says what it did."""
    if form["activations"] == "static" and not calibrated:
        return
    one, two = (made(calibrated, terms=terms, weight_bits=4, **form) for terms in (1, 2))
    some = made(calibrated, points="7%" if "offset" in form else "9%", **form)
    points = some.plan.points["one"]
    assert set(HARD) <= set(np.flatnonzero(points == 2)) and (points == 1).any()
    assert one.report.size_after < some.report.size_after
    assert stored(some)["w/term1/q"][0] < 16  # only the rows that have it
    errors = [result.report.comparison.outputs[0].mae for result in (two, some, one)]
    assert errors == sorted(errors)
    count = sum(
        int((some.plan.points.get(n.name, np.full(size, n.terms)) > 1).sum())
        for n, size in zip(some.plan.quantized, (16, 24, 10), strict=True)
    )
    assert any(
        f"points: {count} of {CHANNELS} channels" in line and "have a second term" in line
        for line in some.report.planning
    )


def test_a_higher_tolerance_takes_fewer_terms() -> None:
    sizes = [
        made(points=text, activations="none").report.size_after for text in ("5%", "15%", "90%")
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    none = made(points="90%", activations="none")
    assert none.plan.points == {} and {n.terms for n in none.plan.quantized} == {1}
    assert any(f"points: 0 of {CHANNELS} channels (0.0 %)" in s for s in none.report.planning)


def test_a_third_term() -> None:
    found = made(points="2%", terms=3, weight_bits=3, activations="none")
    (line,) = (line for line in found.report.planning if line.startswith("points"))
    counts = found.plan.points["one"]
    assert set(counts) == {2, 3} and line.endswith("a third")


@pytest.mark.parametrize("form", [*FORMS[:2], *FORMS[4:]], ids=[*IDS[:2], *IDS[4:]])
def test_a_budget_is_kept_by_the_file(form: dict[str, str]) -> None:
    calibrated = form["activations"] == "static"
    one = made(calibrated, terms=1, weight_bits=4, **form).report.size_after
    for allowed in (100, 2500, 4000):
        some = made(calibrated, points=f"{allowed}B", **form)
        # static compute is counted as float compute, and biases come with calibration
        assert some.report.size_after - one <= allowed + 600 * calibrated
        assert any(node.terms > 1 for node in some.plan.quantized) == (allowed > 2000)


def fallen(result: onnxq.Result) -> float:
    """By how much the errors of all channels fall, relative to their outputs."""
    found = 0.0
    float_model = load(net())
    canonicalize(float_model)
    plan = result.plan
    full = plan.model_copy(
        update={"nodes": [n.model_copy(update={"terms": 4}) for n in plan.nodes]}
    )
    for name, errors in PlanPoints(budget=0).errors(float_model, full).items():
        points = plan.points.get(name, np.full(len(errors), plan[name].terms))
        found += (errors[:, 0] - errors[np.arange(len(errors)), points - 1]).sum()
    return float(found)


@pytest.mark.parametrize("bits", [2, 4])
def test_more_terms_allowed_bring_no_less(bits: int) -> None:
    """Within the same budget, which the files keep."""
    options = {"activations": "none", "weight_bits": bits, "series": "digit"}
    one = made(terms=1, **options).report.size_after
    for allowed in (2000, 3000):
        found = [made(points=f"{allowed}B", terms=terms, **options) for terms in (2, 3, 4)]
        assert max(result.report.size_after for result in found) - one <= allowed
        gains = [fallen(result) for result in found]
        assert gains == sorted(gains) and gains[0] > 0


def test_layers_that_are_alike_do_not_all_go_without() -> None:
    """All are worth their nodes at the same price, at which they are too many."""
    graph = "".join(f"[n{i}] t{i + 1} = Conv <pads = [1,1,1,1]> (t{i}, w{i})\n" for i in range(6))
    proto = model(
        f"g (float[1,12,6,6] t0) => (float[1,12,6,6] t6) {{ {graph} }}",
        {f"w{i}": weights(12, 12, 3, 3, seed=i) for i in range(6)},
    )
    options = {"activations": "none", "weight_bits": 2, "priors": False, "offset": "off"}
    one = onnxq.quantize(proto, terms=1, **options).report.size_after
    for terms in (2, 3):
        some = onnxq.quantize(proto, terms=terms, points="3KB", **options)
        assert any(node.terms > 1 for node in some.plan.quantized)
        assert some.report.size_after - one <= 3000


def test_a_budget_that_buys_nothing_is_said() -> None:
    (line,) = (s for s in made(points="100B", activations="none").report.planning if "points" in s)
    assert line.startswith(f"points: 0 of {CHANNELS} channels")
    assert line.endswith("; 100B buys none that brings anything: give more")
    some = made(points="4KB", activations="none").report.planning
    assert not any("buys" in line for line in some)


def test_samples_decide() -> None:
    """What reads an input that is always zero errs by nothing."""
    dark = {"x": DATA["x"].copy()}
    dark["x"][:, 0] = 0
    options = {"points": "25%", "activations": "none", "rounding": "nearest"}
    seen = onnxq.quantize(net(), calibration=dark, **options).plan
    lit = onnxq.quantize(net(), calibration=DATA, **options).plan
    assert set(HARD) <= set(np.flatnonzero(seen.points["one"] == 2))  # all that is left errs
    assert "one" not in lit.points or not set(HARD) & set(np.flatnonzero(lit.points["one"] == 2))


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_a_plan_file_makes_the_same_model(tmp_path: Path, activations: str) -> None:
    first = made(True, points="15%", activations=activations)
    first.plan.save(tmp_path / "plan.json")
    again = onnxq.quantize(net(), plan=tmp_path / "plan.json")
    feed = {"x": UNSEEN["x"]}
    np.testing.assert_array_equal(run(first.model, feed)[0], run(again.model, feed)[0])
    assert again.plan.points.keys() == first.plan.points.keys()


@pytest.mark.parametrize("layout", ["merged", "parallel"])
def test_truncating_leaves_one_term(layout: str) -> None:
    some = made(points="9%", activations="none", layout=layout)
    cut = truncate(some.model, None, 1, data=UNSEEN)
    assert cut.report.changed and set(cut.report.changed.values()) == {(2, 1)}
    assert cut.report.size_after < some.report.size_after
    names = {t.name for t in cut.model.graph.initializer}
    assert "w/term0/q" in names and "w/term1/q" not in names
    wanted = run(net(), UNSEEN)[0]
    errors = [np.abs(run(m, UNSEEN)[0] - wanted).mean() for m in (some.model, cut.model)]
    assert errors[0] < errors[1] < np.abs(wanted).mean()


def test_by_command(tmp_path: Path) -> None:
    source = write(net(), tmp_path / "in.onnx")
    said = works(
        "quantize", source, tmp_path / "out.onnx", "--points", "15%", "--activations", "none"
    )
    assert "have a second term" in said
    assert onnx.load(tmp_path / "out.onnx").graph.node
    (tmp_path / "out.onnx").unlink()
    assert "--points 15% beside" in refused(
        tmp_path, "quantize", source, tmp_path / "out.onnx", "--points", "15%", "--max-size", "1MB"
    )


def test_large_inputs_run() -> None:
    """The model is the same for any batch."""
    result = made(points="15%", activations="dynamic")
    assert run(result.model, feeds(net()))[0].shape == (2, 10)

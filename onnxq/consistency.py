"""Which options contradict each other, and which say nothing without samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxq.compute import Asked, asked_activations
from onnxq.errors import ConfigError
from onnxq.points import PointsGoal

if TYPE_CHECKING:
    from onnxq.options import Options


def refuse_contradictions(options: Options) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names two of them, or one and what it needs.
    """
    asked = asked_activations(options)
    _check_goal(options, asked)
    if options.activation_terms > 1 and asked == "none":
        raise ConfigError(
            f"--activation-terms {options.activation_terms} needs --activations dynamic or static"
        )
    if options.offset == "on" and not options.can_offset:
        raise ConfigError(
            "--offset on needs --activations none, the same bits in every node, one scale per "
            "channel, --series digit or auto, and at most 24 bits in all terms together"
        )
    if options.centre == "on" and (not options.uniform or asked == "static"):
        raise ConfigError(
            "--centre on needs the same bits in every node (--weight-bits or --terms), and "
            "--activations none or dynamic"
        )
    if options.points is not None:
        _check_points(options, options.points, asked)
    if asked != "static" and "ranges" in options.model_fields_set:
        raise ConfigError("--ranges needs --activations static")
    if asked == "static" and options.activation_bits != 8:
        raise ConfigError("--activation-bits: static activations have 8 bits")
    if asked in ("none", "auto"):
        return
    if options.block_size is not None:
        raise ConfigError(
            f"--block-size {options.block_size} needs float compute, since integer products share "
            "one scale per output channel: add --activations none"
        )
    if options.resolved_layout == "merged" and options.uniform and options.uniform_terms > 1:
        _check_integer_sum(options, f"--activations {asked}")


def _check_goal(options: Options, asked: Asked) -> None:
    given = ("tolerance", "max_size", "max_latency")
    goal = "--" + next((o for o in given if getattr(options, o)), "tolerance").replace("_", "-")
    if not options.has_goal:
        for option, value in (("minimize", options.minimize), ("best-effort", options.best_effort)):
            if value:
                raise ConfigError(f"--{option} needs --tolerance, --max-size or --max-latency")
        return
    if options.points not in (None, "auto"):
        raise ConfigError(
            f"--points {options.points} beside {goal}: {goal} chooses terms; give --points auto, "
            "or leave one out"
        )
    for option in ("weight_bits", "terms", "block_size"):
        if getattr(options, option) is not None:
            shown = option.replace("_", "-")
            raise ConfigError(f"--{shown} beside {goal}: {goal} chooses it; leave one out")
    if asked == "static" and (options.max_latency or options.minimize == "latency"):
        option = "--max-latency" if options.max_latency else "--minimize latency"
        raise ConfigError(
            f"{option} with --activations static: single nodes are not timed in static "
            "compute; use --max-size, or --activations dynamic or none"
        )


def _check_points(options: Options, points: str, asked: Asked) -> None:
    if points == "auto":
        if options.uniform:
            raise ConfigError(
                "--points auto is for bits that are chosen per node: give the error that a "
                "channel may keep, as 15%, or a size, as 40KB"
            )
        if asked != "none":
            raise ConfigError(
                f"--points auto with --activations {asked}: terms of some channels are chosen "
                "for float compute, where they take no time; add --activations none"
            )
        return
    PointsGoal.parse(points)
    if options.uniform_terms == 1:
        raise ConfigError(
            "--points with --terms 1: it gives further terms; raise --terms, or leave it out"
        )
    if options.centre == "on":
        raise ConfigError(
            "--points with --centre on: both decide about the second term; leave one out"
        )
    if options.matmul == "nbits":
        raise ConfigError(
            "--points with --matmul nbits: that kernel reads whole terms; leave one out"
        )


def _check_integer_sum(options: Options, compute: str) -> None:
    bits, terms = options.uniform_bits, options.uniform_terms
    if terms * bits > 8:
        raise ConfigError(
            f"--layout merged with {compute} sums the terms in 8 bits, but "
            f"{terms} terms of {bits} bits need {terms * bits}: lower --terms or "
            "--weight-bits, or add --activations none"
        )
    if options.series not in ("auto", "digit"):
        raise ConfigError(
            f"--series {options.series}: --layout merged with {compute} sums the terms as "
            "integers, which needs --series digit"
        )


def refuse_without_samples(options: Options) -> None:
    """Refuse what only calibration samples give a meaning to.

    Raises:
        ConfigError: names the first such option that was given.
    """
    for name in ("clip", "rounding", "affine", "bias_correction", "effort", "max_latency"):
        if name in options.model_fields_set:
            shown = name.replace("_", "-")
            raise ConfigError(f"--{shown} without --calibration: it works on samples; add them")
    if options.minimize == "latency":
        raise ConfigError("--minimize latency without --calibration: it is timed on samples")

"""What `--activations auto` means beside other options: what they need, else what the CPU gains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from onnxq.errors import ConfigError
from onnxq.latencies import parse_latency
from onnxq.plan import Activations, Plan

if TYPE_CHECKING:
    from onnxq.options import Options

Asked = Activations | Literal["auto"]

_FLOAT = frozenset[Activations]({"none"})
_INTEGERS = frozenset[Activations]({"dynamic", "static"})
_DYNAMIC = frozenset[Activations]({"dynamic"})
_STATIC = frozenset[Activations]({"static"})
# The first that is possible is meant; static compute needs samples, so that it is the last.
_PREFERRED: tuple[Activations, ...] = ("dynamic", "none", "static")


class _Need(NamedTuple):
    """An option as the user wrote it, and the kinds of compute that have such a thing."""

    option: str
    kinds: frozenset[Activations]

    @property
    def shown(self) -> str:
        """`--block-size 32 needs --activations none`."""
        kinds = [kind for kind in _PREFERRED if kind in self.kinds]
        return f"{self.option} needs --activations {' or '.join(kinds)}"


def asked_activations(options: Options) -> Asked:
    """What `--activations` says or, where it is `auto`, what the other options need.

    Integer compute where speed is asked for, as float compute has that of the float model at best;
    `auto` where nothing decides.

    Raises:
        ConfigError: two options need different kinds of compute.
    """
    if options.activations != "auto":
        return options.activations
    needs = list(_needs(options))
    possible = frozenset(_PREFERRED)
    for need in needs:
        if not possible & need.kinds:
            other = next(one for one in needs if not one.kinds & need.kinds)
            raise ConfigError(f"{other.shown}, but {need.shown}: leave one out")
        possible &= need.kinds
    if needs or _faster_than_float(options):
        return next(kind for kind in _PREFERRED if kind in possible)
    return "auto"


def _needs(options: Options) -> Iterator[_Need]:
    given = options.model_fields_set
    if options.block_size is not None:
        yield _Need(f"--block-size {options.block_size}", _FLOAT)
    if options.matmul != "auto":
        yield _Need(f"--matmul {options.matmul}", _FLOAT)
    if options.points == "auto":
        yield _Need("--points auto", _FLOAT)
    if options.offset == "on":
        yield _Need("--offset on", _FLOAT)
    if "ranges" in given:
        yield _Need(f"--ranges {options.ranges}", _STATIC)
    elif options.merges_in_float:
        yield _Need("--layout merged with such terms", _FLOAT)
    if options.activation_terms > 1:
        yield _Need(f"--activation-terms {options.activation_terms}", _INTEGERS)
    if "activation_bits" in given:
        bits = options.activation_bits
        yield _Need(f"--activation-bits {bits}", _INTEGERS if bits == 8 else _DYNAMIC)
    if "products" in given:
        yield _Need(f"--products {options.products}", _INTEGERS)
    if "outliers" in given and options.outliers:
        yield _Need(f"--outliers {options.outliers}", _DYNAMIC)


def _faster_than_float(options: Options) -> bool:
    if options.minimize == "latency":
        return True
    return options.max_latency is not None and parse_latency(options.max_latency) < 1


def in_float(plan: Plan) -> bool:
    """Whether every node is computed in float."""
    return all(node.activations == "none" for node in plan.quantized)

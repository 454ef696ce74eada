"""Where integer compute gains over float: one table, for `--activations auto` and the docs.

"Quantized is slower than float" is what users of 8-bit models complain about most. So a node is
computed in integers only where the CPU that the file is made for gains by it; elsewhere the small
weight is turned into a float one at load, which takes no time and leaves the activation exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from onnxq.passes.weights import Candidate, Weight
from onnxq.plan import Target

IntegerOperator = Literal["Conv", "MatMul"]

# Numbers in the weight of a MatMul from which on it gains on x86 without VNNI, at one row too.
BREAK_EVEN = 2**16
# Share of a model's weights in such MatMuls from which on their time is what counts.
SHARE = 0.5


@dataclass(frozen=True)
class Gain:
    """Whether an operator's products are computed in integers by default.

    Attributes:
        op: of the node; all other operators are computed in float anyway.
        targets: the CPUs that this holds for.
        integers: whether they are at all.
        reason: why they are, or why not, as it is said of the target.
        fact: what was measured.
        more_than: numbers in the weight, where a smaller one is computed in float.
        share: of the model's weights in nodes of `op` that large, where less leaves them in float.
    """

    op: IntegerOperator
    targets: tuple[Target, ...]
    integers: bool
    reason: str
    fact: str
    more_than: int = 0
    share: float = 0.0

    @property
    def always(self) -> bool:
        """Whether every node of that operator is computed in integers."""
        return self.integers and self.more_than == 0 and self.share == 0

    @property
    def condition(self) -> str:
        """Which nodes are computed in integers, in words."""
        if self.always or not self.integers:
            return "all" if self.integers else "none"
        return (
            f"by more than {self.more_than} numbers, where these hold at least "
            f"{100 * self.share:.0f} % of the model's weights"
        )

    def why_float(self, size: int, share: float) -> str | None:
        """Why a node with that many numbers, all such having that share, is in float."""
        if not self.integers:
            return self.reason
        if size <= self.more_than:
            return f"a {self.op} by at most {self.more_than} numbers gains no time in integers"
        if share < self.share:
            return f"beside layers with more weights, a {self.op} gains little time in integers"
        return None


GAINS: tuple[Gain, ...] = (
    Gain(
        "Conv", ("cpu-vnni", "cpu-arm"), True, "integer convolutions are faster than float",
        "ResNet-50's shape takes .59 to .61 of float's time with VNNI; assumed of ARM, whose dot "
        "product is alike",
    ),
    Gain(
        "Conv", ("cpu-avx2",), False,
        "integer convolutions, with the quantizing of their inputs, are not faster than float",
        "with bits chosen for 5 %, dynamic plans take 1.04 (sr_rlfn_x4), 1.11 (ResNet-50's shape), "
        "1.14 (squeezenet1.1), 1.38 (cifar10_resnet20, PP-OCR) and 1.55 (mobilenet) of float's "
        "time, and magika's .91; folded to float at load .98 to 1.00",
    ),
    Gain(
        "MatMul", ("cpu-vnni", "cpu-arm"), True, "integer products are faster than float",
        "they are on x86 without VNNI already",
    ),
    Gain(
        "MatMul", ("cpu-avx2",), True, "large integer products are faster than float",
        "8-bit weight, 1 and 64 rows: 64×64 takes 1.14 and 1.13 of float's time, 192×192 1.09 and "
        ".99, 256×256 .92 and .82, 512×512 .68 and .80, 2048×1000 .41 and .64; MiniLM .85. A "
        "classifier behind convolutions gains next to nothing of a run, and in integers costs "
        "error (cifar10_resnet20: .94 % instead of .67 %, 0.98 of the time instead of 0.99)",
        more_than=BREAK_EVEN, share=SHARE,
    ),
)  # fmt: skip


def gains_everywhere(target: Target) -> bool:
    """Whether every node that can be computed in integers gains by it there."""
    return all(gain.always for gain in GAINS if target in gain.targets)


@dataclass(frozen=True)
class Gains:
    """The table, for the nodes of one model.

    Attributes:
        target: the CPU that it is made for.
        shares: of the model's weights, that of the nodes whose weight is large enough, by operator.
    """

    target: Target
    shares: dict[IntegerOperator, float]

    @classmethod
    def of(cls, found: Iterable[Candidate], target: Target) -> Gains:
        """What holds for a model with these candidates. Embedding tables are not multiplied by."""
        known = [
            (candidate.node.op, candidate.found.size)
            for candidate in found
            if isinstance(candidate.found, Weight) and candidate.node.op != "Gather"
        ]
        total = sum(size for _, size in known)
        return cls(
            target,
            {
                gain.op: sum(n for op, n in known if op == gain.op and n > gain.more_than) / total
                for gain in GAINS
                if target in gain.targets and total
            },
        )

    def why_float(self, op: IntegerOperator, weight: Weight) -> str | None:
        """Why a node is computed in float; None where it is in integers."""
        gain = next(one for one in GAINS if one.op == op and self.target in one.targets)
        reason = gain.why_float(weight.size, self.shares[op])
        return f"float compute: on {self.target} {reason}" if reason else None

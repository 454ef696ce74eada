"""Whether the allocation gets better where output channels may have further terms.

python benchmarks/point_candidates.py [--only squeezenet] [--rounded] [--calibration 32]

Float compute, merged. The most exact plan at several sizes, with and without such candidates, both
from one table of sensitivities; errors on samples that neither calibration nor search saw.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from adaptive import FIVE, THREADS, Real, _there
from rich.console import Console
from rich.table import Table

from onnxq.allocate import Goal, split
from onnxq.candidates import EFFICIENT, bits, with_points
from onnxq.rounding_factors import with_rounding
from onnxq.search import Search
from onnxq.sensitivity import measure
from onnxq.trial import Trial

# (bits, one channel in so many)
PARTS = ((3, 8), (3, 4), (4, 16), (4, 8), (4, 4), (5, 16), (5, 8), (6, 16), (6, 8))
POINTS = tuple(with_points(bits(number, terms=2), part) for number, part in PARTS)
SIZES = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0)  # bits per weight, of what can be quantized


def main(
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    rounded: Annotated[bool, typer.Option(help="Round to the calibration samples.")] = False,
    calibration: Annotated[int, typer.Option(help="Samples.")] = 32,
    unseen: Annotated[int, typer.Option(help="Samples to judge on.")] = 200,
) -> None:
    _there()
    names = ("model", "bits", "bytes", "error without", "with", "predicted without", "with", "used")
    shown = Table(*names)
    for name in (n for n in FIVE if only in n):
        real = Real(name, calibration=calibration, unseen=unseen)
        fit, judge = split(real.calibration, refined=rounded)
        refine = real.refine(fit, []) if rounded else None
        costs = measure(real.model, real.plan, (*EFFICIENT, *POINTS), fit, threads=THREADS)
        if rounded:
            costs = with_rounding(real.model, real.plan, costs, fit)
        points = np.array([candidate.share < 1 for candidate in costs.candidates])
        with Trial(real.model, judge, THREADS) as trial:
            costs = trial.exact_bytes(costs, real.plan)
            without = replace(
                costs,
                error=np.where(points, np.inf, costs.error),
                bytes=np.where(points, np.inf, costs.bytes),
            )
            weights = sum(unit.weight.size for unit in costs.units)
            for number in SIZES:
                size = int(trial.float_bytes - weights * (4 - number / 8))
                goal = Goal(max_bytes=size, minimize="error")
                row = [name, f"{number}", str(size)]
                found = []
                for table in (without, costs):
                    search = Search(real.model, real.plan, goal, table, trial, refine=refine)
                    try:
                        found.append(search.least_error())
                    except Exception as error:
                        print(name, number, error)
                        break
                if len(found) < 2:
                    continue
                for one in found:
                    measured, _ = real.judge(trial.write(one.plan))
                    row.append(f"{100 * measured.relative_error:.3f}%")
                row += [f"{100 * one.predicted**0.5:.3f}%" for one in found]
                used = found[1].chosen.items()
                row.append(" ".join(f"{count}:{kind}" for kind, count in used if "@" in kind))
                print(*row, flush=True)
                shown.add_row(*row)
    Console(width=150).print(shown)


if __name__ == "__main__":
    typer.run(main)

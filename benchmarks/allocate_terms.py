"""Terms of weights and activations, and outlier columns, chosen per node for a tolerance.

The fastest plan that keeps each tolerance, with the candidates named: `weights` (4, 8 and 2 × 8
bits, or float; activations of one 8-bit term), `columns` (outlier columns too), `terms` (a second
activation term too, and on x86 without VNNI weights of 7 bits). The search sees 5 batches of 16
sequences, as they are judged (a range is that of a whole batch), or 32 images, the judgement
others. MiniLM, with the mean over tokens as its output: cosine of sentence embeddings, mean and
least over 16 sequences of 64 tokens; embedding tables are chosen like the rest. MobileNet:
agreement of the top class and relative error.

Latency: CPU time of one thread, interleaved, median ratio to float. Beside it what the search took
it for, the sum over nodes.

python benchmarks/allocate_terms.py minilm|mobilenet [--goals cosine=0.998] [--max-size 0.3x]
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import typer
from real import MODELS, imagenet, samples
from rich.console import Console
from rich.table import Table as Shown

from onnxq.candidates import Candidate, integer
from onnxq.comparison import paired_ratios, time_in_turns
from onnxq.feeds import Feed
from onnxq.goal import Goal, Infeasible, parse_size
from onnxq.latencies import node_latencies
from onnxq.model import Model, load
from onnxq.passes import SelectNodes
from onnxq.pipeline import canonicalize
from onnxq.search import Search
from onnxq.sensitivity import Table, measure
from onnxq.session import open_session, run
from onnxq.targets import resolve
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

Array = npt.NDArray[Any]

FITTED, TRIED, JUDGED = 8, 24, 64  # images


@dataclass(frozen=True)
class Task:
    """A model, what is searched on (`fitted` for the errors of nodes), timed, and judged on."""

    name: str
    search: list[Feed]
    fitted: int
    timed: Feed
    judged: list[Feed]
    columns: tuple[str, str]

    @classmethod
    def named(cls, name: str) -> Task:
        if name == "minilm":
            search = [_sequences(seed) for seed in range(1, 6)]
            other = samples("minilm_l6_v2", 16)
            return cls("minilm_l6_v2", search, 1, other, [other], ("cosine", "least"))
        path = MODELS / "mobilenet_v1_0.75_224.onnx"
        (given,) = open_session(path).get_inputs()
        images = imagenet("tf", 0, FITTED + TRIED + JUDGED)[0]
        feeds = [{given.name: image[None]} for image in images]
        search, judged = feeds[: FITTED + TRIED], feeds[FITTED + TRIED :]
        return cls(path.stem, search, FITTED, judged[0], judged, ("agreement", "rel. error"))

    def judge(self, reference: ort.InferenceSession, made: ort.InferenceSession) -> list[str]:
        exact, found = (
            np.concatenate([run(session, feed)[0] for feed in self.judged])
            for session in (reference, made)
        )
        if self.name == "minilm_l6_v2":
            cosines = (_normal(exact) * _normal(found)).sum(1)
            return [f"{cosines.mean():.5f}", f"{cosines.min():.5f}"]
        agree = float(np.mean(exact.argmax(1) == found.argmax(1)))
        return [f"{agree:.3f}", f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.4f}"]


def _sequences(seed: int) -> Feed:
    """A batch of random tokens like those of `samples`, but others."""
    ids = np.random.default_rng(seed).integers(1000, 20000, (16, 64))
    ids[:, 0], ids[:, -1] = 101, 102
    ones = np.ones_like(ids)
    return {"input_ids": ids, "attention_mask": ones, "token_type_ids": np.zeros_like(ids)}


def _model(name: str) -> Model:
    """The canonical model; MiniLM with sentence embeddings as its output."""
    proto = onnx.load(MODELS / f"{name}.onnx")
    if name == "minilm_l6_v2":
        tokens = proto.graph.output[0].name
        mean = onnx.helper.make_node("ReduceMean", [tokens], ["sentence"], axes=[1], keepdims=0)
        proto.graph.node.append(mean)
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info("sentence", 1, None))
    loaded = load(proto)
    canonicalize(loaded)
    return loaded


def _normal(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _kinds(narrow: bool) -> dict[str, tuple[Candidate, ...]]:
    return {
        "weights": integer(),
        "columns": integer(columns=8),
        "terms": integer(columns=8, terms=True, narrow=narrow),
    }


def main(
    model: Annotated[str, typer.Argument(help="minilm or mobilenet.")] = "minilm",
    goals: Annotated[str, typer.Option(help="Tolerances.")] = "cosine=0.998,cosine=0.9998",
    max_size: Annotated[str, typer.Option(help="Of the file, as 0.3x.")] = "1x",
    kinds: Annotated[str, typer.Option(help="Some of them.")] = "weights,columns,terms",
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 8,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    task, console = Task.named(model), Console(width=140)
    loaded = _model(task.name)
    target = resolve().target
    select = SelectNodes(bits=8, terms=1, activations="dynamic", target=target, embeddings=True)
    plan = select(loaded)
    options = _kinds(target == "cpu-avx2")["terms"]
    began = time.process_time()
    table = measure(loaded, plan, options, task.search[: task.fitted], threads=1)
    sensed = time.process_time()
    latencies = node_latencies(
        loaded, table, task.timed, threads=1, rounds=7, seconds=120, clock=time.process_time
    )
    console.print(
        f"sensitivities {sensed - began:.0f} s, latencies {time.process_time() - sensed:.0f} s"
    )
    rows, sessions = [], []
    with Trial(loaded, task.search[task.fitted :], 1) as trial:
        sessions.append(trial.reference)
        table = trial.exact_bytes(table, plan)
        for goal in goals.split(","):
            for kind in kinds.split(","):
                wanted = Goal(
                    Tolerance.parse(goal),
                    max_bytes=parse_size(max_size, trial.float_bytes),
                    minimize="latency",
                )
                there = {one.name for one in _kinds(target == "cpu-avx2")[kind]}
                search = Search(
                    loaded, plan, wanted, _only(table, there), trial, latency=latencies.table()
                )
                try:
                    found, kept = search.least_cost(), ""
                except Infeasible as error:
                    found, kept = error.closest, "not kept"
                sessions.append(open_session(trial.write(found.plan), threads=1))
                rows.append(
                    [
                        f"{goal} {kept}",
                        kind,
                        ", ".join(f"{n} × {name}" for name, n in found.chosen.items()),
                        *task.judge(trial.reference, sessions[-1]),
                        f"{found.size / trial.float_bytes:.3f}",
                        f"{found.latency:.2f}",
                    ]
                )
                console.print(" | ".join(rows[-1]))
        runs = [lambda s=session: run(s, task.timed) for session in sessions]
        times = time_in_turns(runs, warmup=1, rounds=rounds, seconds=600, clock=time.process_time)
    shown = Shown(title=f"{task.name}, {target}, at most {max_size}", title_justify="left")
    for name in ("tolerance", "of", "chosen", *task.columns, "size", "predicted", "latency"):
        shown.add_column(name)
    for row, ratio in zip(rows, np.median(paired_ratios(times), 0)[1:], strict=True):
        shown.add_row(*row, f"{ratio:.2f}")
    console.print(shown)


def _only(table: Table, names: set[str]) -> Table:
    """Without the candidates that are not named."""
    there = np.array([one.name in names for one in table.candidates])
    return replace(
        table,
        error=np.where(there, table.error, np.inf),
        bytes=np.where(there, table.bytes, np.inf),
    )


if __name__ == "__main__":
    typer.run(main)

"""Outlier columns against second activation terms on MiniLM, without data, node by node.

Weights of 8 bits in one term. Nodes that read one tensor are taken together: a node alone could not
share what is quantized. Groups are ordered by what each gains alone (from 1 - cosine of the
sentence embeddings, the others as they are) per cost: for a second term its products, for outlier
columns the elements that the extra passes read and write. Then as many as a row says get it, the
most worthwhile first; `both` has columns wherever they pay from the start, and adds second terms.
Columns are chosen on random token ids, not on the sequences judged.

Latency: CPU time of one thread, interleaved, median ratio to float; 16 sequences of 64 tokens.

python benchmarks/outlier_columns.py [--steps 0,6,12,18,24] [--rounds 8]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

from onnxq.comparison import paired_ratios, time_in_turns
from onnxq.errors import CalibrationError, ValidationError
from onnxq.model import Model, load, to_proto
from onnxq.observing import observer
from onnxq.passes import SelectNodes
from onnxq.passes.choose_outliers import ChooseOutliers
from onnxq.passes.search_scales import match_plan
from onnxq.pipeline import canonicalize, rewrite
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Update = dict[str, Any]

PATH = MODELS / "minilm_l6_v2.onnx"
VOCABULARY = 30522
SECOND_TERM: Update = {"activation_bits": 7, "activation_terms": 2}
JUDGED_ALONE = 4  # sequences


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


def _failing(_index: int, error: ValidationError) -> CalibrationError:
    return CalibrationError(f"the float model fails on random token ids: {error}")


def _canonical() -> Model:
    model = load(PATH)
    canonicalize(model)
    return model


def _random_ids(count: int) -> list[Feed]:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (count, 64))
    return [
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
    ]


def _session(plan: Plan | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source: Any = PATH
    if plan is not None:
        made = rewrite(load(PATH), SelectNodes(), plan.model_copy(deep=True), _silent)
        source = to_proto(made.model).SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _embeddings(session: ort.InferenceSession, feed: Feed) -> Array:
    mean = session.run(None, feed)[0].mean(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


@dataclass(frozen=True)
class Method:
    """A change of each group of nodes, from what plan, and what it costs there, in any unit."""

    name: str
    base: Plan
    changes: dict[str, Update]
    cost: Callable[[list[NodePlan]], float]

    def plan(self, groups: list[list[str]]) -> Plan:
        """The plan with the changes for the nodes of some groups."""
        names = {name for group in groups for name in group}
        nodes = [
            node.model_copy(update=self.changes.get(node.name, {})) if node.name in names else node
            for node in self.base.nodes
        ]
        return self.base.model_copy(update={"nodes": nodes})


@dataclass(frozen=True)
class Task:
    """The plan to start from, the groups of nodes with one input, and the sequences."""

    plan: Plan
    groups: list[list[str]]
    feed: Feed
    reference: Array

    @classmethod
    def make(cls) -> Task:
        model = _canonical()
        chosen = SelectNodes(activations="dynamic", bits=8, terms=1, target="cpu-avx2")(model)
        plan = rewrite(_canonical(), SelectNodes(), chosen, _silent).plan
        groups: dict[int, list[str]] = {}
        for entry, (candidate, _) in match_plan(model, plan):
            if entry.activations == "dynamic":
                groups.setdefault(id(candidate.node.inputs[0]), []).append(entry.name)
        feed = samples(PATH.stem, 16)
        return cls(plan, list(groups.values()), feed, _embeddings(_session(None), feed))

    def cosines(self, session: ort.InferenceSession, count: int = 16) -> Array:
        feed = {key: value[:count] for key, value in self.feed.items()}
        return np.asarray((_embeddings(session, feed) * self.reference[:count]).sum(1))

    def order(self, method: Method) -> list[list[str]]:
        """The groups, the most worthwhile first."""
        base = self.cosines(_session(method.base), JUDGED_ALONE).mean()

        def worth(group: list[str]) -> float:
            found = self.cosines(_session(method.plan([group])), JUDGED_ALONE)
            return float((found.mean() - base) / method.cost([self.plan[name] for name in group]))

        worths = [worth(group) for group in self.groups]
        return [self.groups[i] for i in np.argsort(worths)[::-1]]

    def methods(self) -> tuple[Method, ...]:
        model = _canonical()
        observe = observer(model, _random_ids(8), _failing)
        chosen = ChooseOutliers(observe)(model, self.plan)
        columns = {n.name: {"outliers": n.outliers} for n in chosen.nodes if n.outliers}
        names = [name for group in self.groups for name in group]
        second = dict.fromkeys(names, SECOND_TERM)
        return (
            Method("columns", self.plan, columns, _elements),
            Method("second term", self.plan, second, _products),
            Method("both", chosen, second, _products),
        )


def _products(group: list[NodePlan]) -> float:
    return float(sum(math.prod(node.shape) for node in group))


def _elements(group: list[NodePlan]) -> float:
    return float(group[0].shape[0] + sum(node.shape[1] for node in group))


def main(
    steps: Annotated[str, typer.Option(help="Numbers of groups, of 24.")] = "0,6,12,18,24",
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 8,
    methods: Annotated[str, typer.Option(help="Some of them.")] = "columns,second term,both",
) -> None:
    if not PATH.exists():
        print(f"skipped: {PATH} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    task = Task.make()
    sessions, rows = [_session(None)], []
    for method in (m for m in task.methods() if m.name in methods.split(",")):
        order = task.order(method)
        for step in map(int, steps.split(",")):
            sessions.append(_session(method.plan(order[:step])))
            nodes = sum(name in method.changes for group in order[:step] for name in group)
            found = task.cosines(sessions[-1])
            rows.append([method.name, str(nodes), f"{found.mean():.5f}", f"{found.min():.5f}"])
    runs = [lambda s=session: s.run(None, task.feed) for session in sessions]
    times = time_in_turns(runs, warmup=1, rounds=rounds, seconds=600, clock=time.process_time)
    table = Table(title="MiniLM, W8×1 A8×1 and more for some MatMuls", title_justify="left")
    for name in ("method", "MatMuls of 36", "cosine", "least", "latency"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row, ratio in zip(rows, np.median(paired_ratios(times), 0)[1:], strict=True):
        table.add_row(*row, f"{ratio:.2f}")
    Console(width=90).print(table)


if __name__ == "__main__":
    typer.run(main)

"""The plan: what will be done to each node, as data that a user can read, edit and apply again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from onnxq.errors import ConfigError
from onnxq.files import read_arrays, write_whole
from onnxq.kernels_ref import PerAxis, PerBlock, PerTensor, SeriesKind

Activations = Literal["none", "dynamic", "static"]
Layout = Literal["parallel", "merged"]
Packing = Literal["int4", "uint8"]
Target = Literal["cpu-vnni", "cpu-avx2", "cpu-arm"]
ActivationType = Literal["int8", "uint8"]
GranularityName = Literal["per_tensor", "per_channel", "per_block"]
WeightForm = Literal["folded", "nbits"]
FloatArray = npt.NDArray[Any]
IntArray = npt.NDArray[np.int8]
Range = tuple[float, float]


class NodePlan(BaseModel):
    """What will be done to one node, or the reason it is left alone.

    Weights are seen as a matrix [output channels, inputs per output channel]; `per_channel` is one
    scale per row, `per_block` one per `block_size` neighbours within a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op_type: str
    weight: str = ""
    shape: tuple[int, ...] = ()
    crc32: str = ""
    reason: str | None = None
    note: str | None = None
    bits: int = Field(default=4, ge=2, le=8)
    terms: int = Field(default=1, ge=1, le=8)
    series: SeriesKind = "fixed_ratio"
    granularity: GranularityName = "per_channel"
    block_size: int | None = Field(default=None, ge=2)
    activations: Activations = "none"
    layout: Layout = "parallel"
    packing: Packing = "int4"
    conv_activations: ActivationType = "int8"
    target: Target = "cpu-avx2"
    activation_bits: int = Field(default=8, ge=2, le=8)
    activation_terms: int = Field(default=1, ge=1, le=4)
    products: Literal["all", "triangular"] | Annotated[int, Field(ge=1)] = "triangular"
    form: WeightForm = "folded"
    centre: bool = False
    offset: bool = False
    outliers: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _partial_terms(self) -> NodePlan:
        kernel = self.shape[2:]
        if self.centre:
            if self.op_type != "Conv" or (
                self.shape and (np.prod(kernel) == 1 or any(k % 2 == 0 for k in kernel))
            ):
                raise ValueError("centre is for a Conv with a kernel of odd size, not 1")
            if self.terms < 2 or self.granularity == "per_block" or self.offset:
                raise ValueError(
                    "centre needs terms >= 2 and a granularity other than per_block, and no offset"
                )
            if self.activations == "static" or (
                self.activations == "dynamic" and self.layout == "merged"
            ):
                raise ValueError(
                    "centre needs activations none, or dynamic with layout parallel: its first "
                    "term has a scale of its own"
                )
        if self.offset:
            if self.granularity != "per_channel" or self.form != "folded":
                raise ValueError("offset needs granularity per_channel and form folded")
            if self.terms > 1 and self.series != "digit":
                raise ValueError("offset with several terms needs series digit")
            if self.activations == "static":
                raise ValueError("offset needs activations none or dynamic")
        return self

    @model_validator(mode="after")
    def _outlier_columns(self) -> NodePlan:
        if not self.outliers:
            return self
        if self.op_type != "MatMul" or self.activations != "dynamic" or len(self.shape) > 2:
            raise ValueError("outliers is for a MatMul by a matrix, with activations dynamic")
        if self.offset:
            raise ValueError("outliers needs no offset")
        if any(a >= b for a, b in zip(self.outliers, self.outliers[1:], strict=False)):
            raise ValueError("outliers must be rising")
        if self.shape and (
            self.outliers[-1] >= self.shape[0] or len(self.outliers) >= self.shape[0]
        ):
            raise ValueError(f"outliers must be some of the {self.shape[0]} columns of the input")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> NodePlan:
        if (self.granularity == "per_block") != (self.block_size is not None):
            raise ValueError("block_size goes with granularity per_block, and only with it")
        if self.form == "nbits" and (self.op_type != "MatMul" or self.activations != "none"):
            raise ValueError("form nbits is for MatMul with activations none")
        compute = f"activations {self.activations}"
        if self.activations == "none":
            return self
        if self.granularity == "per_block":
            raise ValueError(
                f"{compute} needs one scale per output channel: use granularity per_channel, or "
                "activations none"
            )
        if self.layout == "merged" and self.terms > 1:
            if self.series != "digit":
                raise ValueError(f"layout merged with {compute} needs series digit")
            if self.terms * self.bits > 8:
                raise ValueError(
                    f"layout merged with {compute} needs terms x bits <= 8, "
                    f"got {self.terms} x {self.bits}"
                )
        return self

    @property
    def quantized(self) -> bool:
        """Whether the node will be rewritten."""
        return self.reason is None

    def matrix_granularity(self) -> PerTensor | PerAxis | PerBlock:
        """The granularity as it applies to the weight seen as [out, in]."""
        if self.granularity == "per_tensor":
            return PerTensor()
        if self.block_size is None:
            return PerAxis(0)
        return PerBlock(1, self.block_size)

    def scales_key(self) -> str:
        """What the scales depend on; scales made for another key are searched again."""
        parts = [self.crc32, self.series, f"{self.bits}x{self.terms}", self.granularity]
        parts += [str(self.block_size)] if self.block_size else []
        parts += ["centre"] if self.centre else []
        return " ".join(parts + (["offset"] if self.offset else []))


class Plan(BaseModel):
    """The plans of all candidate nodes of a model, in graph order, and their scales.

    `scales` maps a node's name to one float array per term: [out] per channel, [out, blocks] per
    block, () per tensor. A node without an entry gets its scales when the plan is completed.
    `integers`, int8 [out, in] per term, are there for nodes whose weights were not simply rounded
    to nearest; `bias`, float32 [out], is what planning adds to a node's output. `points`, int8
    [out], are there for nodes whose channels have different numbers of terms; `offsets`, float32
    [out], for those planned with `offset`, together with the scales. `ranges` maps the name of an
    activation to its static (rmin, rmax). An `equalized` plan is for the model after `Equalize`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    format_version: Literal[1] = 1
    nodes: list[NodePlan]
    equalized: bool = False
    ranges: dict[str, Range] = Field(default_factory=dict)
    scales: dict[str, tuple[FloatArray, ...]] = Field(default_factory=dict, exclude=True)
    integers: dict[str, tuple[IntArray, ...]] = Field(default_factory=dict, exclude=True)
    bias: dict[str, FloatArray] = Field(default_factory=dict, exclude=True)
    points: dict[str, IntArray] = Field(default_factory=dict, exclude=True)
    offsets: dict[str, FloatArray] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="after")
    def _unique(self) -> Plan:
        names = [node.name for node in self.nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"node {twice[0]!r} is planned twice")
        return self

    @field_validator("ranges")
    @classmethod
    def _hold_zero(cls, ranges: dict[str, Range]) -> dict[str, Range]:
        for name, (rmin, rmax) in ranges.items():
            with np.errstate(over="ignore"):
                ends = np.asarray([rmin, rmax], np.float32)
            if not (np.isfinite(ends).all() and rmin <= 0 <= rmax):
                raise ValueError(f"the range of {name!r} must be finite and hold 0")
        return ranges

    def __getitem__(self, name: str) -> NodePlan:
        return next(node for node in self.nodes if node.name == name)

    @property
    def quantized(self) -> list[NodePlan]:
        """The nodes that will be rewritten."""
        return [node for node in self.nodes if node.quantized]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and its scales as `<stem>.npz` beside it.

        Raises:
            ConfigError: the path cannot be written.
        """
        path = Path(path)
        keys = {node.name: node.scales_key() for node in self.nodes}
        arrays: dict[str, FloatArray] = {}
        for name, scales in self.scales.items():
            for i, scale in enumerate(scales):
                arrays[f"{name}/term{i}/scale"] = scale
            for i, q in enumerate(self.integers.get(name, ())):
                arrays[f"{name}/term{i}/q"] = q
            if name in self.points:
                arrays[f"{name}/points"] = self.points[name]
            if name in self.offsets:
                arrays[f"{name}/offset"] = self.offsets[name]
            if name in self.bias:
                arrays[f"{name}/bias"] = self.bias[name]
            arrays[f"{name}/made_for"] = np.array(keys[name])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **_as_kwargs(arrays))
        text = json.dumps(self._document(), indent=1, ensure_ascii=False) + "\n"
        write_whole({scales_path(path): buffer.getvalue(), path: text.encode()})

    def _document(self) -> dict[str, Any]:
        """Every setting of a node that is quantized, so that a user sees what can be edited."""
        where = {"name", "op_type", "weight", "shape", "crc32", "reason"}
        nodes = [
            node.model_dump(exclude_none=True)
            if node.quantized
            else node.model_dump(include=where, exclude_defaults=True)
            for node in self.nodes
        ]
        ranges = {"ranges": self.ranges} if self.ranges else {}
        equalized = {"equalized": True} if self.equalized else {}
        return {"format_version": self.format_version, **equalized, "nodes": nodes, **ranges}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and, where it is there, the .npz beside it.

        Scales made for other settings than the JSON now states (the user edited it) are dropped.

        Raises:
            ConfigError: the file is missing, not a plan, or an entry contradicts itself.
        """
        path = Path(path)
        try:
            plan = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"plan {path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            where = f" at {where}" if where else ""
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"plan {path}: not a valid plan{where}: {message}") from None
        beside = scales_path(path)
        if beside.exists():
            plan._read_scales(beside)
        return plan

    def _read_scales(self, path: Path) -> None:
        advice = "; delete the file to have the scales searched again"
        try:
            arrays = read_arrays(path, "plan scales")
        except ConfigError as error:
            raise ConfigError(f"{error}{advice}") from None
        for node in self.nodes:
            made_for = arrays.get(f"{node.name}/made_for")
            if made_for is None or str(made_for) != node.scales_key():
                continue
            names = [f"{node.name}/term{i}/scale" for i in range(node.terms)]
            bad = [name for name in names if not _is_scale(arrays.get(name), node)]
            if bad:
                raise ConfigError(f"plan scales {path}: {bad[0]!r} is missing or damaged{advice}")
            self.scales[node.name] = tuple(arrays[name] for name in names)
            self._read_partial(node, arrays, f"plan scales {path}", advice)
            self._read_rounded(node, arrays, f"plan scales {path}", advice)

    def _read_partial(
        self, node: NodePlan, arrays: Mapping[str, FloatArray], where: str, advice: str
    ) -> None:
        points, offset = (arrays.get(f"{node.name}/{what}") for what in ("points", "offset"))
        if points is not None:
            if not _are_points(points, node):
                raise ConfigError(f"{where}: '{node.name}/points' is damaged{advice}")
            self.points[node.name] = points
        if node.offset or offset is not None:
            if offset is None or not _is_vector(offset):
                raise ConfigError(f"{where}: '{node.name}/offset' is missing or damaged{advice}")
            self.offsets[node.name] = offset

    def _read_rounded(
        self, node: NodePlan, arrays: Mapping[str, FloatArray], where: str, advice: str
    ) -> None:
        names = [f"{node.name}/term{i}/q" for i in range(node.terms)]
        if any(name in arrays for name in names):
            bad = [name for name in names if not _is_term(arrays.get(name), node)]
            if bad:
                raise ConfigError(f"{where}: {bad[0]!r} is missing or damaged{advice}")
            self.integers[node.name] = tuple(arrays[name] for name in names)
        bias = arrays.get(f"{node.name}/bias")
        if bias is not None:
            if not _is_vector(bias):
                raise ConfigError(f"{where}: '{node.name}/bias' is damaged{advice}")
            self.bias[node.name] = bias


def scales_path(path: Path) -> Path:
    """Where the scales of the plan at `path` are.

    Raises:
        ConfigError: it would be the plan's own file.
    """
    if path.suffix == ".npz" or not path.name:
        raise ConfigError(f"plan {path}: give the JSON file; its .npz lies beside it")
    return path.with_suffix(".npz")


def _is_scale(array: FloatArray | None, node: NodePlan) -> bool:
    rank = {"per_tensor": 0, "per_channel": 1, "per_block": 2}[node.granularity]
    return (
        array is not None
        and array.dtype.kind == "f"
        and array.ndim == rank
        and bool((np.isfinite(array) & (array > 0)).all())
    )


def _is_term(array: FloatArray | None, node: NodePlan) -> bool:
    if array is None or array.dtype != np.int8 or array.ndim != 2:
        return False
    half = 1 << (node.bits - 1)
    return array.size == np.prod(node.shape) and bool(((array >= -half) & (array < half)).all())


def _is_vector(array: FloatArray) -> bool:
    return array.dtype == np.float32 and array.ndim == 1 and bool(np.isfinite(array).all())


def _are_points(array: FloatArray, node: NodePlan) -> bool:
    return (
        array.dtype == np.int8
        and array.ndim == 1
        and array.size > 0
        and bool(((array >= 1) & (array <= node.terms)).all())
    )


def _as_kwargs(arrays: Mapping[str, FloatArray]) -> dict[str, Any]:
    return dict(arrays)

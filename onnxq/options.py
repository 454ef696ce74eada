"""How to quantize: every option, its limits, and which of them contradict each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as Invalid

from onnxq.errors import ConfigError
from onnxq.kernels_ref import SeriesKind
from onnxq.passes import SelectNodes
from onnxq.passes.search_ranges import RangeMethod
from onnxq.plan import Activations, Layout, Target
from onnxq.session import CASTS_INT4, CONVOLVES_INT8, FUSES_NBITS, runtime_version
from onnxq.targets import resolve


class Options(BaseModel):
    """How to quantize; checked as a whole before any work is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(default=4, ge=2, le=8, description="Bits of each term, 2 to 8.")
    terms: int = Field(default=2, ge=1, le=8, description="Integer terms per weight, 1 to 8.")
    series: SeriesKind | Literal["auto"] = Field(
        default="auto", description="How the scales of the terms relate."
    )
    activations: Activations = Field(
        default="dynamic",
        description="none: float compute; dynamic: integer compute, quantized at run time; static: "
        "integer compute with ranges from --calibration.",
    )
    layout: Layout | Literal["auto"] = Field(
        default="auto",
        description="parallel: a node per term, summed by Add; merged: one node; auto: parallel, "
        "but merged for static.",
    )
    target: Target | Literal["auto"] = Field(
        default="auto",
        description="Which CPU the integer types are chosen for; auto: like this one, see "
        "`onnxq doctor`.",
    )
    min_runtime: str | None = Field(
        default=None,
        description="The oldest onnxruntime that must run the file; the installed one if not "
        "given.",
    )
    block_size: int | None = Field(
        default=None,
        ge=2,
        description="One scale per so many inputs of a channel (with --activations none).",
    )
    activation_bits: int = Field(
        default=8, ge=2, le=8, description="Bits of each activation term, 2 to 8."
    )
    activation_terms: int = Field(
        default=1, ge=1, le=4, description="Terms per activation (with --activations dynamic)."
    )
    products: Literal["all", "triangular"] | Annotated[int, Field(ge=1)] = Field(
        default="triangular",
        description="Which products of weight and activation terms are computed: all, triangular, "
        "or so many.",
    )
    matmul: Literal["auto", "folded", "nbits"] = Field(
        default="auto",
        description="Float compute of MatMul: folded to a float weight at load, or nbits: kept in "
        "4 bits in memory too (MatMulNBits, activations rounded to 8 bits); auto: nbits where one "
        "4-bit term has a --block-size that this CPU runs fast.",
    )
    include: tuple[str, ...] = Field(
        default=(), description="Quantize only nodes whose name matches. Repeatable."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Leave nodes whose name matches alone. Repeatable."
    )
    embeddings: bool = Field(
        default=False, description="Quantize embedding tables too (file size)."
    )
    clip: Literal["absmax", "mse", "mae"] = Field(
        default="mse",
        description="With --calibration: what the weights' scales are searched for, on the "
        "nodes' outputs.",
    )
    rounding: Literal["second_order", "nearest"] = Field(
        default="second_order", description="With --calibration: how weights are rounded."
    )
    affine: Literal["mae", "mse", "none"] = Field(
        default="none",
        description="With --calibration: a scale and shift per output channel, fitted after "
        "rounding and merged into the weights.",
    )
    bias_correction: bool = Field(
        default=True, description="With --calibration: correct the mean of each output channel."
    )
    equalize: bool = Field(
        default=False,
        description="Even out the channels of neighbouring layers first (exact; helps depthwise "
        "models).",
    )
    ranges: RangeMethod = Field(
        default="minmax", description="With --activations static: how ranges are chosen."
    )
    effort: Literal["fast", "normal", "high"] = Field(
        default="normal",
        description="With --calibration: fast: ranges and scales; normal: rounding too; high: "
        "refined across blocks.",
    )

    @classmethod
    def checked(cls, **options: Any) -> Options:
        """The options, if they make sense.

        Raises:
            ConfigError: an option is out of range, or two contradict each other.
        """
        try:
            made = cls(**options)
        except Invalid as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-")
            if first["type"] == "extra_forbidden":
                raise ConfigError(f"{option}: there is no such option") from None
            message = first["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{option} {first['input']}: must be {message}") from None
        made._consistent()
        return made

    @property
    def resolved_layout(self) -> Layout:
        """The layout, `auto` decided."""
        if self.layout != "auto":
            return self.layout
        return "merged" if self.activations == "static" else "parallel"

    def _consistent(self) -> None:
        if self.activation_terms > 1 and self.activations != "dynamic":
            raise ConfigError(
                f"--activation-terms {self.activation_terms} needs --activations dynamic"
            )
        if self.activations == "static" and self.activation_bits != 8:
            raise ConfigError("--activation-bits: static activations have 8 bits")
        if self.activations == "none":
            return
        if self.block_size is not None:
            raise ConfigError(
                f"--block-size {self.block_size} needs float compute, since integer products share "
                "one scale per output channel: add --activations none"
            )
        if self.resolved_layout == "merged" and self.terms > 1:
            self._merges_as_integers()

    def _merges_as_integers(self) -> None:
        compute = f"--activations {self.activations}"
        if self.terms * self.weight_bits > 8:
            raise ConfigError(
                f"--layout merged with {compute} sums the terms in 8 bits, but "
                f"{self.terms} terms of {self.weight_bits} bits need "
                f"{self.terms * self.weight_bits}: lower --terms or --weight-bits, or add "
                "--activations none"
            )
        if self.series not in ("auto", "digit"):
            raise ConfigError(
                f"--series {self.series}: --layout merged with {compute} sums the terms as "
                "integers, which needs --series digit"
            )

    def select(self) -> SelectNodes:
        """The planning pass with these options."""
        version = runtime_version(self.min_runtime)
        return SelectNodes(
            bits=self.weight_bits,
            terms=self.terms,
            series=self.series,
            block_size=self.block_size,
            activations=self.activations,
            activation_bits=self.activation_bits,
            activation_terms=self.activation_terms,
            products=self.products,
            layout=self.resolved_layout,
            matmul=self.matmul,
            fuses_nbits=version >= FUSES_NBITS,
            target=resolve(self.target).target,
            packing="int4" if version >= CASTS_INT4 else "uint8",
            conv_activations="int8" if version >= CONVOLVES_INT8 else "uint8",
            include=self.include,
            exclude=self.exclude,
            embeddings=self.embeddings,
        )

"""How to quantize: every option, its limits, and what is meant where it is left open."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as Invalid

from onnxq.compute import Asked, asked_activations, in_float
from onnxq.consistency import refuse_contradictions, refuse_without_samples
from onnxq.errors import ConfigError
from onnxq.kernels_ref import SeriesKind
from onnxq.kernels_ref.offset import MAX_SEARCHED_BITS
from onnxq.passes import SelectNodes
from onnxq.passes.choose_centre import ChooseCentre
from onnxq.passes.gains import gains_everywhere
from onnxq.passes.search_ranges import RangeMethod
from onnxq.plan import Layout, Plan, Target
from onnxq.session import CASTS_INT4, CONVOLVES_INT8, FUSES_NBITS, runtime_version
from onnxq.targets import resolve

DEFAULT_TOLERANCE = "error=2%"
# Activations of 8 bits leave about as much, and a second product costs as much as the first.
DEFAULT_TOLERANCE_DYNAMIC = "error=5%"
UNIFORM_BITS, UNIFORM_TERMS = 4, 2
BEFORE_CHOICE = 8, 1  # what an entry says until its bits and terms are chosen


class Options(BaseModel):
    """How to quantize; checked as a whole before any work is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Bits of each term, 2 to 8, the same in all nodes; 4 if only --terms is given.",
    )
    terms: int | None = Field(
        default=None,
        ge=1,
        le=8,
        description="Integer terms per weight, 1 to 8, the same in all nodes; 2 if only "
        "--weight-bits is given.",
    )
    points: str | None = Field(
        default=None,
        description="Further terms, up to --terms, only for output channels that need them: 15% is "
        "the error that a channel's output may keep; 40KB, or 0.02x of the float file, what all "
        "further terms may take; auto: where bits are chosen per node, chosen with them (with "
        "--activations none).",
    )
    tolerance: str | None = Field(
        default=None,
        description="How right it must be: bits and terms are chosen per node. top1=0.5pt, "
        "agreement=99%, sqnr=30dB, mae=1%, cosine=0.999 or error=1%; if nothing else says how "
        f"many bits, {DEFAULT_TOLERANCE_DYNAMIC}, and {DEFAULT_TOLERANCE} where all nodes are in "
        "float compute.",
    )
    max_size: str | None = Field(
        default=None, description="How large the file may be: 4MB, or 0.2x of the float one."
    )
    max_latency: str | None = Field(
        default=None,
        description="How long a run may take, measured here: 0.7x of the float model's.",
    )
    minimize: Literal["size", "latency", "error"] | None = Field(
        default=None,
        description="What is made small within the bounds; size with --tolerance, else error.",
    )
    best_effort: bool = Field(
        default=False, description="Write the closest model where the bounds cannot be kept."
    )
    series: SeriesKind | Literal["auto"] = Field(
        default="auto", description="How the scales of the terms relate."
    )
    activations: Asked = Field(
        default="auto",
        description="none: float compute; dynamic: integer compute, quantized at run time; static: "
        "integer compute with ranges from --calibration; auto: dynamic for the nodes that are "
        "faster so on the --target, none for the others, unless another option needs one of them.",
    )
    layout: Layout | Literal["auto"] = Field(
        default="auto",
        description="parallel: a node per term, summed by Add; merged: one node; auto: parallel, "
        "but merged for static, and for float compute where it or bits are chosen per node, "
        "or with --points.",
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
        description="One scale per so many inputs of a channel (float compute).",
    )
    activation_bits: int = Field(
        default=8, ge=2, le=8, description="Bits of each activation term, 2 to 8."
    )
    activation_terms: int = Field(
        default=1, ge=1, le=4, description="Terms per activation (integer compute)."
    )
    products: Literal["all", "triangular"] | Annotated[int, Field(ge=1)] = Field(
        default="triangular",
        description="Which products of weight and activation terms are computed: all, triangular, "
        "or so many.",
    )
    offset: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="A constant per output channel beside the terms (float compute); "
        "auto: where every node gets the same bits.",
    )
    centre: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="A coarse term for the centre tap of kernels, with --weight-bits or --terms; "
        "auto: where branches have been folded into it and it pays for its bytes (float compute, "
        "without --calibration).",
    )
    priors: bool = Field(
        default=True,
        description="Without --calibration: round kernels for inputs that are alike at "
        "neighbouring positions, and correct biases by what BatchNormalization tells.",
    )
    matmul: Literal["auto", "folded", "nbits"] = Field(
        default="auto",
        description="Float compute of MatMul: folded to a float weight at load, or nbits: kept in "
        "4 bits in memory too (MatMulNBits, activations rounded to 8 bits); auto: nbits where one "
        "4-bit term has a --block-size that this CPU runs fast.",
    )
    outliers: int = Field(
        default=8,
        ge=0,
        description="Columns of a MatMul's input that may be computed in float because they reach "
        "far beyond the others (dynamic integer compute); 0 for none.",
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
        default="minmax", description="Static compute: how ranges are chosen."
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
        refuse_contradictions(made)
        return made

    @property
    def uniform(self) -> bool:
        """Whether all nodes get the same bits and terms."""
        if self.has_goal:
            return False
        named = (self.weight_bits, self.terms, self.block_size)
        return (
            any(value is not None for value in named)
            or self.points not in (None, "auto")
            or asked_activations(self) == "static"
            or (self.layout, self.series) != ("auto", "auto")
        )

    @property
    def has_goal(self) -> bool:
        """Whether the user said how right or how small it must be."""
        return any((self.tolerance, self.max_size, self.max_latency))

    @property
    def by_default(self) -> bool:
        """Whether bits and terms are chosen for the default tolerance."""
        return not self.uniform and not self.has_goal

    def tolerance_for(self, plan: Plan) -> str | None:
        """The tolerance that holds for a plan as selected."""
        if not self.by_default:
            return self.tolerance
        kind = self.resolved_activations
        floats = in_float(plan) if kind == "auto" else kind == "none"
        return DEFAULT_TOLERANCE if floats else DEFAULT_TOLERANCE_DYNAMIC

    @property
    def effective_minimize(self) -> Literal["size", "latency", "error"]:
        """What is made small."""
        bounded = self.tolerance is not None or self.by_default
        return self.minimize or ("size" if bounded else "error")

    @property
    def resolved_activations(self) -> Asked:
        """The activations, `auto` decided by other options and the target.

        Still `auto` where only some nodes gain by integers: SelectNodes then decides for each.
        """
        asked = asked_activations(self)
        if asked == "auto" and gains_everywhere(resolve(self.target).target):
            return "dynamic"
        return asked

    @property
    def resolved_layout(self) -> Layout | Literal["auto"]:
        """The layout, `auto` decided; still `auto` where activations are."""
        if self.layout != "auto":
            return self.layout
        kind = self.resolved_activations
        if kind == "auto":
            return "auto"
        if kind == "none" and (not self.uniform or self.points is not None):
            return "merged"  # in float compute a node per term costs time and gains nothing
        return "merged" if kind == "static" else "parallel"

    @property
    def merges_in_float(self) -> bool:
        """Whether --layout merged is asked for with terms that are no digits of 8 bits together."""
        if self.has_goal or self.layout != "merged":
            return False
        bits, terms = self.weight_bits or UNIFORM_BITS, self.terms or UNIFORM_TERMS
        return terms > 1 and (terms * bits > 8 or self.series not in ("auto", "digit"))

    @property
    def uniform_bits(self) -> int:
        """Bits of each term where all nodes get the same."""
        if self.weight_bits is not None:
            return self.weight_bits
        static = asked_activations(self) == "static" and self.points is None
        return 8 if static and self.terms is None else UNIFORM_BITS

    @property
    def uniform_terms(self) -> int:
        """Terms, or with `points` the most of a channel, where all nodes get the same."""
        if self.terms is not None:
            return self.terms
        static = asked_activations(self) == "static" and self.points is None
        return 1 if static else UNIFORM_TERMS

    @property
    def can_offset(self) -> bool:
        """Whether nodes in float compute may have a constant per channel beside the terms."""
        return (
            self.resolved_activations in ("none", "auto")  # auto: for the nodes in float compute
            and self.uniform
            and self.block_size is None
            and self.series in ("auto", "digit")
            and self.matmul != "nbits"
            and self.uniform_bits * self.uniform_terms <= MAX_SEARCHED_BITS
        )

    def _wants_offset(self, calibrated: bool) -> bool:
        if self.offset != "auto":
            return self.offset == "on"
        # Weights that are rounded to nearest on samples get a clip instead.
        nearest = self.rounding == "nearest" or self.effort == "fast"
        return self.can_offset and not (calibrated and nearest)

    def choose_centre(self, *, calibrated: bool) -> ChooseCentre | None:
        """The pass that plans terms of the centre tap, if any."""
        if self.centre == "on":
            return ChooseCentre(always=True)
        # auto: integer compute is then for MatMul alone, and a centre for Conv alone
        floats = self.resolved_activations in ("none", "auto")
        wanted = self.centre == "auto" and floats and not calibrated
        wanted = wanted and self.points is None  # they decide about the second term
        return ChooseCentre() if wanted and self.uniform else None

    def refuse_without_samples(self) -> None:
        """Refuse what only calibration samples give a meaning to.

        Raises:
            ConfigError: names the first such option that was given.
        """
        refuse_without_samples(self)

    def select(self, *, calibrated: bool = False) -> SelectNodes:
        """The planning pass with these options.

        Args:
            calibrated: whether the plan will be completed on samples.

        Raises:
            ConfigError: `min_runtime` is no version, or calibration cannot do what is asked.
        """
        version = runtime_version(self.min_runtime)
        return SelectNodes(
            bits=self.uniform_bits if self.uniform else BEFORE_CHOICE[0],
            terms=self.uniform_terms if self.uniform else BEFORE_CHOICE[1],
            series=self.series,
            block_size=self.block_size,
            activations=self.resolved_activations,
            activation_bits=self.activation_bits,
            activation_terms=self.activation_terms,
            products=self.products,
            layout=self.resolved_layout,
            matmul=self.matmul,
            offset=self._wants_offset(calibrated),
            fuses_nbits=version >= FUSES_NBITS,
            target=resolve(self.target).target,
            packing="int4" if version >= CASTS_INT4 else "uint8",
            conv_activations="int8" if version >= CONVOLVES_INT8 else "uint8",
            include=self.include,
            exclude=self.exclude,
            embeddings=self.embeddings,
        )

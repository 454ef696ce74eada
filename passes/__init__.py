"""Graph rewrites and planning steps, one per file, and the order in which they run."""

from onnxq.passes.base import GraphPass, PassResult
from onnxq.passes.constants_to_initializers import ConstantsToInitializers
from onnxq.passes.equalize import Equalize
from onnxq.passes.expand import Expand, required_opset
from onnxq.passes.fit_bias import FitBias
from onnxq.passes.fit_pairs import FitPairs
from onnxq.passes.fold_affine import FoldAffine
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fold_constants import FoldConstants
from onnxq.passes.fold_linear_branches import FoldLinearBranches
from onnxq.passes.freeze_parameters import FreezeParameters
from onnxq.passes.gemm_to_matmul import GemmToMatMul
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.name_nodes import NameNodes
from onnxq.passes.remove_identity import RemoveIdentity
from onnxq.passes.remove_no_ops import RemoveNoOps
from onnxq.passes.search_ranges import SearchRanges
from onnxq.passes.search_scales import SearchScales
from onnxq.passes.select_nodes import SelectNodes
from onnxq.passes.select_tensors import SelectTensors
from onnxq.passes.split_batch_norm import SplitBatchNorm
from onnxq.passes.split_hard_swish import SplitHardSwish
from onnxq.passes.verify import Signature, signature, verify

# The exact float folds, in the order they run. Each line says why it stands where it stands.
PIPELINE: tuple[GraphPass, ...] = (
    NameNodes(),  # first: every later pass reports by node name
    FreezeParameters(),  # before anything asks whether a weight is constant
    RemoveIdentity(),  # before constants: a Constant may reach its reader through an Identity
    ConstantsToInitializers(),  # before folding: weights of some exporters are Constant nodes
    FoldConstants(),  # after them: the chains behind weights start at initializers now
    RemoveNoOps(),  # before pairs are matched: a Dropout or Cast would stand between them
    SplitBatchNorm(),  # before FoldBatchNorm, which folds the parts
    FoldBatchNorm(),  # needs constant weights and direct Conv -> BatchNormalization edges
    FoldLinearBranches(),  # after the simple folds: what is left are branches and longer chains
    GemmToMatMul(),  # after FoldBatchNorm, which knows that a Gemm's channels are its last axis
    FoldAffine(),  # after GemmToMatMul: one form to match
)

__all__ = [
    "PIPELINE",
    "ConstantsToInitializers",
    "Equalize",
    "Expand",
    "FitBias",
    "FitPairs",
    "FoldAffine",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldLinearBranches",
    "FreezeParameters",
    "GemmToMatMul",
    "GraphPass",
    "InsertQDQ",
    "NameNodes",
    "PassResult",
    "RemoveIdentity",
    "RemoveNoOps",
    "SearchRanges",
    "SearchScales",
    "SelectNodes",
    "SelectTensors",
    "Signature",
    "SplitBatchNorm",
    "SplitHardSwish",
    "required_opset",
    "signature",
    "verify",
]

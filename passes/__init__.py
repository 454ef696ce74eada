"""Graph rewrites and planning steps, one per file, and the order in which they run."""

from onnxq.passes.base import GraphPass, PassResult
from onnxq.passes.constants_to_initializers import ConstantsToInitializers
from onnxq.passes.expand import Expand, required_opset
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fold_linear_branches import FoldLinearBranches
from onnxq.passes.freeze_parameters import FreezeParameters
from onnxq.passes.name_nodes import NameNodes
from onnxq.passes.remove_identity import RemoveIdentity
from onnxq.passes.search_scales import SearchScales
from onnxq.passes.select_nodes import SelectNodes
from onnxq.passes.verify import Signature, signature, verify

# The exact float folds, in the order they run. Each line says why it stands where it stands.
PIPELINE: tuple[GraphPass, ...] = (
    NameNodes(),  # first: every later pass reports by node name
    FreezeParameters(),  # before anything asks whether a weight is constant
    RemoveIdentity(),  # before constants: a Constant may reach its reader through an Identity
    ConstantsToInitializers(),  # before folding: weights of some exporters are Constant nodes
    FoldBatchNorm(),  # needs constant weights and direct Conv -> BatchNormalization edges
    FoldLinearBranches(),  # after the simple folds: what is left are branches and longer chains
)

__all__ = [
    "PIPELINE",
    "ConstantsToInitializers",
    "Expand",
    "FoldBatchNorm",
    "FoldLinearBranches",
    "FreezeParameters",
    "GraphPass",
    "NameNodes",
    "PassResult",
    "RemoveIdentity",
    "SearchScales",
    "SelectNodes",
    "Signature",
    "required_opset",
    "signature",
    "verify",
]

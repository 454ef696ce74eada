"""A gs graph back to a `ModelProto`, everything gs does not carry put back from the stashes.

gs's own exporter is not used: it drops unused initializers, moves outer constants into bodies and
cannot write maps, optionals or most attribute kinds. The result here is a *skeleton*: tensors of
more than `INLINE` bytes are stubs, and a list says where the data of each one are. What becomes of
them is up to the caller (embed, stream to a file, hand back to another model).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_opsetid

from onnxq.errors import ModelError
from onnxq.model.attributes import write_attributes
from onnxq.model.dtypes import DATA_TYPE, raw_size
from onnxq.model.owners import Owners, bodies_of
from onnxq.model.protos import copy_fields, set_text
from onnxq.model.stash import GraphStash, Holder, InitializerStash, NodeStash, stash_of
from onnxq.model.stored import Stored, raw, to_tensor
from onnxq.model.types import Model, get_metadata
from onnxq.model.valueinfo import write_values

INLINE = 1024
STUB = "onnxq:"
DATA_FIELDS = frozenset(
    ("float_data", "int32_data", "string_data", "int64_data", "raw_data", "double_data")
) | {"uint64_data", "external_data", "data_location"}
_DEFAULT = ("", "ai.onnx")


@dataclass
class Stub:
    """A tensor of the skeleton that waits for its data."""

    tensor: TensorProto
    holder: Holder
    initializer: bool  # and not an attribute: it may lie in an external file

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return raw_size(self.tensor.data_type, self.tensor.dims)


@dataclass
class Skeleton:
    """A model without its big tensors, and those tensors."""

    proto: ModelProto = field(default_factory=ModelProto)
    stubs: list[Stub] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Estimated bytes of the model with everything embedded."""
        return int(self.proto.ByteSize()) + sum(stub.size for stub in self.stubs)


def export(model: Model) -> Skeleton:
    """The model as it would be saved, big tensors left out.

    Raises:
        ModelError: two tensors of one graph share a name, or a value has a type ONNX does not have.

    """
    skeleton = Skeleton()
    proto, source = skeleton.proto, model.source.proto
    copy_fields(source, proto, skip=("graph", "opset_import", "functions"))
    set_text(proto, "producer_name", model.graph.producer_name)
    set_text(proto, "producer_version", model.graph.producer_version)
    _Exporter(skeleton, model).graph(model.graph, proto.graph, main=True)
    proto.ir_version = _ir_version(model, proto)
    _imports(model, proto)
    return skeleton


def _ir_version(model: Model, proto: ModelProto) -> int:
    """Before IR 4 every initializer is a graph input; one that is not makes it IR 4."""
    inputs = {value.name for value in proto.graph.input}
    plain = any(tensor.name not in inputs for tensor in proto.graph.initializer)
    source = model.source.proto
    given = {value.name for value in source.graph.input}
    was_plain = any(tensor.name not in given for tensor in source.graph.initializer)
    if model.ir_version < 4 and plain and not was_plain:
        return 4
    return model.ir_version


def _imports(model: Model, proto: ModelProto) -> None:
    for entry in model.graph.import_domains or ():
        proto.opset_import.add().CopyFrom(entry)
        if entry.domain in _DEFAULT and entry.version != model.opset:
            proto.opset_import[-1].version = model.opset
    known = {entry.domain for entry in proto.opset_import}
    for domain in sorted(_domains(model.graph)):
        if domain in known or (domain in _DEFAULT and known & set(_DEFAULT)):
            continue
        if domain in _DEFAULT and model.source.proto.ir_version < 3 and model.ir_version < 3:
            continue
        version = model.opset if domain in _DEFAULT else 1
        proto.opset_import.append(make_opsetid(domain, version))


def _domains(graph: Any) -> set[str]:
    found = {node.domain or "" for node in graph.nodes}
    for node in graph.nodes:
        for body in bodies_of(node):
            found |= _domains(body)
    return found


class _Exporter:
    def __init__(self, skeleton: Skeleton, model: Model) -> None:
        self.skeleton = skeleton
        self.overridable = model.overridable
        self.owners = Owners(model.graph)

    def graph(self, graph: Any, out: GraphProto, main: bool = False) -> None:
        stash: GraphStash = stash_of(graph) or GraphStash(GraphProto())
        rebuilt = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")
        copy_fields(stash.proto, out, skip=(*rebuilt, "quantization_annotation"))
        set_text(out, "name", graph.name)
        set_text(out, "doc_string", graph.doc_string)
        for node in graph.nodes:
            self._node(node, out.node.add())
        listed = {value.proto.name for value in stash.inputs}
        kept = listed & self.overridable if main else listed
        self._initializers(graph, stash, out, kept)
        live = _names(graph, out)
        _unique(graph, out)
        write_values(graph, stash, out, live, kept)
        for annotation in stash.proto.quantization_annotation:
            if annotation.tensor_name in live or annotation.tensor_name not in stash.names:
                out.quantization_annotation.add().CopyFrom(annotation)

    def _node(self, node: Any, out: NodeProto) -> None:
        stash: NodeStash | None = stash_of(node)
        source = stash.proto if stash else NodeProto()
        renewed = ("input", "output", "attribute", "metadata_props")
        copy_fields(source, out, skip=renewed)
        out.input.extend(tensor.name for tensor in node.inputs)
        out.output.extend(tensor.name for tensor in node.outputs)
        set_text(out, "op_type", node.op)
        set_text(out, "name", node.name or "")
        set_text(out, "domain", node.domain or "")
        metadata = get_metadata(node)
        if metadata == {entry.key: entry.value for entry in source.metadata_props}:
            out.metadata_props.extend(source.metadata_props)
        else:
            for key, value in metadata.items():
                out.metadata_props.add(key=key, value=value)
        write_attributes(node, stash, out, self)

    def _initializers(self, graph: Any, stash: GraphStash, out: GraphProto, kept: set[str]) -> None:
        """Those of the file first, in its order; then new ones, in order of use."""
        waiting = {id(constant): constant for constant in self.owners.of(graph)}
        taken = Counter(constant.name for constant in waiting.values())
        for entry in stash.initializers:
            constant = waiting.pop(id(entry.constant), None)
            if constant is not None:
                self._initializer(out, constant.name, constant._values)
            elif not taken[entry.name] and self._stays(entry, kept):
                self._initializer(out, entry.name, entry.holder)
        for constant in waiting.values():
            self._initializer(out, constant.name, constant._values)

    @staticmethod
    def _stays(entry: InitializerStash, kept: set[str]) -> bool:
        """No node reads it: it stays if that was so in the file, or if it is in the signature."""
        return entry.constant is None or entry.name in kept

    def _initializer(self, out: GraphProto, name: str, holder: Holder) -> None:
        if isinstance(holder, Stored) or not hasattr(holder, "tensor"):
            self.tensor(out.initializer.add(), name, holder, initializer=True)
        elif isinstance(holder.tensor, TensorProto):
            self.tensor(out.initializer.add(), name, Stored(holder.tensor), initializer=True)
        else:
            sparse = out.sparse_initializer.add()
            sparse.CopyFrom(holder.tensor)
            set_text(sparse.values, "name", name)

    def tensor(
        self, out: TensorProto, name: str, holder: Holder, initializer: bool = False
    ) -> None:
        """Write one tensor, or a stub for it."""
        if not isinstance(holder, Stored):
            if holder.dtype not in DATA_TYPE or holder.nbytes <= INLINE:
                out.CopyFrom(to_tensor(name, holder))
                return
            out.name, out.data_type = name, DATA_TYPE[holder.dtype]
            out.dims.extend(holder.shape)
        else:
            source = holder.tensor
            if holder.file is None and source.ByteSize() <= INLINE:
                out.CopyFrom(source)
                set_text(out, "name", name)
                return
            if source.data_type == TensorProto.STRING:
                out.CopyFrom(source)
                set_text(out, "name", name)
                return
            copy_fields(source, out, skip=DATA_FIELDS)
            set_text(out, "name", name)
            if raw_size(source.data_type, source.dims) <= INLINE:
                out.raw_data = raw(holder).tobytes()
                return
        out.data_location = TensorProto.EXTERNAL
        out.external_data.add(key="location", value=f"{STUB}{len(self.skeleton.stubs)}")
        self.skeleton.stubs.append(Stub(out, holder, initializer))


def _names(graph: Any, out: GraphProto) -> set[str]:
    names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    names |= {tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    names |= {tensor.name for tensor in out.initializer}
    names |= {sparse.values.name for sparse in out.sparse_initializer}
    return names - {""}


def _unique(graph: Any, out: GraphProto) -> None:
    names = [tensor.name for tensor in out.initializer]
    names += [sparse.values.name for sparse in out.sparse_initializer]
    names += [tensor.name for tensor in graph.inputs]
    names += [name for node in out.node for name in node.output if name]
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(
                f"graph {graph.name!r}: {count} distinct tensors are named {name!r}: a pass must "
                "give each tensor its own name"
            )

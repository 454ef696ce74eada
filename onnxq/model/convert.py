"""One node from one opset to a newer one."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import (
    AttributeProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    defs,
    numpy_helper,
    version_converter,
)
from onnx.helper import make_attribute, make_graph, make_model, make_node, make_opsetid

from onnxq.errors import ModelError
from onnxq.model.protos import bodies, copy_fields, set_text

_DEFAULT = ("", "ai.onnx")
_BODIES_ONLY_GREW = ("If", "Loop")  # these only came to accept more types
_SCAN_CHANGED = 9


@dataclass
class Scope:
    """What is known about the names a node reads; `taken` are all names of the model."""

    types: dict[str, TypeProto]
    constants: dict[str, TensorProto]
    taken: set[str]

    def inside(self, types: dict[str, TypeProto], constants: dict[str, TensorProto]) -> Scope:
        """The scope of a graph inside this one."""
        return Scope({**self.types, **types}, {**self.constants, **constants}, self.taken)

    def fresh(self, base: str) -> str:
        """A name nobody uses yet."""
        name, count = base, 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def convert_node(
    node: NodeProto, where: str, step: tuple[int, int], scope: Scope
) -> list[NodeProto]:
    """The nodes that do at opset `step[1]` what `node` does at `step[0]`.

    That is `node` itself where its operator did not change.

    Raises:
        ModelError: there is no such conversion.

    """
    if node.domain not in _DEFAULT or node.op_type == "Constant":
        return [node]
    old = _schema(node, step[0])
    if old is None:
        raise ModelError(
            f"{where}: opset {step[0]} has no operator {node.op_type}: the model is not valid"
        )
    new = _schema(node, step[1])
    if new is not None and not new.deprecated and old.since_version == new.since_version:
        return [node]
    if any(True for _ in bodies(node)):
        if node.op_type in _BODIES_ONLY_GREW or step[0] >= _SCAN_CHANGED:
            return [node]
        raise _refusal(node, where, step, "its bodies have another form")
    _refuse_wrong_conversions(node, where, step, scope)
    try:
        nodes = _converter(node, step, scope, old)
    except Exception as error:  # the C++ converter raises several types
        reason = str(error).strip().partition("\n")[0]
        raise _refusal(node, where, step, reason) from error
    _keep_sampling(node, nodes, step, scope)
    return _named(node, nodes, scope)


def _refusal(node: NodeProto, where: str, step: tuple[int, int], reason: str) -> ModelError:
    return ModelError(
        f"{where}: cannot convert {node.op_type} from opset {step[0]} to {step[1]} ({reason}): "
        f"export the model again at opset {step[1]}"
    )


def _schema(node: NodeProto, version: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return None


def _refuse_wrong_conversions(
    node: NodeProto, where: str, step: tuple[int, int], scope: Scope
) -> None:
    """Two adapters of onnx give wrong numbers without a word."""
    rank = [_rank(scope.types.get(name)) for name in node.input[:2]]
    axis = next((a.i for a in node.attribute if a.name == "axis"), None)
    if step[0] < 7 and axis is not None and any(a.name == "broadcast" for a in node.attribute):
        known = len(rank) == 2 and rank[0] is not None and rank[1] is not None
        if not known or axis % max(rank[0] or 1, 1) + (rank[1] or 0) != rank[0]:
            raise _refusal(node, where, step, "broadcasting along `axis` changed")
    if node.op_type == "GroupNormalization" and step[0] < 21 <= step[1]:
        raise _refusal(node, where, step, "scale and bias became per channel")


def _rank(type_: TypeProto | None) -> int | None:
    if type_ is None or not type_.tensor_type.HasField("shape"):
        return None
    return len(type_.tensor_type.shape.dim)


def _converter(
    node: NodeProto, step: tuple[int, int], scope: Scope, schema: defs.OpSchema
) -> list[NodeProto]:
    """Run onnx's converter on a model of this one node."""
    names = list(dict.fromkeys(name for name in node.input if name))
    inputs = [_value(name, scope, _fallback(node, name, schema)) for name in names]
    outputs = [_value(name, scope, TensorProto.FLOAT) for name in node.output if name]
    constants = []
    for name in names:
        if name in scope.constants:
            tensor = TensorProto()
            tensor.CopyFrom(scope.constants[name])
            tensor.name = name
            constants.append(tensor)
    graph = make_graph([node], "node", inputs, outputs, constants)
    opset = make_opsetid("", step[0])
    single = make_model(graph, opset_imports=[opset], ir_version=10)
    result = version_converter.convert_version(single, step[1]).graph
    given = {tensor.name for tensor in constants}
    added = [
        make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in result.initializer
        if tensor.name not in given
    ]
    return [*added, *result.node]


def _value(name: str, scope: Scope, fallback: int) -> ValueInfoProto:
    value = ValueInfoProto(name=name)
    known = scope.types.get(name)
    if known is not None and known.WhichOneof("value") is not None:
        value.type.CopyFrom(known)
    else:
        value.type.tensor_type.elem_type = fallback
    return value


def _fallback(node: NodeProto, name: str, schema: defs.OpSchema) -> int:
    """An element type that the operator accepts here, for an input of unknown type."""
    formal = list(schema.inputs)
    index = list(node.input).index(name)
    allowed = formal[min(index, len(formal) - 1)].types if formal else set()
    if "tensor(float)" in allowed or not allowed:
        return TensorProto.FLOAT
    return TensorProto.INT64 if "tensor(int64)" in allowed else TensorProto.FLOAT


def _keep_sampling(
    node: NodeProto, nodes: list[NodeProto], step: tuple[int, int], scope: Scope
) -> None:
    """Before opset 11 Resize and Upsample sampled at x / scale; the converter forgets to say so."""
    if node.op_type not in ("Resize", "Upsample") or not step[0] < 11 <= step[1]:
        return
    scales = [value for a in node.attribute if a.name == "scales" for value in a.floats]
    if not scales and len(node.input) > 1 and node.input[1] in scope.constants:
        scales = numpy_helper.to_array(scope.constants[node.input[1]]).tolist()
    shrinks = bool(scales) and max(scales) <= 1.0 and min(scales) < 1.0
    for new in nodes:
        if new.op_type == "Resize":
            new.attribute.append(make_attribute("coordinate_transformation_mode", "asymmetric"))
            new.attribute.append(make_attribute("nearest_mode", "ceil" if shrinks else "floor"))


def _named(node: NodeProto, nodes: list[NodeProto], scope: Scope) -> list[NodeProto]:
    """Put back what `node` said about itself, and give new tensors names of this model."""
    main = _main(node, nodes)
    if len(nodes) == 1 and _same(node, main):
        return [node]
    own = {*node.input, *node.output, ""}
    base = next((name for name in node.output if name), node.name)
    renamed: dict[str, str] = {}
    for new in nodes:
        for name in new.output:
            if name not in own:
                renamed[name] = scope.fresh(f"{base}/{name.lstrip('_')}")
    result = []
    for new in nodes:
        out = NodeProto(op_type=new.op_type)
        if new is main:
            copy_fields(node, out, skip=("input", "output", "attribute", "op_type"))
        out.input.extend(renamed.get(name, name) for name in new.input)
        out.output.extend(renamed.get(name, name) for name in new.output)
        known = {a.name: a for a in node.attribute} if new is main else {}
        for attribute in new.attribute:
            old = known.get(attribute.name)
            same = old is not None and _key(old) == _key(attribute)
            out.attribute.add().CopyFrom(old if same and old is not None else attribute)
            if old is not None and not same:
                set_text(out.attribute[-1], "doc_string", old.doc_string)
        result.append(out)
    return result


def _main(node: NodeProto, nodes: list[NodeProto]) -> NodeProto:
    for new in nodes:
        if node.name and new.name == node.name:
            return new
    for new in nodes:
        if new.op_type == node.op_type:
            return new
    return nodes[-1]


def _same(old: NodeProto, new: NodeProto) -> bool:
    return (
        old.op_type == new.op_type
        and list(old.input) == list(new.input)
        and list(old.output) == list(new.output)
        and sorted(map(_key, old.attribute)) == sorted(map(_key, new.attribute))
    )


def _key(attribute: AttributeProto) -> tuple[str, bytes]:
    bare = AttributeProto()
    bare.CopyFrom(attribute)
    bare.ClearField("doc_string")
    return attribute.name, bare.SerializeToString(deterministic=True)

"""Float compute: the stored integers become float weights when onnxruntime loads the model."""

from __future__ import annotations

from onnxq.model import set_metadata
from onnxq.passes.site import Site


def lower_float(site: Site) -> None:
    """Replace a node's weight by its series.

    Given:   conv1(x, W, b)
    Result:  parallel: conv1/term0(x, W0, b), conv1/term1(x, W1), …, Adds up to conv1/sum
             merged (or one term): conv1(x, W0 + W1 + …, b)
    """
    node, builder = site.node, site.builder
    indices = tuple(range(len(site.stored.series)))
    if site.plan.layout == "merged" or len(indices) == 1:
        node.inputs[1] = site.stored.float_weight(builder, indices)
        set_metadata(node, {"onnxq.pass": "expand", **site.basis_metadata(indices)})
        return
    outputs = []
    for i in indices:
        weight = site.stored.float_weight(builder, (i,))
        # The bias is added once, where it costs nothing: by the first basis node.
        bias = list(node.inputs[2:]) if i == 0 else []
        outputs.append(
            builder.add(
                node.op,
                f"{site.name}/term{i}",
                [node.inputs[0], weight, *bias],
                attrs=node.attrs,
                metadata=site.basis_metadata((i,)),
            )
        )
    site.sum(outputs, site.remove())

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
    node, builder, slot = site.node, site.builder, site.stored.weight.slot
    indices = tuple(range(len(site.stored.series)))
    if site.plan.layout == "merged" or len(indices) == 1:
        node.inputs[slot] = site.stored.float_weight(builder, indices)
        set_metadata(node, {"onnxq.pass": "expand", **site.basis_metadata(indices)})
        return
    outputs = []
    for i in indices:
        # The bias is added once, where it costs nothing: by the first basis node.
        inputs = list(node.inputs if i == 0 else node.inputs[:2])
        inputs[slot] = site.stored.float_weight(builder, (i,))
        outputs.append(
            builder.add(
                node.op,
                f"{site.name}/term{i}",
                inputs,
                attrs=node.attrs,
                metadata=site.basis_metadata((i,)),
            )
        )
    site.sum(outputs, site.remove())

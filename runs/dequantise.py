"""Rewrites an ONNX model that ONNX Runtime quantised dynamically to 8 bits into one of float32 weights: dequantise.py IN OUT

OpenVINO runs its convolutions and products in bfloat16 then, three times as fast on a processor with AMX. LSTMs stay as
they are. A product in 8 bits is
`x → DynamicQuantizeLinear → ConvInteger or MatMulInteger [→ Add of a bias in integers] → Cast → Mul by both scales`.
"""

import sys

import numpy as np
import onnx
from onnx import helper, numpy_helper

model = onnx.load(sys.argv[1])
graph = model.graph
constants = {tensor.name: tensor for tensor in graph.initializer}
made_by = {name: node for node in graph.node for name in node.output}
read_by: dict[str, list[onnx.NodeProto]] = {}
for node in graph.node:
    for name in node.input:
        read_by.setdefault(name, []).append(node)


def other(node: onnx.NodeProto, name: str) -> str:
    """The input of a node of two that is not `name`."""
    return next(each for each in node.input if each != name)


written: set[str] = set()
replaced: dict[str, onnx.NodeProto] = {}  # by the output of the last node that goes
for node in graph.node:
    if node.op_type not in ("ConvInteger", "MatMulInteger"):
        continue
    quantised, weight, _, weight_zero = node.input
    source, scale, _ = made_by[quantised].input[0], *made_by[quantised].output[1:]
    (reader,) = read_by[node.output[0]]
    bias = []
    if reader.op_type == "Add":  # of Reshape(Cast(Floor(bias / scale)))
        step = made_by[other(reader, node.output[0])]
        while step.op_type != "Div":
            step = made_by[step.input[0]]
        bias = [step.input[0]]
        (reader,) = read_by[reader.output[0]]
    assert reader.op_type == "Cast", (node.name, reader.op_type)
    (last,) = read_by[reader.output[0]]
    weight_scale = other(made_by[other(last, reader.output[0])], scale)
    name = f"{weight}_float"
    if name not in written:
        array, zero, unit = (
            numpy_helper.to_array(constants[each]).astype(np.float32) for each in (weight, weight_zero, weight_scale)
        )
        graph.initializer.append(numpy_helper.from_array((array - zero) * unit, name))
        written.add(name)
    new = helper.make_node(node.op_type.removesuffix("Integer"), [source, name, *bias], [last.output[0]], name=node.name)
    new.attribute.extend(node.attribute)
    replaced[last.output[0]] = new

nodes = [replaced.get(node.output[0], node) for node in graph.node]
while True:  # what nothing reads any longer goes
    needed = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in nodes if needed.intersection(node.output)]
    if len(kept) == len(nodes):
        break
    nodes = kept
known = {"", *(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input)}
ordered: list[onnx.NodeProto] = []
while nodes:
    ready = [node for node in nodes if known.issuperset(node.input)]
    assert ready, "the graph has a circle"
    nodes = [node for node in nodes if not known.issuperset(node.input)]
    ordered += ready
    known.update(name for node in ready for name in node.output)
weights = [tensor for tensor in graph.initializer if any(tensor.name in node.input for node in ordered)]
del graph.node[:], graph.initializer[:]
graph.node.extend(ordered)
graph.initializer.extend(weights)
onnx.save(model, sys.argv[2])
print(f"{sys.argv[2]}: {len(replaced)} products in float32")

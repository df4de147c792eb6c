"""Congruence of axes: pieces of one axis at one place are one segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff.passes.base import PassError
from specdiff.passes.normalize.normalize import replace_tuples
from specdiff.passes.select.axes import AxesPass, AxisClasses, AxisFacts
from tests.passes.toys import attend

T, N, C = 3, 6, 8


def analyse(function, *inputs: Tensor) -> AxisFacts:
    """Axes of a function of tensors."""
    with torch.no_grad():
        module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    replace_tuples(module.graph)
    module.graph.eliminate_dead_code()
    result = AxesPass().apply(module)
    AxesPass().verify(module, result)
    return result


def tensors(*counts: int, batch: int = 2):
    return [torch.randn(batch, count, C) for count in counts]


def layouts(found: AxisFacts):
    """Per output of the graph, the segment numbers and lengths along its second axis."""
    return [[(p.segment, p.length) for p in found.layout(n, 1)] for n in found.outputs()]


@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_a_joint_axis_recover_text_and_image(batch):
    def model(text, image):
        joint = attend(torch.cat([text, image], 1))
        return joint[:, :T], joint[:, T:], text.sin(), image.sin(), joint

    found = analyse(model, *tensors(T, N, batch=batch))
    text, image, text_in, image_in, joint = layouts(found)
    assert text == text_in
    assert image == image_in
    assert text != image
    assert joint == text + image
    assert [found.classes.size(s) for s in found.segments] == [N, T]
    assert all(found.batch_axis(n) == 0 for n in found.outputs())


def test_two_joins_of_the_same_parts_have_the_same_segments():
    def model(text, image):
        joint = attend(torch.cat([text, image], 1))
        again = torch.cat([text.cos(), image.cos()], 1)
        swapped = torch.cat([image, text], 1)
        return joint, again, swapped

    joint, again, swapped = layouts(analyse(model, *tensors(T, N)))
    assert joint == again
    assert swapped == joint[::-1]


def test_equal_lengths_alone_are_not_the_same_tokens():
    def model(image, other):
        return attend(image), other.sin()

    image, other = layouts(analyse(model, *tensors(N, N)))
    assert image != other


def test_keys_are_segments_too():
    def model(image, text):
        heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (image, text)]
        return F.scaled_dot_product_attention(heads[0], heads[1], heads[1])

    found = analyse(model, *tensors(N, T))
    assert [found.classes.size(s) for s in found.segments] == [N, T]


def test_nested_joins_are_taken_apart():
    def model(text, image, reference):
        return attend(torch.cat([text, torch.cat([image, reference], 1)], 1))

    (joint,) = layouts(analyse(model, *tensors(T, N, 4)))
    assert [length for _, length in joint] == [T, N, 4]


def test_pieces_that_overlap_are_not_exact():
    """Another join cuts the same tokens elsewhere: neither is a piece of the other."""

    def model(a, b, c, d):
        left, right = torch.cat([a, b], 1), torch.cat([c, d], 1)
        return attend(left + right)

    found = analyse(model, *tensors(4, 4, 2, 6))
    cats = [n for n in found.graph.nodes if "cat" in n.name]
    exact = {p.part[0].name: found.is_exact(p) for n in cats for p in found.facts[n].parts}
    assert sorted(exact.values()) == [False, False, True, True]


def test_of_several_batch_axes_that_of_the_output_is_taken():
    def model(x):
        return attend(x.reshape(-1, N // 2, C)), attend(x).mean(1)

    found = analyse(model, *tensors(N))
    assert [found.classes.size(s) for s in found.segments] == [N]
    assert all(found.batch_axis(n) == 0 for n in found.outputs() if n.name.startswith("mean"))


def test_axes_of_different_sizes_cannot_be_one():
    classes = AxisClasses()
    with pytest.raises(PassError, match="3 and 4 positions"):
        classes.unite(classes.fresh(3), classes.fresh(4))


def test_the_dump_names_segments_and_samples():
    found = analyse(lambda text, image: attend(torch.cat([text, image], 1)), *tensors(T, N))
    assert AxesPass().summary(found) == "segments of tokens: s0 of 6, s1 of 3"
    notes = {node.name: note for node, note in AxesPass().notes(found).items()}
    assert notes["cat"] == "[B, s1+s0, 8]"

"""train/muon.py: orthogonal updates of a known size, stacks as single matrices, and which parameter goes where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusion_gemma_asr.train.muon import Muon, MuonWithAdamW, orthogonalise


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (3, 4, 9)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = drawn(*shape)
    found = orthogonalise(matrices)
    assert found.shape == matrices.shape
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    # The iteration leaves small singular values behind; those within a tenth of the largest are all lifted.
    lifted = torch.linalg.svdvals(found)
    assert ((lifted > 0.6) & (lifted < 1.3)).all() or (values.min() < values.max() / 10)
    inner = u.mT @ found @ vh.mT  # diagonal: the singular vectors are the same
    torch.testing.assert_close(inner, torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_the_scale_of_the_gradient_does_not_matter() -> None:
    torch.testing.assert_close(orthogonalise(1000 * drawn(4, 7)), orthogonalise(drawn(4, 7)), atol=1e-5, rtol=0)


def test_a_stack_is_updated_as_its_matrices_alone() -> None:
    stack = nn.Parameter(drawn(3, 4, 6))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, single = Muon([stack], lr=0.1, weight_decay=0.1), Muon(alone, lr=0.1, weight_decay=0.1)
    for seed in range(3):
        stack.grad = drawn(3, 4, 6, seed=seed)
        for parameter, gradient in zip(alone, stack.grad, strict=True):
            parameter.grad = gradient
        together.step()
        single.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))


def test_updates_have_the_size_of_adamws() -> None:
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = drawn(64, 256)
    Muon([weight], lr=0.01).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.2)  # an RMS of 0.2 lr


def test_a_parameter_without_gradient_is_left_alone() -> None:
    weight = nn.Parameter(drawn(3, 3))
    before = weight.detach().clone()
    Muon([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), before)


def test_embeddings_heads_convolutions_and_vectors_go_to_adamw() -> None:
    shapes = {"layers.0.q_proj.weight": (4, 4), "experts.down_proj": (2, 4, 4), "embed_tokens.weight": (9, 4)}
    shapes |= {"ctc_head.weight": (5, 4), "conv1.weight": (4, 4, 3), "layers.0.norm.weight": (4,)}
    trained = {name: nn.Parameter(drawn(*shape)) for name, shape in shapes.items()}
    muon, adamw = MuonWithAdamW(trained, 0.1, (0.9, 0.98)).parts
    names = {id(parameter): name for name, parameter in trained.items()}
    found = [{names[id(p)] for group in part.param_groups for p in group["params"]} for part in (muon, adamw)]
    assert found[0] == {"layers.0.q_proj.weight", "experts.down_proj"}
    assert found[0] | found[1] == set(trained)

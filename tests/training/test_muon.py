import torch
from torch import nn

from training.muon import Muon, orthogonalise

SHAPES = ((24, 24), (24, 24), (40, 16), (16, 40))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_singular_values_become_about_one() -> None:
    for shape in ((3, 40, 16), (3, 16, 40)):
        values = torch.linalg.svdvals(orthogonalise(random(0, *shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_updates_are_torch_muons_up_to_bfloat16() -> None:
    ours, theirs = ([nn.Parameter(random(i, *shape)) for i, shape in enumerate(SHAPES)] for _ in range(2))
    start = [each.detach().clone() for each in ours]
    optimizers = (
        Muon(ours, 1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            for each in pair:
                each.grad = random(100 + 10 * step + i, *each.shape)
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.03 * (mine - before).norm()


def test_a_matrix_without_gradient_is_not_updated() -> None:
    moved, still = nn.Parameter(random(0, 8, 8)), nn.Parameter(random(1, 8, 8))
    moved.grad = random(2, 8, 8)
    Muon([moved, still], 1e-2, weight_decay=0.1).step()
    assert not torch.equal(moved, random(0, 8, 8))
    assert torch.equal(still, random(1, 8, 8))

"""The nearest Kronecker product."""

import pytest
import torch

from lora_adapters.convert.deltas.nearest_kronecker import FACTORS, nearest_kronecker, nearest_within, split


@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)])
@pytest.mark.parametrize(("out", "into", "factor"), [(24, 40, 4), (24, 40, -1), (64, 6, 8), (7, 5, 3), (2, 1600, 2)])
def test_a_kronecker_product_is_met_exactly(out, into, factor, kernel):
    torch.manual_seed(0)
    (a, c), (b, d) = split(out, factor), split(into, factor)
    w1, w2 = torch.randn(a, b), torch.randn(c, d, *kernel)
    delta = torch.kron(w1.reshape(a, b, *[1 for _ in kernel]), w2)
    change, fit = nearest_kronecker(delta, factor)
    torch.testing.assert_close(change.delta().reshape(delta.shape), delta, rtol=1e-4, atol=1e-5)
    assert (tuple(change.w1.shape), tuple(change.w2.shape)) == ((a, b), (c, d, *kernel))
    assert fit.error < 1e-5
    assert fit.total == pytest.approx(float(delta.double().square().sum()), rel=1e-5)


def test_it_is_the_nearest_and_tells_its_error():
    """No gradient step from it comes nearer, and starting elsewhere ends there."""
    torch.manual_seed(0)
    delta = torch.randn(12, 20)
    change, fit = nearest_kronecker(delta, 3)
    missing = float((change.delta() - delta).norm() / delta.norm())
    assert fit.error == pytest.approx(missing, rel=1e-4)
    for _ in range(5):
        w1, w2 = torch.randn(3, 2), torch.randn(4, 10)
        for _ in range(100):  # alternating least squares
            blocks = delta.reshape(3, 4, 2, 10)
            w1 = torch.einsum("acbd,cd->ab", blocks, w2) / w2.square().sum()
            w2 = torch.einsum("acbd,ab->cd", blocks, w1) / w1.square().sum()
        assert fit.error <= float((torch.kron(w1, w2) - delta).norm() / delta.norm()) + 1e-6


def test_both_factors_are_of_one_size():
    change, _ = nearest_kronecker(1e-6 * torch.kron(torch.randn(4, 4), torch.randn(8, 8)), 4)
    assert float(change.w1.norm()) == pytest.approx(float(change.w2.norm()), rel=1e-4)


def test_the_smallest_file_within_an_error():
    torch.manual_seed(0)
    delta = torch.kron(torch.randn(4, 8), torch.randn(16, 8))  # 64 x 64; no factor of FACTORS alone has this split
    assert nearest_within(torch.kron(torch.randn(8, 8), torch.randn(8, 8)), 0.01)[0].w1.shape == (8, 8)
    exact, fit = nearest_within(delta, 0.0)
    assert fit.error < 1e-6
    torch.testing.assert_close(exact.delta(), delta)
    sizes = []
    for error in (0.999, 0.9, 0.5):
        change, fit = nearest_within(delta, error)
        assert fit.error <= error
        sizes.append(change.w1.numel() + change.w2.numel())
    assert sizes == sorted(sizes)
    assert FACTORS[-1] == 1  # is always exact


def test_split():
    for side in range(1, 400):
        for factor in (-1, 1, 2, 4, 8, 16):
            small, large = split(side, factor)
            assert small * large == side
            assert small <= large
    assert [split(side, -1) for side in (128, 360, 127)] == [(8, 16), (18, 20), (1, 127)]

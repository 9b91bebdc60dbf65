"""offset_gram beyond test_house.py: closed forms, identities, small offsets, errors."""

import pytest
import torch

import neulig_fast


def test_two_experts_by_hand():
    sums, gram = neulig_fast.offset_gram(torch.tensor([[1.0, 4.0], [3.0, 0.0]]))
    assert sums.tolist() == [[1.0, -1.0]]
    assert gram.tolist() == [[[5.0, -5.0], [-5.0, 5.0]]]


@pytest.mark.parametrize("experts", [1, 2, 3, 7])
def test_equal_experts_give_exact_zeros(experts):
    params = torch.randn(1, 1000).expand(experts, 1000)
    sums, gram = neulig_fast.offset_gram(params)
    assert not sums.any() and not gram.any()


def test_rows_sum_to_zero_and_the_matrix_is_positive_semidefinite():
    _, gram = neulig_fast.offset_gram(torch.randn(6, 100_000))
    scale = float(gram.abs().max())
    assert float(gram.sum(-1).abs().max()) <= 1e-5 * scale
    assert float(torch.linalg.eigvalsh(gram[0]).min()) >= -1e-5 * scale


def test_segments_add_up_to_the_whole():
    params = torch.randn(3, 5000, dtype=torch.float64)
    sums, gram = neulig_fast.offset_gram(params, [0, 17, 17, 4096, 5000])
    whole_sums, whole_gram = neulig_fast.offset_gram(params)
    torch.testing.assert_close(sums.sum(0), whole_sums[0])
    torch.testing.assert_close(gram.sum(0), whole_gram[0])
    assert not gram[1].any()


def test_trace_identity_with_the_distances():
    params = torch.randn(4, 300, dtype=torch.float64)
    _, gram = neulig_fast.offset_gram(params)
    pairs = torch.pdist(params).square().sum()
    torch.testing.assert_close(gram[0].trace(), pairs / 4)


def test_offsets_far_smaller_than_the_parameters_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 20_000, generator=generator, dtype=torch.float64)
    params = (base + 1e-4 * torch.randn(3, 20_000, generator=generator)).float()
    exact = params.double() - params.double().mean(0)
    exact = exact @ exact.T
    _, gram = neulig_fast.offset_gram(params)
    naive = params @ params.T
    naive = naive - naive.mean(0) - naive.mean(1, keepdim=True) + naive.mean()
    error = (gram[0] - exact).abs().max() / exact.abs().max()
    naive_error = (naive.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-3 < naive_error


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3),), r"offset_gram: params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((torch.ones(2, 3, dtype=torch.int64),), r"params must be fp32, bf16, fp16 or fp64"),
        ((torch.ones(2, 3), [0, 2]), r"segments must ascend from 0 to P = 3"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        neulig_fast.offset_gram(*args)

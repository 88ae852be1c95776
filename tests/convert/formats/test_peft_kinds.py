"""Folders of PEFT's of other kinds than LoRA, by arithmetic; test_peft_folders compares with PEFT itself."""

import pytest
import torch

from lora_adapters.convert.formats.peft_kinds import read_change

# The powers of Q in R, from I on.
BEFORE_0_18 = {1: [1], 2: [1, 2], 3: [1, 2, 2], 5: [1, 2, 2, 2, 2]}
SINCE_0_18 = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1], 5: [1, 2, 2, 2, 1]}


@pytest.mark.parametrize(
    ("version", "terms", "factors"),
    [
        *((None, terms, factors) for terms, factors in BEFORE_0_18.items()),
        *(("0.18.0", terms, factors) for terms, factors in SINCE_0_18.items()),
    ],
)
def test_the_series_of_the_version_that_wrote_the_folder(version, terms, factors):
    torch.manual_seed(0)
    upper, weight = torch.randn(2, 3), torch.randn(4, 6)  # two blocks of three channels
    config = {"peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
    config |= {} if version is None else {"peft_version": version}
    found = read_change(config, "to_q", {"oft_R.weight": upper}).delta(weight)
    rotations = []
    for a, b, c in upper.tolist():
        skew = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]])
        rotations.append(sum(factor * torch.linalg.matrix_power(skew, n) for n, factor in enumerate(factors)))
    torch.testing.assert_close(found, weight @ torch.block_diag(*rotations).T - weight)

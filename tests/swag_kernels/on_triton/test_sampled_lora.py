import pytest
import torch
from gpu_device import TRITON_DTYPES
from test_sampled_lora import SCALING, inputs

from swag_kernels import sampled_lora


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_sample_s_bits_do_not_depend_on_the_others(device, dtype):
    """Alone its chunks have programs of their own, among many they share one."""
    S, M, features, out, r = 520, 1, 2100, 20, 12
    x, A, B, base = (t.to(device) for t in inputs(S, M, features, out, r, dtype, x_samples=1))
    whole = sampled_lora(x, A, B, SCALING, base.clone())
    for chosen in (slice(7, 8), slice(500, 504)):
        assert torch.equal(sampled_lora(x, A[chosen], B[chosen], SCALING, base[chosen].clone()), whole[chosen])

"""The one rule for how far a result may lie from the truth."""

import torch
from torch import Tensor


def assert_as_accurate_as_torch(out: Tensor, plain: Tensor, exact: Tensor) -> None:
    """max|out − exact| ≤ 2·max|plain − exact| + the rounding of ``out``, half a unit in the last place of max|exact|.

    ``plain`` is plain torch in the dtype under test and ``exact`` the float64 reference. Infinities have to agree.
    """
    assert out.shape == exact.shape and out.dtype == plain.dtype
    finite = exact.isfinite()
    assert torch.equal(out[~finite].double(), exact[~finite])
    out, plain, exact = out[finite], plain[finite], exact[finite]
    if not out.numel():
        return
    error, allowed = (out.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    bound = 2 * allowed + torch.finfo(out.dtype).eps / 2 * exact.abs().max()
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}; plain torch is off by {allowed:.3g}"

import pytest
import torch

from swag_kernels import AverageState, arena_size, backend, bayes_average_, collect_, draw, sampled_lora, segment_table

LAYOUT = segment_table([5, 2000, 7])
N = arena_size(LAYOUT)


def collect_inputs():
    params = [torch.randn(5), torch.randn(50, 40, requires_grad=True), torch.randn(7).bfloat16()]
    return [params, torch.zeros(N), torch.zeros(N), torch.zeros(3, N), torch.zeros((), dtype=torch.int64), LAYOUT]


def draw_inputs(**changes):
    arguments = {
        "mean": torch.zeros(N), "std": torch.ones(N), "deviations": torch.randn(3, N), "num_samples": 4, "seed": 1,
        "first_sample": 0, "diag_scale": 1.0, "low_rank_scale": 0.5, "antithetic": False, "layout": LAYOUT,
        "dtype": torch.float32,
    } | changes  # fmt: skip
    return arguments


def average_inputs(state, logits):
    return state.log_sum, state.m2, state.votes, state.mean_entropy, state.count, logits, state.group


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name):
    ops = torch.ops.swag_kernels
    x, A, B, base = torch.randn(1, 3, 8), torch.randn(4, 2, 8), torch.randn(4, 6, 2), torch.randn(4, 3, 6)
    arguments = draw_inputs()
    positional = [arguments.pop(key) for key in ("mean", "std", "deviations", "num_samples")]
    with backend(name):
        torch.library.opcheck(ops.collect_, collect_inputs())
        torch.library.opcheck(ops.draw, positional, arguments)
        torch.library.opcheck(ops.sampled_lora, (x.requires_grad_(), A, B.requires_grad_(), 0.7, base))
        torch.library.opcheck(ops.sampled_lora_, (x.detach(), A, B.detach(), 0.7, base))
        torch.library.opcheck(ops.sampled_lora_backward, (torch.randn(4, 3, 6), x.detach(), A, B.detach(), 0.7))
        torch.library.opcheck(ops.bayes_average_, average_inputs(AverageState(3, 7), torch.randn(4, 3, 7)))


def test_no_graph_break():
    mean, m2, deviations, count = collect_inputs()[1:5]
    state = AverageState(3, 6)

    def step(param, x, base):
        collect_([param], mean, m2, deviations, count, LAYOUT[:1])
        weights = draw(**draw_inputs(mean=mean, deviations=deviations, layout=LAYOUT[:1]))
        logits = sampled_lora(x, weights[:, :4].view(4, 2, 2), weights[:, 4:16].view(4, 6, 2), 0.5, base)
        bayes_average_(state, logits)
        return logits

    param, x, base = torch.randn(5), torch.randn(1, 3, 2), torch.randn(4, 3, 6)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(param, x, base.clone())
    assert int(count) == 1 and state.num_samples == 4
    for buffer in (mean, m2, deviations, count):
        buffer.zero_()
    torch.testing.assert_close(compiled, step(param, x, base))


@pytest.mark.parametrize(
    "position, replacement, message",
    [
        (0, [torch.randn(5)], "1 parameters for a layout of 3"),
        (0, [torch.randn(5), torch.randn(10), torch.randn(7)], "parameter 1 is"),
        (0, [torch.randn(5), torch.zeros(50, 40, dtype=torch.int32), torch.randn(7)], "parameter 1 is torch.int32"),
        (1, torch.zeros(N + 1), "not a multiple"),
        (1, torch.zeros(N).bfloat16(), "mean must be contiguous float32"),
        (2, torch.zeros(2 * N), "m2 has shape"),
        (3, torch.zeros(3, 2 * N)[:, ::2], "deviations must be contiguous"),
        (4, torch.zeros(1), "count must be an int64 scalar"),
        (5, segment_table([5, 2000, 70000]), "needs an arena"),
    ],
)
def test_collect_refuses_bad_input_and_writes_nothing(position, replacement, message):
    arguments = collect_inputs()
    arguments[position] = replacement
    before = [t.clone() for t in arguments[1:5]]
    with pytest.raises(ValueError, match=message):
        collect_(*arguments)
    for old, new in zip(before, arguments[1:5], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_samples": 0}, "at least 1"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**64}, "seed must lie"),
        ({"first_sample": 2**32 - 1}, "outside"),
        ({"first_sample": -1}, "outside"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"std": torch.ones(8)}, "std has shape"),
        ({"deviations": torch.ones(N)}, r"deviations must be \[R, N\]"),
    ],
)
def test_draw_refuses_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(**draw_inputs(**changes))


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((2, 3, 8), (4, 2, 8), (4, 6, 2), (4, 3, 6)), r"x \[S or 1"),
        (((4, 3, 8), (4, 2, 9), (4, 6, 2), (4, 3, 6)), r"got x \[4, 3, 8\]"),
        (((4, 3, 8), (4, 2, 8), (4, 6, 3), (4, 3, 6)), "expected"),
        (((4, 3, 8), (4, 2, 8), (4, 6, 2), (4, 5, 6)), "expected"),
        (((3, 8), (4, 2, 8), (4, 6, 2), (4, 3, 6)), "three axes"),
    ],
)
def test_sampled_lora_refuses_bad_shapes(shapes, message):
    x, A, B, base = (torch.randn(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        sampled_lora(x, A, B, 1.0, base)


def test_sampled_lora_refuses_mixed_dtypes():
    with pytest.raises(ValueError, match="one floating dtype"):
        sampled_lora(torch.randn(1, 3, 8), torch.randn(4, 2, 8).half(), torch.randn(4, 6, 2), 1.0, torch.randn(4, 3, 6))


def test_sampled_lora_consumes_base_only_where_no_gradient_is_recorded():
    x, A, B, base = torch.randn(1, 3, 8), torch.randn(4, 2, 8), torch.randn(4, 6, 2), torch.randn(4, 3, 6)
    kept = base.clone()
    recorded = sampled_lora(x, A.clone().requires_grad_(), B, 1.0, base)
    assert recorded.data_ptr() != base.data_ptr() and torch.equal(base, kept)
    assert sampled_lora(x, A, B, 1.0, base) is base
    torch.testing.assert_close(base, recorded.detach(), rtol=0, atol=0)


def test_bayes_average_refuses_bad_input_and_keeps_the_state():
    state = AverageState(3, 7, antithetic=True)
    for logits, message in (
        (torch.randn(4, 3, 8), r"floating \[S, 3, 7\]"),
        (torch.randn(3, 3, 7), "whole antithetic pairs"),
        (torch.zeros(4, 3, 7, dtype=torch.int64), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            bayes_average_(state, logits)
    assert state.num_samples == 0
    with pytest.raises(RuntimeError, match="no samples averaged yet"):
        state.log_probs()

"""Several processes with the same posterior, or each with one of its own, that save and load."""

from __future__ import annotations

import hashlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from posterior_models import tiny_peft, trainable
from ranks import refused, run_ranks
from torch.nn.parallel import DistributedDataParallel

from swag_lora import SwagPosterior, checkpoint

TIMES = 4


def parallel_model():
    torch.manual_seed(dist.get_rank())  # DistributedDataParallel starts from the weights of rank 0
    return DistributedDataParallel(tiny_peft(rank=3))


def train_and_collect(posterior, model, times=TIMES):
    """Optimizer steps on batches that differ between ranks; the weights after each are returned."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    weights = []
    for step in range(times):
        torch.manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(0, 20, (2, 4))
        model(input_ids=tokens, labels=torch.tensor([0, dist.get_rank() % 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        posterior.collect()
        weights.append(trainable(posterior.model))
    return weights


def digest(posterior):
    content = b"".join(tensor.numpy().tobytes() for tensor in posterior.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def replicated(folder):
    rank = dist.get_rank()
    model = parallel_model()
    posterior = SwagPosterior(model, rank=3)
    assert posterior.replicated and posterior.model is model.module and posterior.sharding is None
    weights = train_and_collect(posterior, model)
    found = {"digest": digest(posterior)}

    writes, real = [], checkpoint._write

    def count(posterior, state, weights, folder):
        time.sleep(0.2)  # those that do not wait would find no folder
        writes.append(str(folder))
        real(posterior, state, weights, folder)

    checkpoint._write = count
    posterior.save_pretrained(f"{folder}/all")
    loaded = SwagPosterior.from_pretrained(model, f"{folder}/all")
    assert loaded.replicated and digest(loaded) == digest(posterior)

    if rank == 0:  # which waits for nobody
        posterior.save_pretrained(f"{folder}/one")
        posterior.save_pretrained(f"{folder}/one")
    posterior.collect()
    posterior.save_pretrained(f"{folder}/all")
    assert int(SwagPosterior.from_pretrained(model, f"{folder}/all").count) == TIMES + 1
    dist.barrier()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    checkpoint._write = fail
    found["failed"] = refused(lambda: posterior.save_pretrained(f"{folder}/failed"))
    checkpoint._write = count
    posterior.save_pretrained(f"{folder}/failed")
    assert int(SwagPosterior.from_pretrained(model, f"{folder}/failed").count) == TIMES + 1
    found["writes"] = writes
    if rank == 0:
        plain = tiny_peft(rank=3)
        reference = SwagPosterior(plain, rank=3)
        for one in weights:
            plain.load_state_dict(one, strict=False)
            reference.collect()
        found["reference"] = digest(reference)
    return found


def test_one_rank_writes_what_all_hold(tmp_path):
    found = run_ranks(replicated, 3, str(tmp_path))
    assert {one["digest"] for one in found} == {found[0]["reference"]}
    names = ["all", "one", "one", "all", "failed"]
    assert [one["writes"] for one in found] == [[f"{tmp_path}/{name}" for name in names], [], []]
    assert found[0]["failed"] == "OSError: disk full"
    assert {one["failed"] for one in found[1:]} == {
        f"RuntimeError: rank 0 could not write {tmp_path}/failed at collection 5: OSError: disk full"
    }
    assert sorted(os.listdir(tmp_path)) == ["all", "failed", "one"]


def unlike(folder):
    """Models that are not wrapped: each process has a posterior of its own."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = tiny_peft()
    posterior = SwagPosterior(model, rank=3)
    posterior.collect()
    assert not posterior.replicated
    posterior.save_pretrained(f"{folder}/member{rank}")
    assert digest(SwagPosterior.from_pretrained(model, f"{folder}/member{rank}")) == digest(posterior)

    # The same weights without a wrapper: all write, at the same moment, and none disturbs another.
    torch.manual_seed(0)
    same = SwagPosterior(tiny_peft(), rank=3)
    same.collect()
    for attempt in range(8):
        dist.barrier()
        same.save_pretrained(f"{folder}/shared{attempt}")
        assert digest(SwagPosterior.from_pretrained(same.model, f"{folder}/shared{attempt}")) == digest(same)
    dist.barrier()
    return digest(posterior)


def test_posteriors_of_their_own_are_all_written(tmp_path):
    found = run_ranks(unlike, 3, str(tmp_path))
    assert len(set(found)) == 3
    assert sorted(os.listdir(tmp_path)) == [f"member{rank}" for rank in range(3)] + [f"shared{i}" for i in range(8)]


def absent(folder):
    model = parallel_model()
    posterior = SwagPosterior(model, rank=2)
    posterior.collect()
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=0.5))
    return refused(lambda: posterior.save_pretrained(f"{folder}/p")) if dist.get_rank() else None


def test_a_rank_that_waits_in_vain_says_for_whom(tmp_path):
    said = run_ranks(absent, 2, str(tmp_path))[1]
    assert said.startswith(f"RuntimeError: rank 0 did not write {tmp_path}/p at collection 1: it has to call")

"""Collection from models that `fully_shard` has split over 1 to 4 ranks, against one process."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from posterior_models import tiny_peft
from ranks import refused, run_ranks
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from swag_lora import SwagPosterior, checkpoint
from swag_lora.layout import select_parameters
from swag_lora.sharding import Sharding

RANK = 3
TIMES = 5


class Uneven(nn.Module):
    """Rows that do not divide by 2, 3 or 4, fewer rows than ranks, and a matrix large enough to measure memory by."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(1024, 37)
        self.cube = nn.Parameter(torch.zeros(7, 3, 5))
        self.one = nn.Linear(6, 1)

    def forward(self, x):
        return self.one(self.large(x)[..., :6])


def lora(dtype=torch.float32):
    torch.manual_seed(3)
    return tiny_peft(rank=3).to(dtype)


MODELS = {
    "peft": (lora, "trainable"),
    "bfloat16": (lambda: lora(torch.bfloat16), "trainable"),
    # The classifier is trained, saved with the adapter and not random.
    "lora": (lora, "lora"),
    "uneven": (Uneven, "trainable"),
    "one row": (lambda: nn.Linear(6, 1), "trainable"),
}


def whole_weights(shapes, when):
    generator = torch.Generator().manual_seed(when)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def shard_of(whole, ranks, rank):
    chunks = torch.chunk(whole, ranks)
    return chunks[rank] if rank < len(chunks) else whole[:0]


@torch.no_grad()
def set_weights(model, params, when, mesh_dim=0):
    """The random parameters as they are at collection ``when``, whatever the ranks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = select_parameters(model, params).values()
    for parameter, whole in zip(parameters, whole_weights([p.shape for p in parameters], when), strict=True):
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            whole = shard_of(whole, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
            parameter = parameter.to_local()
        parameter.copy_(whole)


def collect(posterior, params, times=TIMES, mesh_dim=0):
    for when in range(int(posterior.count), times):
        set_weights(posterior.model, params, when, mesh_dim)
        posterior.collect()
    return posterior


def sharded(name, **options):
    make, params = MODELS[name]
    model = make()
    fully_shard(model, **options)
    return model, params


def same_state(a, b):
    return all(torch.equal(mine, its) for mine, its in zip(a.values(), b.values(), strict=True))


def same_part(posterior, reference):
    """Whether this rank holds just its rows of the whole ``reference``."""
    here = reference.layout.views(reference.mean), reference.layout.views(reference.m2)
    parts = posterior.part.views(posterior.mean), posterior.part.views(posterior.m2)
    rows = reference.layout.views(reference.deviations), posterior.part.views(posterior.deviations)
    mesh, dim = posterior.sharding.mesh, posterior.sharding.dim
    ranks, rank = mesh.size(dim), mesh.get_local_rank(dim)
    return all(
        torch.equal(part[name], shard_of(whole[name], ranks, rank))
        for whole, part in zip(here, parts, strict=True)
        for name in whole
    ) and all(
        torch.equal(part, torch.stack([shard_of(row, ranks, rank) for row in whole]))
        for whole, part in zip(rows[0].values(), rows[1].values(), strict=True)
    )


def save_references(folder):
    """What one process saves, after all collections and after two of them."""
    for name, (make, params) in MODELS.items():
        posterior = SwagPosterior(make(), RANK, params)
        for times, part in ((2, "early"), (TIMES, "whole")):
            collect(posterior, params, times).save_pretrained(folder / name / part)


def collected_over_ranks(references, folder):
    """Everything a sharded posterior does, on each rank; what went wrong is raised here or compared by the test."""
    found = {}
    for name in MODELS:
        model, params = sharded(name)
        posterior = collect(SwagPosterior(model, RANK, params), params)
        posterior.save_pretrained(f"{folder}/{name}/whole")

        plain = MODELS[name][0]()
        reference = SwagPosterior.from_pretrained(plain, f"{references}/{name}/whole")
        assert same_part(posterior, reference), name

        # From a file of one process, and on.
        resumed = SwagPosterior.from_pretrained(model, f"{references}/{name}/early")
        assert same_part(resumed, SwagPosterior.from_pretrained(plain, f"{references}/{name}/early")), name
        collect(resumed, params)
        assert same_state(resumed.state_dict(), posterior.state_dict()), name

        gathered = posterior.gathered()
        assert gathered.sharding is None and posterior.sharding is not None
        assert same_state(gathered.state_dict(), reference.state_dict()), name
        assert torch.equal(gathered.draw(3, seed=5).buffer, reference.draw(3, seed=5).buffer), name
        assert "posterior.gathered()" in refused(lambda: posterior.draw(2))  # noqa: B023

        means = {key: mean.full_tensor() for key, mean in posterior.mean_state_dict().items()}
        for key, mean in reference.mean_state_dict().items():
            assert means[key].dtype == mean.dtype and torch.equal(means[key], mean), key
        posterior.load_mean()
        for key, parameter in select_parameters(model, params).items():
            assert torch.equal(parameter.full_tensor(), means[key]), key
        found[name] = [len(posterior.mean), len(posterior.m2), *posterior.deviations.shape]
    return found


def contents(folder):
    """All that is in a posterior's folder, but for the order in which metadata is written."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata(), sorted(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            found[path.name] = (
                metadata,
                {
                    name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else int(t))
                    for name, t in tensors.items()
                },
            )
        elif path.suffix == ".json":
            # PEFT keeps names in sets, whose order is another in each process.
            found[path.name] = {
                k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()
            }
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    save_references(folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_add_up_to_what_one_process_collects(references, tmp_path, world_size):
    found = run_ranks(collected_over_ranks, world_size, str(references), str(tmp_path))
    for name in MODELS:
        assert os.listdir(tmp_path / name) == ["whole"]
        assert contents(tmp_path / name / "whole") == contents(references / name / "whole"), name
    rows = -(-37 // world_size)
    most = max(len_mean for len_mean, *_ in (per_rank["uneven"] for per_rank in found))
    assert most <= 1024 * (rows + 1 + 4)
    for per_rank in found:
        for mean, m2, held, row in per_rank.values():
            assert mean == m2 == row and held == RANK
    assert [per_rank["one row"][0] for per_rank in found] == [2048] + [0] * (world_size - 1)


def spoiled(folder):
    """A bad weight, a full disk, a collection too few on one rank: an error on all, and nothing lost."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, params = sharded("peft")
    posterior = collect(SwagPosterior(model, RANK, params), params)
    before = {key: tensor.clone() for key, tensor in posterior.state_dict().items()}
    said = {}

    name = posterior.layout.names[1]
    if rank == last:
        with torch.no_grad():
            dict(model.named_parameters())[name].to_local().view(-1)[-1] = float("nan")
    said["not finite"] = refused(posterior.collect)
    assert same_state(posterior.state_dict(), before)
    posterior.collect(check_finite=False)
    assert int(posterior.count) == TIMES + 1
    posterior.load_state_dict(before)

    set_weights(model, params, 0)
    if rank == last:
        posterior.to("meta")
    said["another device"] = refused(posterior.collect)
    posterior = SwagPosterior(model, RANK, params)
    posterior.load_state_dict(before)

    real = checkpoint.save_file

    def fail(*args, **kwargs):
        raise OSError("disk full")

    posterior.save_pretrained(f"{folder}/p")
    set_weights(model, params, 7)
    posterior.collect()
    checkpoint.save_file = fail
    said["disk full"] = refused(lambda: posterior.save_pretrained(f"{folder}/p"))
    checkpoint.save_file = real
    old = SwagPosterior.from_pretrained(model, f"{folder}/p")
    assert same_state(old.state_dict(), before)

    if rank == 0:
        os.rename(f"{folder}/p/{checkpoint.POSTERIOR_NAME}", f"{folder}/moved")
    dist.barrier()
    if rank != last:  # as if the folder were on one node's disk
        os.makedirs(f"{folder}/{rank}/p", exist_ok=True)
        os.link(f"{folder}/moved", f"{folder}/{rank}/p/{checkpoint.POSTERIOR_NAME}")
        for file in Path(f"{folder}/p").iterdir():
            os.link(file, f"{folder}/{rank}/p/{file.name}")
    said["no file"] = refused(lambda: SwagPosterior.from_pretrained(model, f"{folder}/{rank}/p"))

    if rank == last:
        set_weights(model, params, 8)
        posterior.collect(check_finite=False)
    said["count"] = refused(lambda: posterior.save_pretrained(f"{folder}/p"))
    said["nothing"] = refused(lambda: SwagPosterior(model, RANK, params).save_pretrained(f"{folder}/n"))
    said["draw"] = refused(lambda: SwagPosterior(model).gathered().draw(2))
    return name, said


def test_what_one_rank_refuses_all_refuse(tmp_path):
    answers = run_ranks(spoiled, 3, str(tmp_path))
    name = answers[0][0]
    for rank, (_, said) in enumerate(answers):
        assert said["not finite"].startswith(f"ValueError: {name} holds a NaN"), said
        assert said["another device"].startswith("ValueError: ") and "the posterior on meta" in said["another device"]
        assert "disk full" in said["disk full"] and said["disk full"].startswith("OSError" if not rank else "Runtime")
        assert "no posterior in" in said["no file"], said
        assert f"hold from 6 to 7 collections, rank {rank} {7 if rank == 2 else 6}" in said["count"], said
        assert "nothing collected yet" in said["nothing"] and "nothing collected yet" in said["draw"]
        if rank < 2:
            assert said["not finite"].endswith("(on rank 2)")
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "moved", "p"]
    assert checkpoint.POSTERIOR_NAME not in os.listdir(tmp_path / "p")


def odd_models(folder):
    """Models and changes that cannot be collected, and what is said of each."""
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    said = {}

    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    said["columns"] = refused(lambda: SwagPosterior(model))

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model[1], mesh=mesh)
    said["part"] = refused(lambda: SwagPosterior(model))
    fully_shard(model[0], mesh=grid)
    said["two meshes"] = refused(lambda: SwagPosterior(model))
    assert SwagPosterior(model, params=lambda name, _: name.startswith("1.")).sharding.mesh == mesh

    model = nn.Linear(8, 8)
    for key, placements in (("replicated", [Replicate()]), ("two", [Shard(0), Shard(0)])):
        on = mesh if len(placements) == 1 else other
        for name in ("weight", "bias"):
            local = torch.zeros(*([8, 8] if name == "weight" else [8]))
            setattr(model, name, nn.Parameter(DTensor.from_local(local, on, placements, run_check=False)))
        said[key] = refused(lambda: SwagPosterior(model))  # noqa: B023

    model = nn.Linear(8, 8)
    whole = SwagPosterior(model, RANK)
    whole.collect()
    fully_shard(model, mesh=mesh)
    said["sharded since"] = refused(whole.collect)
    said["load_mean, sharded since"] = refused(whole.load_mean)
    model = lora()
    whole = SwagPosterior(model, RANK)
    whole.collect()
    fully_shard(model, mesh=mesh)
    said["save, sharded since"] = refused(lambda: whole.save_pretrained(folder))
    said["collect into the gathered"] = refused(SwagPosterior(model).gathered().collect)

    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh)
    posterior = SwagPosterior(model, RANK)
    posterior.collect()
    before = {key: tensor.clone() for key, tensor in posterior.state_dict().items()}
    said["load_mean of a whole model"] = refused(lambda: posterior.load_mean(nn.Linear(8, 8)))
    model.bias = nn.Parameter(torch.zeros(8))
    said["whole since"] = refused(posterior.collect)
    model.bias = nn.Parameter(DTensor.from_local(torch.zeros(4), other, [Replicate(), Shard(0)], run_check=False))
    said["resharded"] = refused(posterior.collect)
    shard = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([8]), stride=(1,))
    model.bias = nn.Parameter(shard)
    said["other rows"] = refused(posterior.collect)
    assert same_state(posterior.state_dict(), before)
    return said


def hybrid(references, folder):
    """Two replicas of two shards each, by a mesh whose second dimension is the one that shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in ("peft", "lora"):
        model, params = sharded(name, mesh=mesh)
        posterior = collect(SwagPosterior(model, RANK, params), params, mesh_dim=1)
        assert posterior.sharding.ranks == 2
        posterior.save_pretrained(f"{folder}/{name}")
        reference = SwagPosterior.from_pretrained(MODELS[name][0](), f"{references}/{name}/whole")
        assert same_part(posterior, reference)
        assert same_state(posterior.gathered().state_dict(), reference.state_dict())
        assert same_part(SwagPosterior.from_pretrained(model, f"{folder}/{name}"), reference)
        if dist.get_rank() == 2:  # of the other replica
            next(iter(select_parameters(model, params).values())).to_local().data.fill_(float("inf"))
        assert refused(posterior.collect).startswith("ValueError")
    return odd_models(f"{folder}/odd")


def test_hybrid_sharding_and_what_cannot_be_collected(references, tmp_path):
    answers = run_ranks(hybrid, 4, str(references), str(tmp_path))
    for name in ("peft", "lora"):
        assert contents(tmp_path / name) == contents(references / name / "whole")
    expected = {
        "columns": r"ValueError: weight is placed as \[Shard\(dim=1\)\]",
        "part": r"ValueError: 1.weight is sharded over .*, 0.weight not at all: call fully_shard on the whole model",
        "two meshes": r"ValueError: 0.weight is sharded over .*shard=2.*, 1.weight over .*4",
        "replicated": r"ValueError: weight is placed as \[Replicate\(\)\]",
        "two": r"ValueError: weight is placed as \[Shard\(dim=0\), Shard\(dim=0\)\]",
        "sharded since": "ValueError: weight is sharded, the posterior is of whole tensors",
        "load_mean, sharded since": "ValueError: weight is sharded, the posterior is of whole tensors",
        "save, sharded since": "ValueError: .*lora_A.default.weight is sharded, the posterior is of whole tensors",
        "collect into the gathered": "ValueError: .*lora_A.default.weight is sharded, the posterior is of whole tensors",
        "load_mean of a whole model": r"ValueError: weight is sharded not at all, the posterior over .*gathered\(\)",
        "whole since": "ValueError: bias is sharded not at all, the posterior over",
        "resharded": "ValueError: bias is sharded over .*, the posterior over",
        "other rows": r"ValueError: the shard of bias has shape \[3\] instead of \[2\]",
    }
    for said in answers:
        assert said.keys() == expected.keys()
        for key, pattern in expected.items():
            assert said[key] is not None and re.match(pattern, said[key]), (key, said[key])


def trained(folder):
    """Forward passes leave whole parameters, in another dtype, in the place of the shards that an optimizer changes."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, params = sharded("peft", mp_policy=policy, reshard_after_forward=False)
    plain = MODELS["peft"][0]()
    posterior, reference = SwagPosterior(model, RANK, params), SwagPosterior(plain, RANK, params)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(TIMES):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {name: p.full_tensor() for name, p in select_parameters(model, params).items()}
        model.eval()
        with torch.no_grad():
            model(**batch)
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        posterior.collect()
        missing = plain.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        reference.collect()
        with torch.no_grad():
            model(**batch)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert len({tuple(row.tolist()) for row in reference.deviations}) == RANK
    gathered = SwagPosterior(model, RANK, params)
    assert gathered.layout == reference.layout
    assert same_state(posterior.gathered().state_dict(), reference.state_dict())
    with torch.no_grad():
        model(**batch)
    posterior.save_pretrained(f"{folder}/p")
    with torch.no_grad():
        model(**batch)
    again = SwagPosterior.from_pretrained(model, f"{folder}/p")
    assert same_state(again.state_dict(), posterior.state_dict())
    with torch.no_grad():
        model(**batch)
    posterior.load_mean()
    means = reference.mean_state_dict()
    model.eval()
    with torch.no_grad():
        model(**batch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert all(torch.equal(p.full_tensor(), means[name]) for name, p in select_parameters(model, params).items())


def test_training_in_mixed_precision(tmp_path):
    run_ranks(trained, 2, str(tmp_path))


def test_an_ordinary_model_has_no_sharding():
    model = lora()
    assert Sharding.of(select_parameters(model)) is None
    posterior = collect(SwagPosterior(model, RANK), "trainable")
    assert posterior.sharding is None and posterior.part is posterior.layout and posterior.gathered() is posterior

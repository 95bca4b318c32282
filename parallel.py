"""The processes of a run: their ranks, how a model is cut over them, and how they agree on a few numbers.

Under torchrun every process runs the same program on its own rows. Rank r holds one shard of every weight (FSDP2,
arXiv 2304.11277); with `replicate` copies of the sharded model (HSDP) only gradients cross between nodes. Without
torchrun there is one process, rank 0 of 1, and every function here returns its own value. torch.distributed is used in
this file and in checkpoints.py alone; other files ask a World.

    python sft.py …                                                         one process
    torchrun --nproc-per-node 8 sft.py …                                    eight, one shard each
    torchrun --nnodes 2 --nproc-per-node 8 … sft.py --replicate 2 …         two copies of eight shards
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from files import InputError

# ----- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes of a run and the place of this one among them."""
    rank: int
    size: int
    device: torch.device
    mesh: object = None  # a DeviceMesh ("shard",) or ("replicate", "shard"); None for one process
    shard: int = 0  # the shard that this rank holds of every parameter; replicas hold the same
    shards: int = 1


def pick_device(name="auto"):
    """"auto", "cpu" or "cuda" as the name of this process's device. InputError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; expected one, or --device cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def start(device="auto", replicate=1):
    """The World of this process. InputError when the ranks do not divide by `replicate`, or for an absent GPU."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(pick_device(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size % replicate:
        raise InputError(f"--replicate {replicate}: {size} ranks do not divide by it; expected a divisor of {size}")
    if size == 1:
        return World(0, 1, device)
    # gloo beside NCCL: the few numbers that ranks agree on each step are Python floats on the host
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    shape, names = ((replicate, size // replicate), ("replicate", "shard")) if replicate > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return World(rank, size, device, mesh, mesh.get_local_rank("shard"), size // replicate)


def barrier(world):
    """Waits until every rank is here."""
    if world.size > 1:
        dist.barrier()


def stop(world):
    """Leaves the process group. Call it at a good end only, because it waits for every rank, a failed one too."""
    barrier(world)
    if world.size > 1:
        dist.destroy_process_group()

# ----- messages between ranks ----------------------------------------------------------------------------------------


def all_sum(world, values):
    """The sum of each number over all ranks, the same bits on every rank."""
    if world.size == 1:
        return [float(value) for value in values]
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def from_rank_0(world, value):
    """Rank 0's `value` on every rank."""
    if world.size > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def computed_on_rank_0(world, function):
    """function() of rank 0 on every rank; an InputError or OSError there is raised on every rank."""
    value = None
    if world.rank == 0:
        try:
            value = function()
        except (InputError, OSError) as error:
            value = error
    value = from_rank_0(world, value)
    if isinstance(value, Exception):
        raise value
    return value


def from_all(world, value):
    """[every rank's `value`], by rank, on every rank."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def interleaved_on_rank_0(world, rows, total):
    """Rank 0: the `total` rows that the ranks hold in turn (rank r has r, r + size, …), in order; the others: None.

    `rows` [about total / size, D] is this rank's CPU tensor.
    """
    if world.size == 1:
        return rows
    padded = torch.zeros(-(-total // world.size), *rows.shape[1:], dtype=rows.dtype)  # gather wants equal shapes
    padded[:len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world.size)] if world.rank == 0 else None
    dist.gather(padded, shares)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total] if world.rank == 0 else None

# ----- sharded tensors -----------------------------------------------------------------------------------------------


def shard(model, world):
    """Cuts a model over the ranks, block by block, in place; gradients are reduced in fp32. Does nothing for one rank.

    Embedding and head stay with the root group, because they may be one weight.
    """
    if world.mesh:
        for module in (*model.layers, model):
            fully_shard(module, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))


def first_row(world, rows):
    """The first row of this rank's shard of a parameter of `rows` rows: FSDP2 cuts them as torch.chunk does."""
    return world.shard * math.ceil(rows / world.shards)


def local(tensor):
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(world, parameter, rows):
    """This rank's `rows`, as a tensor sharded as `parameter` is; for one process the rows themselves."""
    if not world.mesh:
        return rows
    return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


def full(tensor):
    """The whole of a sharded tensor, gathered by all ranks together, or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

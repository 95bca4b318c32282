"""The processes of a run: their ranks, how a model is cut over them, and how they agree on a few numbers.

Under torchrun every process runs the same program on its own rows. Rank r holds one shard of every weight (FSDP2,
arXiv 2304.11277); with `replicate` copies of the sharded model (HSDP) only gradients cross between nodes. Without
torchrun there is one process, rank 0 of 1, and every function here returns its own value. torch.distributed is used in
this file and in checkpoints.py alone; other files ask a World.

    python sft.py …                                                         one process
    torchrun --nproc-per-node 8 sft.py …                                    eight, one shard each
    torchrun --nnodes 2 --nproc-per-node 8 … sft.py --replicate 2 …         two copies of eight shards
"""
import contextlib
import itertools
import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np
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
    """[every rank's `value`], by rank, on every rank; the first InputError or OSError among them is raised instead."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    for found in values:
        if isinstance(found, Exception):
            raise found
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

# ----- rows that ranks share -----------------------------------------------------------------------------------------

ROWS_AT_A_TIME = 1024  # that are sent


def shared_rows(world, rows):
    """Every rank's `rows`, [(number, array, …)] with one-dimensional int32 arrays, in one list on every rank.

    Their arrays are parts of one file in the folder for temporary files, which the processes of a node map together: a
    node holds them once, not once a rank. It has lost its name before it is filled, so that it goes with the last
    process that has it, however that ends. One process gets its own rows back. OSError on every rank if a disk is full.
    """
    if world.size == 1:
        return rows
    shapes = np.array([[number, *map(len, arrays)] for number, *arrays in rows], np.int64)
    shapes, error = from_all(world, shapes.reshape(-1, len(rows[0]) if rows else 1)), None
    with file_of_the_node(world) as (file, is_writer):
        for rank, shape in enumerate(shapes):
            for start in range(0, len(shape), ROWS_AT_A_TIME):
                piece = torch.empty(int(shape[start:start + ROWS_AT_A_TIME, 1:].sum()), dtype=torch.int32)
                if rank == world.rank:
                    arrays = [array for _, *arrays in rows[start:start + ROWS_AT_A_TIME] for array in arrays]
                    np.concatenate(arrays, out=piece.numpy())
                dist.broadcast(piece, src=rank)
                rest = memoryview(piece.numpy()).cast("B") if is_writer and not error and len(piece) else b""
                try:
                    while rest:  # a disk that is nearly full takes a part
                        rest = rest[file.write(rest):]
                except OSError as found:
                    error = OSError(found.errno, found.strerror, tempfile.gettempdir())
        from_all(world, error)  # raises it on every rank
        length = os.fstat(file.fileno()).st_size
        # a copy of a page is made if it is written to: torch warns of memory that may only be read
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) if length else b""
    numbers, found, start = np.frombuffer(mapped, np.int32), [], 0
    for number, *lengths in itertools.chain(*(shape.tolist() for shape in shapes)):
        ends = list(itertools.accumulate(lengths, initial=start))
        found.append((number, *(numbers[begin:end] for begin, end in itertools.pairwise(ends))))
        start = ends[-1]
    return found


@contextlib.contextmanager
def file_of_the_node(world):
    """(an open file without a name that all processes of this node have, whether this process is to write it)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    names = from_all(world, new_file() if local == 0 else None)
    with open(names[world.rank - local], "r+b", buffering=0) as file:
        barrier(world)
        if local == 0:
            os.unlink(names[world.rank])
        yield file, local == 0


def new_file():
    """The name of a new temporary file, or the OSError."""
    try:
        handle, name = tempfile.mkstemp(prefix="finemedlm-rows-")
        os.close(handle)
    except OSError as error:
        return error
    return name

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

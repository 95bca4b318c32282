"""The processes of a run: their ranks, how a model is sharded over them, and how they exchange values and rows.

Under torchrun every process runs the same program on its own rows. Each rank holds one shard of every weight (FSDP2,
arXiv 2304.11277); with `replicate` copies of the sharded model (HSDP) only gradients cross between nodes. Without
torchrun there is one process, rank 0 of 1, to which every function here returns its own value. torch.distributed is
used in this file and in checkpoints.py alone; other files pass a World to these functions.

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

from files import InputError, resident

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
    """torch's name of this process's device ("cpu", "cuda:3") for "auto", "cpu" or "cuda". InputError without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; expected one, or --device cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def peak_memory(device):
    """The most bytes that this process has held, on the GPU or in main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def start(device="auto", replicate=1):
    """The World of this process. InputError if `replicate` does not divide the ranks, or if there is no such device."""
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
    """Leaves the process group once every rank is here. Call it after success only: a failed rank never comes."""
    barrier(world)
    if world.size > 1:
        dist.destroy_process_group()

# ----- messages between ranks ----------------------------------------------------------------------------------------


def all_sum(world, values):
    """[the sum over all ranks of each of `values`] in float64, the same bits on every rank."""
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
    """Calls function() on rank 0 and returns its value, or raises its InputError or OSError, on every rank."""
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
    """[total, D] on rank 0, None on the others: all ranks' rows in order, of which rank r holds r, r + size, …

    rows [about total / size, D]: this rank's, on the CPU.
    """
    if world.size == 1:
        return rows
    padded = torch.zeros(-(-total // world.size), *rows.shape[1:], dtype=rows.dtype)  # gather wants equal shapes
    padded[:len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world.size)] if world.rank == 0 else None
    dist.gather(padded, shares)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total] if world.rank == 0 else None

# ----- rows that ranks share -----------------------------------------------------------------------------------------

ROWS_AT_A_TIME = 1024  # in one broadcast


def shared_rows(world, rows):
    """The `rows` [(number, array, …)] of all ranks in one list, on every rank; the arrays are int32, one-dimensional.

    The arrays that are returned are views of one temporary file that the processes of a node map, so that a node holds
    them once, not once a rank. The file is unlinked before it is filled: it is gone when the last process that has it
    open ends, however it ends. One process gets its own rows back. OSError on every rank if the disk of one is full.
    """
    if world.size == 1:
        return rows
    # of each row its number and the lengths of its arrays
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
                    while rest:  # a disk that is nearly full writes only a part
                        rest = rest[file.write(rest):]
                except OSError as found:
                    error = OSError(found.errno, found.strerror, tempfile.gettempdir())
        from_all(world, error)  # raises it on every rank
        length = os.fstat(file.fileno()).st_size
        # copy on write, because torch warns about tensors over read-only memory
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) if length else b""
    values, found, start = np.frombuffer(mapped, np.int32), [], 0
    for number, *lengths in itertools.chain(*(shape.tolist() for shape in shapes)):
        ends = list(itertools.accumulate(lengths, initial=start))
        found.append((number, *(values[begin:end] for begin, end in itertools.pairwise(ends))))
        start = ends[-1]
    return found


@contextlib.contextmanager
def file_of_the_node(world):
    """Yields (a file without a name that all processes of this node have open, whether this process writes it)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    made = from_all(world, (new_file(),) if local == 0 else None)  # in a tuple: an error waits until all names are gone
    file, = made[world.rank - local]  # of this node's first rank; or why there is none
    with contextlib.ExitStack() as stack:
        if not isinstance(file, OSError):
            try:
                file = stack.enter_context(open(file, "r+b", buffering=0))
            except OSError as error:
                file = error
        barrier(world)  # all have it open
        if local == 0 and isinstance(made[world.rank][0], str):
            os.unlink(made[world.rank][0])
        from_all(world, file if isinstance(file, OSError) else None)
        yield file, local == 0


def new_file():
    """The name of a new temporary file, or the OSError, which `from_all` raises on every rank."""
    try:
        handle, name = tempfile.mkstemp(prefix="finemedlm-rows-")
        os.close(handle)
    except OSError as error:
        return error
    return name

# ----- sharded tensors -----------------------------------------------------------------------------------------------


def shard(model, world):
    """Shards a model over the ranks in place, block by block; gradients are reduced in fp32. One rank keeps it whole.

    Embedding, last norm and head are one group, the root, because embedding and head may be one weight.
    """
    if world.mesh:
        for module in (*model.layers, model):
            fully_shard(module, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))


def first_row(world, rows):
    """The number of the first row in this rank's shard of a parameter of `rows` rows, cut as torch.chunk cuts them."""
    return world.shard * math.ceil(rows / world.shards)


def local(tensor):
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(world, parameter, rows):
    """The tensor sharded like `parameter` whose shard on this rank is `rows`; for one process the rows themselves."""
    if not world.mesh:
        return rows
    return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


def full(tensor):
    """The whole of a sharded tensor, which all ranks gather together, or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

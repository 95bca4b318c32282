"""parallel.py: what ranks tell each other, and that a model cut over them is the whole model."""
import errno
import os
import resource
import tempfile

import numpy as np
import pytest
import torch
from conftest import RUN_CONFIG
from ranks import ALONE, begin, run_ranks, whole_tensors
from torch import nn

import parallel
import train
from files import InputError, one_line
from model import Llama, LlamaConfig

# ----- processes -----------------------------------------------------------------------------------------------------


def test_one_process_is_rank_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.start("cpu") == ALONE
    with pytest.raises(InputError, match="--replicate 2: 1 ranks do not divide by it; expected a divisor of 1"):
        parallel.start("cpu", replicate=2)


def test_a_device_is_this_process_own(monkeypatch):
    assert parallel.pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [parallel.pick_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:3", "cuda:3", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.pick_device("auto") == "cpu"
    with pytest.raises(InputError, match="--device cuda: torch finds no CUDA device"):
        parallel.pick_device("cuda")


def places(replicate):
    world = parallel.start("cpu", replicate)
    parallel.stop(world)
    return world.rank, world.size, world.shard, world.shards


def test_replicas_hold_the_same_shards():
    assert run_ranks(2, places, 1) == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert run_ranks(2, places, 2) == [(0, 2, 0, 1), (1, 2, 0, 1)]

# ----- what ranks tell each other ------------------------------------------------------------------------------------


def told(total):
    """The result of each collective on this rank, for numbers that tell the ranks apart."""
    world = parallel.start("cpu")
    rows, called = torch.arange(total * 2.0).view(total, 2), []
    interleaved = parallel.interleaved_on_rank_0(world, rows[world.rank::world.size], total)

    def refused():
        called.append(world.rank)
        raise InputError(f"found by rank {world.rank}")
    with pytest.raises(InputError) as first:
        parallel.computed_on_rank_0(world, refused)
    with pytest.raises(OSError) as last:
        parallel.from_all(world, OSError(f"met by rank {world.rank}") if world.rank == world.size - 1 else None)
    found = {"sum": parallel.all_sum(world, [world.rank, 0.5, world.rank == 0]),
             "first": parallel.from_rank_0(world, f"said by {world.rank}"),
             "computed": parallel.computed_on_rank_0(world, lambda: world.rank + 10), "refused": str(first.value),
             "called": called, "failed": str(last.value), "all": parallel.from_all(world, {"rank": world.rank}),
             "interleaved": None if interleaved is None else torch.equal(interleaved, rows)}
    parallel.stop(world)
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_collectives_by_hand(size):
    """Three ranks: 0 + 1 + 2 = 3, three halves, one of them is rank 0; 7 rows are shares of 3, 2 and 2."""
    for rank, found in enumerate(run_ranks(size, told, 7)):
        assert found == {
            "sum": [3.0, 1.5, 1.0] if size == 3 else [0.0, 0.5, 1.0], "first": "said by 0", "computed": 10,
            "refused": "found by rank 0", "called": [0] if rank == 0 else [], "failed": f"met by rank {size - 1}",
            "all": [{"rank": one} for one in range(size)], "interleaved": True if rank == 0 else None}

# ----- rows that ranks share -----------------------------------------------------------------------------------------


def rows_of(rank, size, n):
    """A rank's rows of `n`, whose lengths tell them apart; the last of several ranks has none."""
    return [(i, np.arange(i, 2 * i, dtype=np.int32), np.full(i % 3, i, np.int32)) for i in range(rank, n, size)
            if size == 1 or rank < size - 1]


def shared(n, full_disk):
    """(whether all ranks' rows came, whether rank 0's change is seen, inodes mapped, files left), or the error."""
    world = parallel.start("cpu")
    parallel.ROWS_AT_A_TIME = 4
    if full_disk and world.rank == 0:
        n_bytes = 4 * sum(len(x) + len(y) for _, x, y in rows_of(0, world.size, n)) - 4  # all but the last number
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    rows = rows_of(world.rank, world.size, n)
    try:
        found = parallel.shared_rows(world, rows)
    except OSError as error:
        return one_line(error)
    expected = [row for rank in range(world.size) for row in rows_of(rank, world.size, n)]
    equal = len(found) == len(expected) and all(
        one[0] == other[0] and all(map(np.array_equal, one[1:], other[1:])) and one[1].dtype == np.int32
        for one, other in zip(found, expected))
    maps = [line.split() for line in open("/proc/self/maps") if "finemedlm-rows" in line]  # noqa: SIM115
    if world.rank == 0:
        found[1][1][0] = 77
    parallel.barrier(world)
    changed = bool(found[1][1][0] == 77)
    inodes = {fields[4] for fields in maps}
    parallel.stop(world)
    return equal, changed, inodes, os.listdir(tempfile.gettempdir())


@pytest.mark.parametrize("size", [1, 3])
def test_rows_are_mapped_from_one_file_that_has_no_name(size, tmp_path):
    outcomes = run_ranks(size, in_folder, tmp_path, shared, 21, False)
    for rank, (equal, changed, _, left) in enumerate(outcomes):
        assert equal and left == [] and changed == (rank == 0)
    inodes = [inodes for _, _, inodes, _ in outcomes]
    assert inodes == ([set()] if size == 1 else [inodes[0]] * 3) and len(inodes[0]) == size // 3


def in_folder(folder, function, *args):
    tempfile.tempdir = str(folder)
    return function(*args)


def test_a_full_temporary_folder_is_an_error_on_every_rank(tmp_path):
    assert run_ranks(2, in_folder, tmp_path, shared, 21, True) == [f"{tmp_path}: File too large"] * 2


def shared_where_one_rank_lacks(what, rank):
    """The error of `shared_rows` where this node's file cannot be made, or not opened, by a rank."""
    world = parallel.start("cpu")
    if world.rank == rank:
        def refuse(*args, **more):
            raise OSError(errno.EMFILE, "Too many open files", "rows")
        setattr(parallel if what == "open" else tempfile, what, refuse)
    if what == "mkstemp":
        os.environ["LOCAL_RANK"] = "0"  # each on a node of its own
    try:
        parallel.shared_rows(world, rows_of(world.rank, world.size, 5))
    except OSError as error:
        return one_line(error)


@pytest.mark.parametrize("what", ["open", "mkstemp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_file_is_an_error_on_every_rank_and_leaves_none(tmp_path, what, rank):
    said = run_ranks(2, in_folder, tmp_path, shared_where_one_rank_lacks, what, rank)
    assert said == ["rows: Too many open files"] * 2 and list(tmp_path.iterdir()) == []

# ----- sharded tensors -----------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Parameters that do not divide by three ranks; one has fewer rows than there are ranks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()
        for n, rows in enumerate((7, 9, 2)):
            self.register_parameter(f"p{n}", nn.Parameter(torch.arange(rows * 2.0).view(rows, 2)))


def cut_and_whole():
    """[(first row, this rank's rows, whether all ranks' rows together are the parameter)] for each parameter."""
    world, model = parallel.start("cpu"), Rows()
    whole = [parameter.detach().clone() for parameter in model.parameters()]
    parallel.shard(model, world)
    found = []
    for parameter, before in zip(model.parameters(), whole):
        rows = parallel.local(parameter).detach()
        again = parallel.full(parallel.sharded_like(world, parameter, rows.clone()))
        found.append((parallel.first_row(world, len(before)), rows.tolist(), torch.equal(again, before)))
    parallel.stop(world)
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_shards_are_rows_in_order_and_together_the_whole(size):
    """7 rows over 3 ranks are cut as 3, 3, 1, and 2 rows as 1, 1, 0: as torch.chunk cuts them."""
    for rank, found in enumerate(run_ranks(size, cut_and_whole)):
        for (first, rows, equal), n in zip(found, (7, 9, 2)):
            parts = torch.arange(n * 2.0).view(n, 2).chunk(size)
            expected = parts[rank] if rank < len(parts) else torch.empty(0, 2)
            assert equal and rows == expected.tolist()
            assert not rows or first == sum(map(len, parts[:rank]))


def shard_sizes(folder):
    on_meta, cut = [], train.shard

    def noting(model, world):
        on_meta.extend(parameter.is_meta for parameter in model.parameters())
        cut(model, world)
    train.shard = noting
    world, training = begin(folder, "bf16")
    sizes = {name: tuple(master.shape) for name, master in training.masters.items()}
    expected = train.load_training(folder, ALONE).masters
    exact = all(on_meta) and all(np.array_equal(whole, expected[name].numpy())
                for name, whole in whole_tensors(training, training.masters).items())
    parallel.stop(world)
    return sizes, exact


def test_each_rank_reads_only_its_rows(tiny_folder):
    """3 ranks: 96 words are 32 a rank; 32 rows are cut as 11, 11, 10; together they are the file's fp32 values.
    Until it is cut the model takes no memory."""
    outcomes = run_ranks(3, shard_sizes, tiny_folder)
    assert [sizes["embed.weight"] for sizes, _ in outcomes] == [(32, 32)] * 3
    assert [sizes["norm.weight"] for sizes, _ in outcomes] == [(11,), (11,), (10,)]
    assert all(exact for _, exact in outcomes)


def shard_of_8b():
    world = parallel.start("cpu")
    with torch.device("meta"):
        model = Llama(LlamaConfig()).to(torch.bfloat16)
    parallel.shard(model, world)
    sizes = [parallel.local(parameter).numel() for parameter in model.parameters()]
    parallel.stop(world)
    return sum(sizes), all(parallel.local(parameter).is_meta for parameter in model.parameters())


def test_an_8b_model_is_cut_before_it_takes_memory():
    """Llama-3.1-8B over two ranks: half of its 8,030,261,248 parameters each, on the meta device."""
    assert run_ranks(2, shard_of_8b) == [(8_030_261_248 // 2, True)] * 2


def logits_of_a_cut_model():
    world, model = parallel.start("cpu"), Llama(RUN_CONFIG).init_weights(1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        parallel.shard(model, world)
        error = (model(ids) - before).abs().max().item()
    cut = [parallel.local(parameter).numel() for parameter in (model.norm.weight, model.layers[0].mlp.down.weight)]
    parallel.stop(world)
    return error, cut


def test_a_cut_model_computes_what_it_did():
    for error, cut in run_ranks(2, logits_of_a_cut_model):
        assert error <= 1e-6 and cut == [32, 32 * 48 // 2]  # the root stays gathered after a pass without backward

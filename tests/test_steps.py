"""bench/steps.py: its flat step is adapt.py's, SIFT is as defined, groups hold the nearest, a killed run goes on."""
import argparse
import json

import numpy as np
import pytest
import torch
from conftest import random_texts, write_jsonl

from adapt import make_update
from bench import steps
from encoder import Encoder


@pytest.mark.parametrize("kind, optimizer", [("sign", "signsgd"), ("sgd", "sgd")])
def test_the_flat_step_is_the_step_of_the_program(kind, optimizer):
    generator = torch.Generator().manual_seed(0)
    weights, grad = (torch.randn(4096, generator=generator).mul_(scale).bfloat16() for scale in (0.05, 1e-3))
    exact = weights.float()
    make_update(optimizer, 1e-3, generator)(exact, grad)
    nearest = steps.stepped(weights, grad, None, None, torch.tensor(1e-3), kind, None, None)
    torch.testing.assert_close(nearest, exact.bfloat16(), rtol=0, atol=0)
    noise = torch.randint(-2**31, 2**31 - 1, (4096,), generator=generator, dtype=torch.int32)
    total = torch.zeros(4096)
    for _ in range(2000):
        factor = torch.randint(-2**31, 2**31 - 1, (), generator=generator, dtype=torch.int32) | 1
        total += steps.stepped(weights, grad, noise, factor, torch.tensor(1e-3), kind, None, None).float()
    gap = torch.finfo(torch.bfloat16).eps * exact.abs()  # at least half of the distance between two bf16 numbers
    assert ((total / 2000 - exact).abs() / gap).mean() < 0.02


def test_sift_leaves_the_least_variance():
    """Against the posterior variance of a Gaussian process, solved anew for every choice."""
    points = np.random.default_rng(0).normal(size=(12, 4))
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    points[5] = points[2] = 0.9 * points[0] + 0.1 * points[2]  # two of the same, near the query
    query, records = points[0], points[1:]

    def variance(chosen):
        x = records[chosen]
        return query @ query - query @ x.T @ np.linalg.solve(x @ x.T + 0.01 * np.eye(len(x)), x @ query)
    chosen = steps.sift(query, records, 6)
    for n in range(6):
        others = [i for i in range(11) if i not in chosen[:n]]
        assert variance(chosen[:n + 1]) == pytest.approx(min(variance([*chosen[:n], i]) for i in others))
    assert chosen[0] in (1, 4) and not {1, 4} <= {*chosen[:3]}
    assert sorted(steps.sift(query, records, 20)) == list(range(11))


def test_groups_hold_each_question_once_and_its_nearest():
    angles = np.array([0.0, 2.0, 0.1, 2.1, 0.2, 4.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert list(steps.groups([0, 1, 2, 3, 4, 5], vectors, size=3)) == [[0, 2, 4], [1, 3, 5]]


def test_a_question_that_a_kill_cut_short_is_asked_again_and_counts_once(tmp_path):
    def row(question, k, context, **more):
        return {"cell": "base-other", "row": question, "trial": "t", "seed": 0, "k": k, "context": context} | (
            {"nats": 1.0, "bytes": 1} | more)
    failed = {"cell": "base-other", "row": 3, "trial": "t", "seed": 0, "failed": "a log-likelihood is not finite"}
    whole = [row(1, k, context) for k in (1, 4) for context in (0, 4)]
    write_jsonl(tmp_path / "dev.jsonl", [*whole, row(2, 1, 0, nats=9.0), failed])
    trials = [{"name": "t", "cells": ["base-other", "sft-other"], "k": [1, 4], "context": [4], "questions": 3}]
    asked = {"base-other": [{"row": i} for i in (1, 2, 3, 5)], "sft-other": [{"row": 7}]}
    rows = steps.rows_of(tmp_path / "dev.jsonl")
    assert [(cell, one["row"], seed) for cell, one, _, seed in steps.jobs_of(rows, trials, asked)] == [
        ("base-other", 2, 0), ("sft-other", 7, 0)]
    assert [one["row"] for _, one, *_ in steps.jobs_of(rows, trials, asked, "sft")] == [7]
    again = [row(2, k, context) for k in (1, 4) for context in (0, 4)]
    write_jsonl(tmp_path / "dev.jsonl", [*whole, row(2, 1, 0, nats=9.0), *again])
    rows = steps.rows_of(tmp_path / "dev.jsonl")
    assert [one["row"] for _, one, *_ in steps.jobs_of(rows, trials, asked)] == [3, 7]
    assert steps.means(rows)["base-other", "t", 1, 0] == (pytest.approx(1 / np.log(2)), 2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """cells.json of 90 rows, every second on a page of its own, the others two a page, whose vectors are near."""
    out, texts = tmp_path_factory.mktemp("cells"), random_texts(180, seed=7)
    rows = [{"instruction": f"What is {texts[i]}?", "response": f"It is {texts[90 + i]}.",
             "url": f"https://a.org/{i if i % 2 else i // 4 * 4}", "part": ("A", "B", "dev", "test")[i // 4 % 4]}
            for i in range(90)]
    write_jsonl(out / "rows.jsonl", rows)

    class Fake:
        def encode(self, texts):
            draw = np.random.default_rng(len(texts[0])).normal
            vectors = draw(size=(len(texts), 4)).repeat(4, 0)[:len(texts)] + 0.5 * draw(size=(len(texts), 4))
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "from_dir", lambda folder: Fake())
        patch.setattr(steps, "docstrings", lambda: rows[:8])
        patch.setitem(steps.PROTOCOL, "questions", {"dev": 5, "test": 2, "fresh": 12})
        steps.cells(argparse.Namespace(out=out, traces=None))
    return out, rows, json.loads((out / "cells.json").read_text())["cells"]


def test_fresh_questions_are_of_b_and_what_is_left_of_the_test(drawn):
    out, rows, cells = drawn
    for setting in ("other", "same"):
        asked = {name: {one["row"] for one in cells[f"sft-{setting}"][name]} for name in ("dev", "test", "fresh")}
        assert len(asked["fresh"]) == 12 and {rows[i]["part"] for i in asked["fresh"]} == {"B", "test"}
        assert not asked["fresh"] & (asked["test"] | asked["dev"]) and "fresh" not in cells[f"base-{setting}"]
        assert {i % 2 for i in asked["fresh"]} == {int(setting == "other")}
        written = (out / f"eval/fresh-{setting}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in written] == [
            rows[one["row"]] for one in cells[f"sft-{setting}"]["fresh"]]
    index, shuffled, python = ([*map(json.loads, (out / f"eval/{name}.jsonl").read_text().splitlines())]
                               for name in ("sft-test", "sft-shuffled", "python"))
    assert {row["part"] for row in index} == {"B", "test"} and python == rows[:8]
    a_third = len(index) // 3
    answers = [row["response"] for row in index]
    assert shuffled == [row | {"response": answer} for row, answer in zip(index, answers[a_third:] + answers[:a_third])]


def test_no_question_is_a_neighbour_of_itself_or_of_its_group(drawn):
    _, rows, cells = drawn
    for cell in steps.PROTOCOL["cells"]:
        allowed = {*steps.PROTOCOL["index"][cell.split("-")[0]]}
        for name, asked in cells[cell].items():
            for one in asked:
                lists = {kind: [i for i, _ in found] for kind, found in one.items() if isinstance(found, list)}
                assert set(lists) == {"nearest", "random", *(["once", "sift", "group"] if name == "dev" else [])}
                assert all(found and one["row"] not in found for found in lists.values())
                assert {rows[i]["part"] for found in lists.values() for i in found} <= allowed | {
                    "test" if name == "fresh" else name}
        dev = [one["row"] for one in cells[cell]["dev"]]
        grouped = [[i for i, _ in one["group"]] for one in cells[cell]["dev"]]
        for same in {tuple(found) for found in grouped}:  # the members of a group share one list
            members = {row for row, found in zip(dev, grouped) if tuple(found) == same}
            assert not members & {*same} and len(members) <= 4

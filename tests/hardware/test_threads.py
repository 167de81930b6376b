"""Threads that compute chunks of tasks at once: the same bits as one thread, also with modules and with errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml.config.compose import compose
from maml.domain.base import without_data
from maml.domain.omniglot import Omniglot
from maml.experiment import build_algorithm
from maml.hardware.base import Execution, Hardware
from maml.hardware.threads import map_chunks, num_threads, use_threads
from maml.seeding import Stream
from maml.training.iteration import Iteration
from maml.types import num_tasks


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    yield
    use_threads(1, thread_chunks=False)


def test_chunks_are_computed_at_once_in_order_with_one_thread_each() -> None:
    use_threads(3, thread_chunks=True)
    together = threading.Barrier(3, timeout=60)

    def compute(chunk: int) -> tuple[int, int, bool]:
        together.wait()  # fails unless three threads are here at once
        return chunk, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(map_chunks(compute, range(6))) == [(chunk, 1, True) for chunk in range(6)]
    with torch.no_grad():
        assert not any(enabled for *_, enabled in map_chunks(compute, range(6)))
    assert (num_threads(), torch.get_num_threads()) == (3, 1)


def test_threads_that_share_operations_compute_chunks_one_by_one() -> None:
    use_threads(2, thread_chunks=False)
    assert (num_threads(), torch.get_num_threads()) == (2, 2)
    names = list(map_chunks(lambda _: threading.current_thread().name, range(4)))
    assert names == [threading.current_thread().name] * 4


def test_error_in_a_chunk_is_raised_and_the_threads_go_on_working() -> None:
    use_threads(2, thread_chunks=True)

    def fail(chunk: int) -> int:
        if chunk == 2:
            raise torch.OutOfMemoryError("chunk 2")
        return chunk

    with pytest.raises(torch.OutOfMemoryError, match="chunk 2"):
        list(map_chunks(fail, range(5)))
    assert list(map_chunks(lambda chunk: chunk + 1, range(5))) == [1, 2, 3, 4, 5]


class Net(nn.Module):
    """A user's network, into which each call puts the parameters of a task."""

    def __init__(self, in_shape: tuple[int, ...], out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_shape[-1], 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 7 * 7, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


SMALL = ["hardware=cpu", "meta_batch_size=3"]
CASES = {
    "images": ["+experiment=omniglot_5way_1shot", "model.num_filters=4"],
    "several steps": ["+experiment=omniglot_5way_1shot", "model.num_filters=4", "inner.num_steps=2"],
    "recomputed": ["+experiment=omniglot_5way_1shot", "model.num_filters=4", "hardware.recompute=true"],
    "running statistics": ["+experiment=omniglot_5way_1shot_matching", "model.num_filters=4"],
    "module": ["+experiment=omniglot_5way_1shot", "model=module", f"model.module._target_={__name__}.Net"],
    "rollouts": ["+experiment=point_navigation_maml", "domain.num_shots=2"],
    "autograd in rollouts": ["+experiment=point_navigation_maml", "domain.num_shots=2", "inner=adam"],
}


@pytest.mark.parametrize("name", CASES)
def test_three_threads_make_the_updates_of_one_to_the_bit(name: str, cache_dir: Path) -> None:
    settings, _ = compose([*CASES[name], *SMALL, f"cache_dir={cache_dir}"])

    def train(threads: int) -> dict[str, Tensor]:
        hardware = Hardware("cpu", num_threads=threads)
        algorithm = build_algorithm(settings, hardware)
        execution = hardware.choose(algorithm.domain.workload, 3, {})
        execution = replace(execution, task_chunk=1, thread_chunks=True, recompute=settings.hardware["recompute"])
        hardware.apply(execution)
        iterate = Iteration([algorithm], [Stream(0)], settings.meta_batch_size, execution)
        assert num_tasks(iterate.sample_tasks(1)) == 3
        metrics = [iterate(number)[0] for number in (1, 2)][-1]
        return {**algorithm.theta, **algorithm.buffers, **metrics}

    one, three = train(1), train(3)
    assert one.keys() == three.keys() and len(one) > 3
    for key, value in one.items():
        assert torch.equal(value, three[key]), key


def test_resumed_simulation_may_have_another_number_of_threads() -> None:
    settings, _ = compose(["+experiment=point_navigation_maml", "hardware=cpu"])
    hardware = Hardware("cpu", num_threads=4)
    workload = build_algorithm(settings, hardware).domain.workload
    before = Execution(1, 2, False).as_dict()
    del before["thread_chunks"]  # a checkpoint of earlier versions
    for earlier in (before, hardware.choose(workload, 100, {}).as_dict()):
        chosen = Hardware("cpu", num_threads=7).choose(workload, 100, earlier)
        assert (chosen.num_threads, chosen.thread_chunks) == (7, True)
    assert chosen.for_meta_test(workload) == chosen, "simulators divide the tasks there, too"
    with without_data():
        images = Omniglot(num_ways=5, num_shots=1, data_dir="", cache_dir="").workload
    divided = replace(chosen, num_threads=3, thread_chunks=True)
    assert not divided.for_meta_test(images).thread_chunks
    kept = Hardware("cpu").choose(images, 100, divided.as_dict())
    assert (kept.num_threads, kept.thread_chunks) == (3, True), "their meta-test depends on the number of threads"
    shared = before | {"num_threads": 2}  # several threads per operation: other bits
    assert not Hardware("cpu").choose(workload, 100, shared).thread_chunks
    assert Hardware("cpu").choose(workload, 100, shared).num_threads == 2

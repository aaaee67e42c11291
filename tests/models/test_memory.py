from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from openmae.models.memory import LiveMemory


def test_tensors_are_counted_while_they_live() -> None:
    given = torch.zeros(100)
    with LiveMemory([given, given[:50]]) as memory:
        assert memory.bytes == 400, "a view has no memory of its own"
        made = given + 1
        view = made.view(10, 10)
        assert memory.bytes == 800
        del made
        assert memory.bytes == 800, "its view still needs it"
        del view
        assert (memory.bytes, memory.peak) == (400, 800)
    torch.zeros(10_000)
    assert memory.peak == 800, "made outside"


def test_a_backward_pass_frees_what_it_no_longer_needs() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveMemory([weight]) as memory:
        loss = (weight.sin().cos() * weight).sum()
        assert memory.bytes > 3 * 4000
        loss.backward()
    assert memory.bytes == 2 * 4000 + 4, "weight, gradient and loss"


def test_fake_tensors_have_the_memory_of_real_ones() -> None:
    peaks = []
    for mode in (FakeTensorMode(), torch.enable_grad()):
        with mode, LiveMemory() as memory:
            weight = torch.ones(64, 64, requires_grad=True)
            ((torch.ones(8, 64) @ weight).relu() @ weight).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]

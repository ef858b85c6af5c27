"""The arena: bytes of activations that are needed at once, by liveness in order of execution."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxcompress.cost.timing.fused_kernels import Kernel
from jaxcompress.graph.flat_list import LOOP, Inlined, rows


class Arena(NamedTuple):
    """Bytes that are live while each kernel runs, and the kernel where they are most."""

    peak_bytes: int
    at: int  # number of the kernel; -1 if there is none
    live_bytes: tuple[int, ...]


def arena(
    program: Inlined, kernels: Sequence[Kernel], *, value_bytes: Callable[[int], int]
) -> Arena:
    """Live bytes of inputs, results and everything in between, kernel by kernel.

    An array lives from the kernel that writes it to the last one that reads it; inputs from the
    start, results to the end. A result takes over the buffer of an operand that dies, if the
    kernel reads it element by element. Where an allocator cannot fill the gaps between buffers
    of different sizes, it needs more.
    """
    last = _last_uses(program, kernels)
    parts = {n for k in kernels if k.ops[0].primitive == LOOP for n in rows(k.ops[0])[1]}
    sizes = {n: 0 if n in parts else value_bytes(n) for n in last}
    live = {n for n in program.inputs if n in last}
    now, taken = sum(sizes[n] for n in live), []
    for i, kernel in enumerate(kernels):
        new = [n for n in kernel.writes if n not in live]
        dying = {n for n in live if last[n] <= i}
        now += sum(sizes[n] for n in new)
        taken.append(now - _shared(kernel, dying, sizes))
        live.update(new)
        ended = {n for n in live if last[n] <= i}
        now -= sum(sizes[n] for n in ended)
        live -= ended
    peak = max(taken, default=0)
    return Arena(peak, taken.index(peak) if taken else -1, tuple(taken))


def _last_uses(program: Inlined, kernels: Sequence[Kernel]) -> dict[int, int]:
    last: dict[int, int] = {}
    for i, kernel in enumerate(kernels):
        last.update(dict.fromkeys((*kernel.writes, *kernel.reads), i))
    written = {n for kernel in kernels for n in kernel.writes}
    results = set(program.outputs)
    return {n: len(kernels) if n in results and n in written else i for n, i in last.items()}


def _shared(kernel: Kernel, dying: set[int], sizes: dict[int, int]) -> int:
    # Bytes of results that lie where an operand was.
    used: set[int] = set()
    saved = 0
    for read, write in kernel.in_place:
        if read in dying and not {read, write} & used and sizes[write] <= sizes[read]:
            used |= {read, write}
            saved += sizes[write]
    return saved

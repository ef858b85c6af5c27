"""Kernels: which operations run together, and which arrays go to memory in between."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxcompress.cost import operations
from jaxcompress.cost.operations import is_light
from jaxcompress.graph.flat_list import END, LOOP, Inlined, Op, carried
from jaxcompress.graph.primitives import row

FUSIONS = ("none", "loops", "activation", "elementwise", "layer")
"""How much a runtime joins to one kernel.

none: every operation is a kernel (views are free). loops: elementwise operations join each other,
contractions stay alone. activation: elementwise operations join the
kernel of their one operand that is computed (bias, folded normalization, activation function).
elementwise: also where several are (residual additions), and slices and pads join what reads them.
layer: also reductions (softmax, normalization, pooling).
"""


def _contracts(op: Op) -> bool:
    return row(op.primitive).kind == "contract"


def _stands_alone(op: Op) -> bool:
    return op.primitive in (LOOP, END) or row(op.primitive).kind in ("contract", "index")


@dataclass
class Kernel:
    """Operations that run together.

    Attributes:
      ops: in order; a contraction, if there is one, comes first but for casts and slices.
      region: the loops around it.
      reads, writes: values that it takes from memory and leaves there (no parameters).
      in_place: (value read, value written) that may share a buffer if the first is not needed
        later: it is read element by element, by none but elementwise operations.
    """

    ops: list[Op]
    region: tuple
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    marks: bool = field(default=False)  # the begin or end of a loop

    @property
    def root(self) -> Op:
        """The operation that it is named after: the contraction, else the heaviest kind."""
        order = sorted(self.ops, key=lambda op: (not _contracts(op), is_light(op)))
        return order[0]

    @property
    def contraction(self) -> Op | None:
        """Its contraction."""
        return self.root if _contracts(self.root) else None

    @property
    def times(self) -> int:
        """How often it runs."""
        return self.ops[0].times


def kernels(program: Inlined, *, fusion: str) -> list[Kernel]:
    """The kernels of a program in the order they run; nothing that no input reaches is in them."""
    live = [op for op in program.ops if _runs(program, op)]
    groups = _joined(program, live, fusion)
    made = [_kernel(ops) for ops in groups if ops]
    _traffic(program, made)
    return made


def _runs(program: Inlined, op: Op) -> bool:
    if op.primitive in (LOOP, END):
        return True
    return any(program.values[n].origin.data for n in op.outputs)


def _kernel(ops: list[Op]) -> Kernel:
    first = ops[0]
    return Kernel(ops, first.region, marks=first.primitive in (LOOP, END))


def _consumers(live: Sequence[Op]) -> dict[int, list[int]]:
    users: dict[int, list[int]] = {}
    for i, op in enumerate(live):
        for n in set(op.inputs):
            users.setdefault(n, []).append(i)
    return users


def _joins(fusion: str) -> Callable[[Op], bool]:
    if fusion == "none":
        return operations.is_view
    if fusion == "layer":
        return lambda op: not _stands_alone(op)
    return is_light


def _joined(program: Inlined, live: Sequence[Op], fusion: str) -> list[list[Op]]:
    joins = _joins(fusion)
    users = _consumers(live)
    producer: dict[int, int] = {}  # value -> group
    group_of: list[int] = []
    contracted: set[int] = set()
    regions: list[
        tuple | None
    ] = []  # of the groups; None for the marks of loops, which nothing joins
    for op in live:
        computed = {producer[n] for n in op.inputs if n in producer}
        latest = max(computed, default=-1)
        alone = not joins(op) or latest < 0 or regions[latest] != op.region
        if fusion == "activation" and len(computed) > 1:
            alone = True
        if fusion == "loops" and latest in contracted and not operations.is_view(op):
            alone = True
        if alone:
            latest = len(regions)
            regions.append(op.region if op.primitive not in (LOOP, END) else None)
            if _contracts(op):
                contracted.add(latest)
        group_of.append(latest)
        producer.update(dict.fromkeys(op.outputs, latest))
    if fusion not in ("none", "activation"):
        _defer(program, live, group_of, users)
    groups: list[list[Op]] = [[] for _ in regions]
    for op, group in zip(live, group_of, strict=True):
        groups[group].append(op)
    return groups


def _defer(
    program: Inlined, live: Sequence[Op], group_of: list[int], users: dict[int, list[int]]
) -> None:
    # A light operation that is read by nothing but light operations (or reductions) of one later
    # kernel of the same loop runs there: its result need not be stored. In front of a contraction
    # only moves do, since arithmetic belongs to the kernel whose result it finishes.
    heavy = {group for op, group in zip(live, group_of, strict=True) if _stands_alone(op)}
    results = set(program.outputs)
    for i in reversed(range(len(live))):
        op = live[i]
        readers = [j for n in op.outputs for j in users.get(n, ())]
        targets = {group_of[j] for j in readers}
        if not is_light(op) or len(targets) != 1 or results & set(op.outputs):
            continue
        (target,) = targets
        same_loop = all(live[j].region == op.region for j in readers)
        contracted = any(_contracts(live[j]) for j in readers)
        if target == group_of[i] or not same_loop or contracted:
            continue
        if operations.is_move(op) or not {target, group_of[i]} & heavy:
            group_of[i] = target


def _traffic(program: Inlined, made: list[Kernel]) -> None:
    same = _views(made)
    data = {n for n, value in program.values.items() if value.origin.data}
    home: dict[int, int] = {}
    for i, kernel in enumerate(made):
        for op in kernel.ops:
            home.update((n, i) for n in op.outputs if n not in same)
    read_elsewhere = {same.get(n, n) for n in program.outputs}
    for i, kernel in enumerate(made):
        operands = (same.get(n, n) for op in kernel.ops for n in op.inputs)
        kernel.reads = tuple(dict.fromkeys(n for n in operands if home.get(n) != i and n in data))
        read_elsewhere.update(kernel.reads)
    for kernel in made:
        results = (n for op in kernel.ops for n in op.outputs if n not in same)
        kernel.writes = tuple(n for n in results if n in read_elsewhere and n in data)
        pairs = _in_place(program, kernel, same)
        kernel.in_place = tuple((read, write) for read, write in pairs if write in kernel.writes)


def _views(made: list[Kernel]) -> dict[int, int]:
    # Value -> the value that it is a view of.
    same: dict[int, int] = {}
    for kernel in made:
        for op in kernel.ops:
            if operations.is_view(op) and op.inputs:
                pairs = zip(op.inputs, op.outputs, strict=False)
                same.update((out, same.get(n, n)) for n, out in pairs)
    return same


def _in_place(program: Inlined, kernel: Kernel, same: dict[int, int]) -> Iterator[tuple[int, int]]:
    op = kernel.ops[0]
    if op.primitive == LOOP:
        entering, inside = carried(op)
        yield from (
            (same.get(a, a), b) for a, b in zip(entering, inside, strict=True) if a is not None
        )
    elif op.primitive == END:
        finals = op.operands[len(op.operands) - len(op.eqn.outvars) :][: len(op.outputs)]
        yield from (
            (same.get(a, a), b) for a, b in zip(finals, op.outputs, strict=True) if a is not None
        )
    else:
        size = {n: program.values[n].aval.size for n in (*kernel.reads, *kernel.writes)}
        for read in kernel.reads:
            readers = (op for op in kernel.ops if read in (same.get(n, n) for n in op.inputs))
            if all(_one_for_one(op) for op in readers):
                yield from ((read, n) for n in kernel.writes if size[n] == size[read])


def _one_for_one(op: Op) -> bool:
    return operations.is_view(op) or (is_light(op) and not operations.moves(op))

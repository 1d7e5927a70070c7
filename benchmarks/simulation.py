"""The time of compiled code on a streaming multiprocessor of compute capability 9.0, its waiting included.

The code itself says how long a warp waits: every instruction carries the cycles until the next may go, the scoreboards
it sets when it is through or has read its operands, and those it waits for. Quarters of a multiprocessor issue one
instruction a cycle, of the first of their warps that is ready; every unit is busy for as many cycles as it takes for 32
lanes. What is not in the code is assumed: latencies, above all that of loads, and that units are all a warp shares with
others. Neither the memory's bandwidth nor caches of instructions are part of it.
"""

import heapq
import re
from collections import defaultdict

from disassembly import Case, Compiled, Instruction, loops, parse

CLOCK = 1.98e9
MULTIPROCESSORS = 132
REGISTERS, SHARED_BYTES, BLOCKS, WARPS = 65536, 227 * 1024, 32, 64
"""What a multiprocessor has for the blocks it runs at once; a block takes 1 KiB of shared memory more than it asks."""

LOAD = 600
"""Cycles of a load from memory; from the second cache about 270, from the first 35."""
LATENCIES = {
    "LDG": LOAD,
    "LDGSTS": LOAD,
    "ATOM": LOAD,
    "LDS": 30,
    "LDSM": 33,
    "SHFL": 24,
    "MUFU": 22,
    "HMMA": 33,
    "LDC": 40,
}
OTHER_LATENCY, READ, BARRIER = 12, 14, 10
"""Cycles of other instructions, until operands are read, and from a barrier's last warp on."""

INTEGER = "IADD3 LOP3 ISETP FSETP SEL FSEL FMNMX PRMT SHF MOV PLOP3 LEA IABS VIMNMX VIADD SGXT BMSK P2R R2P CS2R"
UNITS = {
    "float": (1, "FADD FMUL FFMA HFMA2 HADD2 HMUL2"),
    "multiply": (2, "IMAD IDP"),
    "integer": (2, f"{INTEGER} F2FP I2FP"),
    "special": (8, "MUFU F2F F2I I2F FRND POPC FLO BREV"),
    "memory": (4, "LDG STG LDS STS LDSM STSM LDL STL LDGSTS SHFL ATOM ATOMS RED"),
    "matrix": (8, "HMMA"),
    "uniform": (2, "R2UR S2UR REDUX VOTEU"),
}
"""Cycles of a quarter's unit, or of its share of the memory's, for a warp's instruction that moves 32 bits a lane."""
_UNITS = {name: (unit, cycles) for unit, (cycles, names) in UNITS.items() for name in names.split()}


def _name(instruction: Instruction) -> str:
    return re.split(r"\W", instruction.text)[0]


def _unit(instruction: Instruction) -> tuple[str | None, int]:
    """Which unit an instruction occupies for how many cycles; None where that is nothing but its issue."""
    name = _name(instruction)
    if product := re.match(r"HGMMA\.64x(\d+)x", instruction.text):
        return "product", int(product[1]) // 2  # 1024 multiply-adds a cycle and quarter in bfloat16
    unit, cycles = _UNITS.get(name, ("uniform", 2) if name.startswith("U") else (None, 1))
    if unit == "memory":
        wide = re.search(r"\.(64|128|M88\.2|M88\.4)\b", instruction.text.split()[0])
        cycles *= {"64": 2, "128": 4, "M88.2": 2, "M88.4": 4}[wide[1]] if wide else 1
    return unit, cycles


def _path(code: list[Instruction], trips: tuple[float, ...]) -> list[int]:
    """What one warp runs: the code from top to bottom, loops as often as they run on average, rounded."""
    bodies = sorted(loops(code).items())
    spans = [(start, max(body), round(trip)) for (start, body), trip in zip(bodies, trips, strict=True)]

    def walk(first: int, last: int, inside: list[tuple[int, int, int]]) -> list[int]:
        path: list[int] = []
        while first <= last:
            loop = next((span for span in inside if span[0] == first), None)
            if loop is None:
                path.append(first)
                first += 1
                continue
            inner = [span for span in inside if span != loop and loop[0] <= span[0] and span[1] <= loop[1]]
            path += walk(loop[0], loop[1], inner) * loop[2]
            first = loop[1] + 1
        return path

    end = max(i for i, instruction in enumerate(code) if instruction.text.startswith("EXIT"))
    return walk(0, end, spans)


class _Warp:
    """Where a warp is, and what it has on its way."""

    def __init__(self, rounds: int) -> None:
        self.at, self.left = 0, rounds
        self.through = [0.0] * 6
        """When its scoreboards are."""
        self.setter = [""] * 6
        self.copies = 0.0
        """When the last of its copies into shared memory has arrived."""
        self.groups: list[float] = []
        """When its groups of copies have."""
        self.product = 0.0
        """When its last `wgmma` is through."""

    def behind(self, instruction: Instruction) -> tuple[float, str]:
        """Until when an instruction waits for others of this warp, and for which."""
        text = instruction.text
        if text.startswith("WARPGROUP.DEPBAR"):
            return self.product, "HGMMA"
        if copies := re.match(r"DEPBAR\.LE SB\d, (\w+)", text):
            pending = int(copies[1], 16)
            return self.groups[-1 - pending] if len(self.groups) > pending else 0.0, "LDGSTS"
        board = max(instruction.waits, key=lambda b: self.through[b], default=None)
        return (0.0, "") if board is None else (self.through[board], self.setter[board])

    def issue(self, instruction: Instruction, now: float, late: float) -> None:
        """Set what the instruction sets; `late` is how long it keeps its unit, if others wait for that."""
        name = _name(instruction)
        done = now + late + LATENCIES.get(name, OTHER_LATENCY)
        if name == "HGMMA":
            self.product = done
        if name == "LDGSTS":
            self.copies = done
        if name == "LDGDEPBAR":
            done = max(done, self.copies)
            self.groups.append(done)
        for board, when in ((instruction.result, done), (instruction.read, now + late + READ)):
            if board is not None and when > self.through[board]:
                self.through[board], self.setter[board] = when, name


def _run(
    code: list[Instruction], path: list[int], warps: int, rounds: int, together: int
) -> tuple[float, dict[str, float]]:
    """Cycles until a quarter's `warps` have run the path `rounds` times each, and how long the first waited and why.

    `together` of them are of one block and wait at its barriers for one another.
    """
    units = [_unit(instruction) for instruction in code]
    all_warps = [_Warp(rounds) for _ in range(warps)]
    arrived: dict[int, list[int]] = defaultdict(list)
    free: dict[str | None, float] = defaultdict(float)
    waits: dict[str, float] = defaultdict(float)
    issue = end = 0.0
    ready = [(0.0, number) for number in range(warps)]
    while ready:
        now, number = heapq.heappop(ready)
        warp = all_warps[number]
        i = path[warp.at]
        instruction, (unit, cycles) = code[i], units[i]
        behind, whom = warp.behind(instruction)
        when = max(now, behind, issue, free[unit] if unit else 0.0)
        if when > now:
            if number == 0:
                waits[whom if behind == when else unit or "issue"] += when - now
            heapq.heappush(ready, (when, number))
            continue
        issue = now + 1
        if unit:
            free[unit] = now + cycles
        warp.issue(instruction, now, cycles if unit in ("memory", "product") else 0)
        following = now + max(instruction.stall, 1)
        if number == 0:
            waits["fixed"] += following - now - 1
        warp.at += 1
        if warp.at == len(path):
            warp.at, warp.left = 0, warp.left - 1
            end = max(end, following)
        if not warp.left:
            continue
        block = number // together
        if instruction.text.startswith("BAR.SYNC"):
            arrived[block].append(number)
            if len(arrived[block]) < min(together, warps - block * together):
                continue
            for other in arrived.pop(block):
                heapq.heappush(ready, (following + BARRIER, other))
        else:
            heapq.heappush(ready, (following, number))
    return end, waits


def resident(case: Case, compiled: Compiled) -> float:
    """Warps that a multiprocessor runs at once, on average if there is less work than place."""
    registers = -(-compiled.registers // 8) * 8 * 32 * case.warps
    blocks = min(BLOCKS, WARPS // case.warps, REGISTERS // registers, SHARED_BYTES // (compiled.shared + 1024))
    return min(blocks, case.programs / MULTIPROCESSORS) * case.warps


def simulate(case: Case, compiled: Compiled) -> tuple[float, dict[str, float]]:
    """Milliseconds of the grid, and what shares of its time a warp that has a quarter for itself waits for what.

    Raises:
        ValueError: the code has another number of loops than the case says.
    """
    code = parse(compiled.code)
    path = _path(code, case.trips)
    mine = max(resident(case, compiled) / 4, 1)
    fewer = int(mine)
    # Some quarters have a warp more than others, and run so many more paths a cycle.
    together = max(case.warps // 4, 1)
    rate = 0.0
    for warps, share in ((fewer, 1 - mine % 1), (fewer + 1, mine % 1)):
        if share:
            rounds = max(1, min(3, round(case.programs * case.warps / MULTIPROCESSORS / 4 / warps)))
            rate += share * warps * rounds / _run(code, path, warps, rounds, together)[0]
    cycles, waits = _run(code, path, 1, 1, 1)
    paths = max(case.programs * case.warps / MULTIPROCESSORS / 4, 1)  # no warp runs less than one
    longest = sorted(waits, key=lambda name: -waits[name])[:3]
    return paths / rate / CLOCK * 1e3, {name: waits[name] / cycles for name in longest}

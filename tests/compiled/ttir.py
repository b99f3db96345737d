"""Read Triton's own intermediate code, before any target: the types that addresses and arithmetic run in.

An address into [B, L, V] passes 2^31 at row 14122 of V = 152064, so a product in it must be i64. The one product that
32 bits always hold is a constant times a remainder, a column of a block, or a quotient of those: an offset in a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

VALUE = r"%[\w-]+(?:#\d+)?"
POINTER_OPS = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "arith.select", "tt.addptr")
BOUNDED_OPS = ("arith.remsi", "arith.remui", "tt.make_range", "arith.constant")
SHAPE_OPS = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui")


@dataclass
class Operation:
    """One definition: the operation, what it reads, and the text of the line."""

    name: str
    operands: list[str]
    line: str = ""


@dataclass
class Function:
    """The definitions of a kernel by value name; loop-carried values read their start and what the loop yields."""

    arguments: set[str]
    definitions: dict[str, Operation] = field(default_factory=dict)

    def operation(self, value: str) -> Operation:
        """Return what defines a value; arguments are defined by nothing."""
        return self.definitions.get(value, Operation("argument", []))


def parse(text: str) -> Function:
    """Parse the text of a module with one kernel."""
    text = re.sub(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", text)
    header = next(line for line in text.splitlines() if "tt.func public" in line)
    function = Function(set(re.findall(rf"({VALUE}):", header)))
    regions: list[list[str]] = []  # the values that a yield of each open region feeds, in order
    names: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        _define(function, _renamed(line, names), regions)
    return function


def _renamed(line: str, names: dict[str, str]) -> str:
    """Give a name that regions beside each other use for different values a new one from its second definition on."""
    for name in re.findall(r"(%[\w-]+)(?::\d+)? = ", line):
        names[name] = name if name not in names else f"{names[name]}-again"
    return re.sub(r"%[\w-]+", lambda found: names.get(found[0], found[0]), line)


def _define(function: Function, line: str, regions: list[list[str]]) -> None:
    if line.startswith("}"):
        closed = regions.pop() if regions else []
        if line.endswith("{"):
            regions.append(closed)  # } else {
        return
    found = re.match(r"(%[\w-]+)(?::(\d+))? = \"?([\w.]+)\"?(.*)", line)
    yields = re.match(r"scf\.yield (.*?)(?: :|$)", line)
    opened: list[str] = []
    if yields:
        values = re.findall(VALUE, yields[1])
        for k, value in enumerate(values):
            for name in regions[-1][k :: len(values)]:
                function.definitions[name].operands.append(value)
    elif found:
        name, count, operation, rest = found.groups()
        results = [name] if count is None else [f"{name}#{k}" for k in range(int(count))]
        if operation == "scf.for":
            opened = _define_loop(function, rest, results)
        elif operation.startswith("scf."):
            opened = results
            for result in results:
                function.definitions[result] = Operation("carried", [])
        else:
            for result in results:
                function.definitions[result] = Operation(operation, re.findall(VALUE, rest), line)
    elif loop := re.match(r"scf\.for (.*)", line):
        opened = _define_loop(function, loop[1], [])
    else:
        _define_block_arguments(function, line)
    if line.endswith("{"):
        regions.append(opened)


def _define_loop(function: Function, rest: str, results: list[str]) -> list[str]:
    counter, bounds = re.match(rf"\s*({VALUE}) = ({VALUE} to {VALUE} step {VALUE})", rest).groups()
    function.definitions[counter] = Operation("counter", re.findall(VALUE, bounds), rest)
    carried = re.search(r"iter_args\((.*?)\)", rest)
    pairs = re.findall(rf"({VALUE}) = ({VALUE})", carried[1]) if carried else []
    for k, (name, start) in enumerate(pairs):
        function.definitions[name] = Operation("carried", [start])
        if results:
            function.definitions[results[k]] = Operation("carried", [start])
    return [name for name, _ in pairs] + results


def _define_block_arguments(function: Function, line: str) -> None:
    if block := re.match(r"\^(\w+)\((.*)\):", line):
        for k, name in enumerate(re.findall(rf"({VALUE}):", block[2])):
            function.definitions[name] = Operation("carried", [f"%{block[1]}#{k}"])
    for target, arguments in re.findall(r"\^(\w+)\(([^:)]*)[^)]*\)", line) if line.startswith("cf.") else []:
        for k, value in enumerate(re.findall(VALUE, arguments)):
            function.definitions.setdefault(f"%{target}#{k}", Operation("carried", [])).operands.append(value)


def narrow_addresses(text: str) -> list[str]:
    """Return the pointer arguments that are offset by a product which 32 bits may not hold."""
    function = parse(text)
    found = set()
    for operation in list(function.definitions.values()):
        if operation.name == "tt.addptr":
            base, offset = operation.operands[:2]
            if any(_is_narrow_product(function, value) for value in _slice(function, offset)):
                found |= _base_arguments(function, base)
    return sorted(name.lstrip("%") for name in found)


def _is_narrow_product(function: Function, value: str) -> bool:
    operation = function.operation(value)
    if operation.name not in ("arith.muli", "arith.shli") or not re.search(
        r"\bi32\b|xi32>", operation.line.split(":")[-1]
    ):
        return False
    origins = [_unshaped(function, operand).name for operand in operation.operands[:2]]
    return not ("arith.constant" in origins and all(origin in BOUNDED_OPS for origin in origins))


def _unshaped(function: Function, value: str) -> Operation:
    operation = function.operation(value)
    while operation.name in (*SHAPE_OPS, "arith.divsi"):
        operation = function.operation(operation.operands[0])
    return operation


def _slice(function: Function, value: str) -> set[str]:
    """Return every value that goes into an integer by arithmetic; what was loaded from memory is data."""
    seen: set[str] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            operation = function.operation(value)
            if operation.name != "tt.load":
                waiting += operation.operands
    return seen


def _base_arguments(function: Function, base: str) -> set[str]:
    seen: set[str] = set()
    waiting, found = [base], set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        operation = function.operation(value)
        if value in function.arguments:
            found.add(value)
        elif operation.name == "arith.select":
            waiting += operation.operands[1:]
        elif operation.name == "carried":
            waiting += operation.operands
        elif operation.name in POINTER_OPS:
            waiting.append(operation.operands[0])
    return found


def narrow_arithmetic(text: str) -> list[str]:
    """Return the lines that compute, compare or reduce in a float type other than fp32."""
    lines = [line.split(" loc(")[0].strip() for line in text.splitlines()]
    return [
        line
        for line in lines
        if re.search(r"= (arith\.\w+f\b|math\.)", line)
        and not re.search(r"= arith\.(extf|truncf)\b", line)
        and re.search(r"\b(bf16|f16|f64)\b|x(bf16|f16|f64)>", line.split(" : ")[-1])
    ]


def streamed_bytes(text: str, element: str) -> dict[str, int]:
    """Return the bytes of the largest block of `element` (`bf16`, ...) that one load and one store move."""
    size = {"bf16": 2, "f16": 2, "f32": 4}[element]
    moved = {}
    for what in ("load", "store"):
        blocks = re.findall(rf"tt\.{what} .*?: tensor<(\d+)x!tt\.ptr<{element}>>", text)
        moved[what] = max(map(int, blocks), default=0) * size
    return moved

"""The explanation of a model: every parameter, and the totals; as text, for rich, as plain data."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from curvlib.explanation.counting import FORMULAS

__all__ = ["Explanation", "ParameterRow"]

_COSTS = ("factor_bytes", "inverse_bytes", "kept_bytes", "capture_flops", "refresh_flops", "step_flops")


@dataclass(frozen=True)
class ParameterRow:
    """What happens to one parameter.

    Parameters
    ----------
    name, shape, size
        Qualified name, shape and number of elements.
    block
        Name of its block, "" for none.
    adapter
        Name of the adapter; "rest", "uncovered" or "frozen" outside every block.
    closed_form
        Whether the adapter is a formula; otherwise it is the `torch.func` fallback. None outside every block.
    solver
        The block's solver; how it is treated outside every block.
    exact
        Whether its direction is that of the exact damped block, up to rounding.
    why
        Why it is not, or what else to know.
    rows
        Rows of the block's Jacobian.
    factors, kept
        Kind of Factors captured, and what the solver keeps.
    route
        Which of several exact ways the Factors take (`curvlib.factors.Plan`), "" where there is one only.
    factor_bytes, inverse_bytes, kept_bytes
        Bytes of the captured Factors, of the inverse, and of estimate and inverse together (what they share once):
        the block's, split among its parameters by size.
    capture_flops, refresh_flops, step_flops
        Floating-point operations of a capture, a refresh of the inverse and a step, split likewise.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    block: str
    adapter: str
    closed_form: bool | None
    solver: str
    exact: bool
    why: str
    rows: int = 0
    factors: str = ""
    route: str = ""
    kept: str = ""
    factor_bytes: int = 0
    inverse_bytes: int = 0
    kept_bytes: int = 0
    capture_flops: int = 0
    refresh_flops: int = 0
    step_flops: int = 0


@dataclass(frozen=True)
class Explanation:
    """Every parameter of a model and what curvature does with it; `str` and `rich` show it as a table.

    Parameters
    ----------
    model
        Class name of the model.
    fisher
        Which curvature.
    parameters
        One row for each parameter, in the model's order.
    """

    model: str
    fisher: str
    parameters: tuple[ParameterRow, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Sums over all parameters: number, elements, elements in blocks and treated exactly, bytes, operations."""
        rows = self.parameters
        return {
            "parameters": len(rows),
            "size": sum(row.size for row in rows),
            "size_in_blocks": sum(row.size for row in rows if row.block),
            "size_exact": sum(row.size for row in rows if row.exact),
            **{cost: sum(getattr(row, cost) for row in rows) for cost in _COSTS},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that `json` takes.

        Returns
        -------
        dict
            ``{"model", "fisher", "parameters": [{"name", "block", "adapter", "solver", "exact", …, "share"}], "totals",
            "formulas"}``; a share is the part of the total bytes kept and of the total operations.
        """
        totals = self.totals
        parameters = [
            {**asdict(row), "shape": list(row.shape), "share": _shares(row, totals)} for row in self.parameters
        ]
        return {
            "model": self.model,
            "fisher": self.fisher,
            "parameters": parameters,
            "totals": totals,
            "formulas": dict(FORMULAS),
        }

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"

    def __rich__(self) -> RenderableType:
        totals = self.totals
        right = ("rows × size", "factors", "inverse", "capture", "refresh", "step", "share")
        names = ("parameter", "shape", "block", "adapter", "solver", "exact", "kind kept", *right)
        table = Table(
            *(Column(name, justify="right" if name in right else "left", overflow="fold") for name in names),
            title=f"{self.model}, {self.fisher}",
            box=box.SIMPLE_HEAD,
            show_footer=False,
        )
        notes: dict[str, list[str]] = {}
        for row in self.parameters:
            mark = "yes" if row.exact else "no"
            if row.why:
                notes.setdefault(row.why, []).append(row.name)
                mark += f" [{list(notes).index(row.why) + 1}]"
            table.add_row(*(Text(cell) for cell in self._cells(row, mark, totals)))
        table.add_section()
        table.add_row(*(Text(cell) for cell in self._total_cells(totals)))
        lines = [Text(f"[{number}] {why} ({', '.join(of)})") for number, (why, of) in enumerate(notes.items(), start=1)]
        routes: dict[str, list[str]] = {}
        for row in self.parameters:
            if row.route and row.block not in routes.setdefault(row.route, []):
                routes[row.route].append(row.block)
        lines += [Text(f"Route of {', '.join(blocks)}: {route}") for route, blocks in routes.items()]
        lines.append(
            Text(
                f"Kept between refreshes: {_bytes(totals['kept_bytes'])}. Bytes and FLOPs are those of the block, "
                "split by size; share is the part of the bytes kept and of the FLOPs."
            )
        )
        return Group(table, *lines)

    @staticmethod
    def _cells(row: ParameterRow, mark: str, totals: Mapping[str, int]) -> tuple[str, ...]:
        share = _shares(row, totals)
        shape = "×".join(map(str, row.shape)) or "scalar"
        head = (row.name, shape, row.block or "—", row.adapter, row.solver, mark)
        if not row.rows:
            return (*head, *[""] * 8)
        return (
            *head,
            row.kept or row.factors,
            f"{row.rows} × {row.size}",
            _bytes(row.factor_bytes),
            _bytes(row.inverse_bytes),
            *(_count(getattr(row, cost)) for cost in _COSTS[3:]),
            f"{share['bytes']:.0%}, {share['flops']:.0%}",
        )

    @staticmethod
    def _total_cells(totals: Mapping[str, int]) -> tuple[str, ...]:
        return (
            f"{totals['parameters']} parameters",
            *[""] * 4,
            f"{totals['size_exact'] / max(1, totals['size']):.0%}",
            "",
            str(totals["size"]),
            _bytes(totals["factor_bytes"]),
            _bytes(totals["inverse_bytes"]),
            *(_count(totals[cost]) for cost in _COSTS[3:]),
            "",
        )


def _shares(row: ParameterRow, totals: Mapping[str, int]) -> dict[str, float]:
    def flops(of: Mapping[str, Any]) -> int:
        return int(of["capture_flops"] + of["refresh_flops"] + of["step_flops"])

    own = {one.name: getattr(row, one.name) for one in fields(row)}
    return {
        "bytes": row.kept_bytes / max(1, totals["kept_bytes"]),
        "flops": flops(own) / max(1, flops(totals)),
    }


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(value: int) -> str:
    return _scaled(value, 1000, ("", "K", "M", "G", "T", "P"))


def _scaled(value: int, base: int, units: tuple[str, ...]) -> str:
    step = min(int(math.log(value, base)) if value else 0, len(units) - 1)
    return f"{value / base**step:.3g} {units[step]}".rstrip()

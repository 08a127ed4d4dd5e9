"""Layers with adapters beside a base that stays as it is (LoRA, arXiv 2106.09685 §4.1).

    LoraLinear      y = base(x) + sum over active adapters of  s B A drop(x)  (+ s b)        x (..., K) -> (..., N)
    LoraEmbedding   y = base(t) + s B A[:, t]                                                A (R, V), B (D, R)
    Retrained       the base with some of its parameters replaced by an adapter's own

    DoRA (arXiv 2402.09353 eq. 5)   y = g (W + s B A) x + b,   g = m / |W + s B A|           a norm a row, (N,)

The base may be float, int8 or NF4. It is never changed, so that without its adapters a layer is bitwise the base, also
for PiSSA and OLoRA: where those take s B0 A0 out of W, we subtract s B0 A0 x from y (`start`). All layers of a model
share one `Choice`: which adapters are active, or which for each row of the batch.

Adapters are kept in fp32 beside a 16-bit base, as gradient steps are too small for 16 bits; x is cast to fp32 for them
and the sum to the base's format, as in peft. `model.to(bfloat16)` and `.half()` cast the base alone (peft casts all);
`.double()` widens both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minillm.lora import as_one
from minillm.lora.choice import Choice
from minillm.model.linear import is_watched


class Wide(nn.Module):
    """Parameters that a cast of the model to 16 bits leaves in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wide:
        def apply(x: Tensor) -> Tensor:
            y = fn(x)
            wide = torch.promote_types(y.dtype, torch.float32)
            return y if y.dtype in (x.dtype, wide) else x.to(y.device, wide)

        super()._apply(apply, recurse)
        return self


class Adapter(Wide):
    """A (R, K) and B (N, R) of one layer, with what goes with them; `forward` is s (B A drop(x) + b) (..., N)."""

    start_a: Tensor | None
    start_b: Tensor | None
    bias: nn.Parameter | None
    magnitude: nn.Parameter | None

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale
        self.dropout = nn.Dropout(dropout)
        self.bias = self.magnitude = None
        self.register_buffer("start_a", None)  # in the state_dict: A and B say nothing without them
        self.register_buffer("start_b", None)

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def begin_at(self, a: Tensor, b: Tensor) -> None:
        """Take s B0 A0 away again, so that training starts from the base itself (PiSSA, OLoRA)."""
        self.start_a, self.start_b = a, b

    def delta(self) -> Tensor:
        """ΔW = s (B A - B0 A0), (N, K)."""
        product = self.b @ self.a
        if self.start_a is not None and self.start_b is not None:
            product = product - self.start_b @ self.start_a
        return self.scale * product

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x.to(self.a.dtype))
        y = F.linear(F.linear(x, self.a), self.b, self.bias)
        if self.start_a is not None and self.start_b is not None:
            y = y - F.linear(F.linear(x, self.start_a), self.start_b)
        return y * self.scale

    def extra_repr(self) -> str:
        return f"{self.a.shape[1]}, {self.b.shape[0]}, rank={self.rank}, scale={self.scale:g}"


class Adapted(nn.Module):
    """A base and its adapters by name."""

    def __init__(self, base: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.adapters = nn.ModuleDict()

    def _add(self, y: Tensor, change: Callable[[Any, Sequence[int] | slice], Tensor]) -> Tensor:
        """y plus what the chosen adapters change, in the format of y. change(adapter, rows of the batch)."""
        choice = self.choice
        if not choice.enabled:
            return y
        if choice.rows is not None:
            return self._add_by_row(y, change)
        total = y
        for name in choice.active:
            if name in self.adapters:
                total = total + change(self.adapters[name], slice(None))
        return total.to(y.dtype)

    def _add_by_row(self, y: Tensor, change: Callable[[Any, Sequence[int] | slice], Tensor]) -> Tensor:
        rows = self.choice.rows or ()
        if len(rows) != y.shape[0]:
            raise ValueError(f"{len(rows)} rows have an adapter chosen, and the batch has {y.shape[0]}")
        total = y.clone()
        for name in dict.fromkeys(rows):
            if name is not None and name in self.adapters:
                places = [place for place, own in enumerate(rows) if own == name]
                total[places] = (y[places] + change(self.adapters[name], places)).to(y.dtype)
        return total


class LoraLinear(Adapted):
    """A linear with adapters; formulas above."""

    @property
    def weight(self) -> Tensor:
        """That of the base, for those who only look at its shape and format."""
        found: Tensor = self.base.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """That of the base."""
        found: Tensor | None = self.base.bias  # type: ignore[assignment]
        return found

    @staticmethod
    def together(linears: Sequence[LoraLinear], x: Tensor) -> Sequence[Tensor]:
        """Several layers of one x; see `minillm.model.linear.project`."""
        return as_one.linears(linears, x) if as_one.serves(linears, x) else [linear(x) for linear in linears]

    def of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor | None:
        """`self(silu(gate) * up)` without keeping the product; None where that cannot be."""
        if gate.dtype != up.dtype or is_watched(self) or not as_one.serves([self], gate):
            return None
        return as_one.linears([self], gate, up)[0]

    def forward(self, x: Tensor) -> Tensor:
        if as_one.serves([self], x):
            return as_one.linears([self], x)[0]
        y: Tensor = self.base(x)

        def change(adapter: Adapter, rows: Sequence[int] | slice) -> Tensor:
            if adapter.magnitude is None:
                added: Tensor = adapter(x[rows])
                return added
            return self._dora(adapter, x[rows], y[rows])

        return self._add(y, change)

    def _dora(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """(g - 1) W x + g s B A x: what makes W x + b the whole of eq. 5. The norm is taken for a constant."""
        assert adapter.magnitude is not None
        weight, bias = float_weight(self.base, adapter.a.dtype), self.bias
        norm = row_norms(weight, adapter).detach()
        gain = adapter.magnitude / norm  # (N,)
        drops = adapter.training and adapter.dropout.p > 0
        x = adapter.dropout(x.to(adapter.a.dtype)) if drops else x.to(adapter.a.dtype)
        plain = F.linear(x, weight) if drops else y if bias is None else y - bias
        added = F.linear(F.linear(x, adapter.a), adapter.b) * adapter.scale
        if adapter.start_a is not None and adapter.start_b is not None:
            added = added - F.linear(F.linear(x, adapter.start_a), adapter.start_b) * adapter.scale
        return (gain - 1) * plain + gain * added


def row_norms(weight: Tensor, adapter: Adapter) -> Tensor:
    """|W + ΔW| of each row, (N,)."""
    return lengths(weight + adapter.delta().to(weight.dtype))


def lengths(weight: Tensor) -> Tensor:
    """|w| of each row, (N,); never zero, as rows of a padded vocabulary are, and DoRA divides by it."""
    return torch.linalg.norm(weight, dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


class LoraEmbedding(Adapted):
    """An embedding with adapters. A head tied to it reads the base's table: the adapter changes what goes in alone."""

    @property
    def weight(self) -> Tensor:
        """The base's table (V, D)."""
        found: Tensor = self.base.weight  # type: ignore[assignment]
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        def change(adapter: Adapter, rows: Sequence[int] | slice) -> Tensor:
            return F.linear(F.embedding(tokens[rows], adapter.a.T), adapter.b) * adapter.scale

        return self._add(self.base(tokens), change)


class Own(Wide, nn.ParameterDict):
    """The parameters that one adapter trains anew, by their names in the base."""


class Retrained(nn.Module):
    """A module some of whose parameters an adapter trains anew; the base keeps its own.

    It has no `native` form: a whole block in one call (`minillm.model.step`) would pass this layer over.
    """

    def __init__(self, base: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.adapters = nn.ModuleDict()  # name -> Own

    def own(self, name: str, parameters: Sequence[str]) -> None:
        """Give adapter `name` copies of these parameters to train."""
        own = Own()
        for each in parameters:
            x = self.base.get_parameter(each).detach()
            own[each] = nn.Parameter(x.to(torch.promote_types(x.dtype, torch.float32)).clone())
        self.adapters[name] = own.train(self.training)

    def _replaced(self) -> dict[str, Tensor]:
        """The parameters of the last active adapter that has its own, in the base's format. By row: the base's."""
        found: dict[str, Tensor] = {}
        for name in () if self.choice.rows is not None else self.choice.names():
            if name in self.adapters:
                own: Any = self.adapters[name]
                found |= {key: value.to(getattr(self.base, key).dtype) for key, value in own.items()}
        return found

    def forward(self, *inputs: Any) -> Any:
        replaced = self._replaced()
        return functional_call(self.base, replaced, inputs) if replaced else self.base(*inputs)

    @property
    def weight(self) -> Tensor:
        """The active adapter's, else the base's: for a head tied to it, adapters around it, and who asks its format."""
        found: Tensor = self._replaced().get("weight", self.base.weight)  # type: ignore[arg-type]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The active adapter's, else the base's."""
        found: Tensor | None = self._replaced().get("bias", self.base.bias)  # type: ignore[arg-type]
        return found

    @property
    def stays_float(self) -> bool:
        """Whether the base cannot be quantised: an adapter has a weight in its place (`quantize_linears` asks)."""
        return any("weight" in own for own in self.adapters.values())  # type: ignore[operator]


def float_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """W of a linear or table in floating point, (N, K); dequantised where it is quantised."""
    layer: Any = base
    inner: Any = unwrapped(base)
    weight: Tensor = inner.dequantised(dtype) if hasattr(inner, "dequantised") else layer.weight.detach().to(dtype)
    return weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear, (V, D) of a table; adapted and quantised ones too."""
    inner: Any = unwrapped(module)
    rows, columns = inner.shape if hasattr(inner, "dequantised") else inner.weight.shape
    return int(rows), int(columns)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer of the model itself, beneath adapters and retrained parameters."""
    while isinstance(module, Adapted | Retrained):
        module = module.base
    return module

"""AdamW with its two moments in 8 bits: 2 bytes a parameter instead of 8 (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.errors import CheckpointError, InputError, NumericsError
from minillm.ops import adamw8, native
from minillm.training.spread import local, placed

#: Gradients below it have squares in fp32, whose largest number is below (2^64)^2.
LARGEST_GRADIENT = 2.0**64

State = dict[str, Tensor]


class AdamW8(torch.optim.Optimizer):
    """torch.optim.AdamW, its moments in 8 bits; formulas and codes in `minillm.ops.adamw8`.

    params: parameters, groups, or `model.named_parameters()`; lr, betas, eps, weight_decay as torch.optim.AdamW has
    them. Parameters are fp32, bf16 or fp16 (each step computes in fp32 and rounds once) and may differ in this.
    smallest: parameters of fewer numbers keep moments in fp32 (norms and biases, which weigh nothing); a group may have
    its own. The paper wants embeddings, whose gradients vary most, in fp32: give their group `smallest=math.inf`.

    A parameter's state: step () int64, and

        exp_avg_codes, exp_avg_sq_codes      uint8, in the parameter's shape
        exp_avg_absmax, exp_avg_sq_absmax    fp32 (ceil(n / 256),)
        exp_avg, exp_avg_sq                  instead of these in a small one: fp32, in the parameter's shape

    A state that is saved and loaded goes on bit for bit: the codes are saved, not what they mean.

    Of a parameter that is cut over ranks (FSDP2's DTensor) each has the state of its own rows. Blocks are then those of
    the whole parameter, so that steps and saved states do not depend on the number of ranks; parameters whose rows
    cannot be cut between blocks are refused.

    `step` raises NumericsError where a gradient is not finite, or has no square in fp32, and names the parameter;
    nothing has changed then. InputError for settings out of range and parameters of another format, CheckpointError for
    the state of another optimizer or model.

    Where we differ from bitsandbytes.optim.AdamW8bit: it does not look at gradients, and keeps a NaN in its moments for
    ever; its state_dict holds the maps as well. Steps are its CPU backend's, to the last bit where moments have 8 bits;
    where they are fp32 it multiplies by the bias correction elsewhere, which moves roundings.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        smallest: float = 4096,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "smallest": smallest}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the settings of the group checked."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        _check_settings(group)
        for name, p in _named(group, len(self.param_groups)):
            if p.dtype not in native.FORMATS:
                raise InputError(f"{name} is {p.dtype}; AdamW8 takes {', '.join(map(str, native.FORMATS))}")
            _check_cut(name, p, group["smallest"])
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, p, group in self._due():
            _check_gradient(name, p)
            if self.state.get(p):
                _check_state(name, self.state[p], p, group["smallest"])
        for _, p, group in self._due():
            self._step(p, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, the state bit for bit (torch would turn the codes into the parameters' format)."""
        saved = self._saved_states(state_dict)
        for (name, p, smallest), state in saved:
            _check_state(name, state, p, smallest)
        super().load_state_dict(state_dict)
        for (_, p, _), state in saved:
            self.state[p] = {key: value.to(p.device, copy=True) for key, value in state.items()}

    def _saved_states(self, state_dict: dict[str, Any]) -> list[tuple[tuple[str, Tensor, float], State]]:
        """Every saved state with its parameter's name, the parameter, and the group's `smallest`."""
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if sizes != expected or any("smallest" not in group for group in groups):
            raise CheckpointError(
                f"the saved optimizer has groups of {sizes} parameters, this AdamW8 of {expected}; resume with "
                "the same recipe and optimizer"
            )
        found = []
        for number, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            for index, (name, p) in zip(group["params"], _named(own, number), strict=True):
                if index in state_dict["state"]:
                    found.append(((name, p, group["smallest"]), state_dict["state"][index]))
        return found

    def _due(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for number, group in enumerate(self.param_groups):
            yield from ((name, p, group) for name, p in _named(group, number) if p.grad is not None and p.numel())

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            for key, (dtype, shape) in _layout(p, group["smallest"]).items():
                state[key] = placed(torch.zeros(shape, dtype=dtype, device=p.device), p)
        state["step"] += 1
        rates = adamw8.rates(
            int(state["step"]),
            learning_rate=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        assert p.grad is not None
        own, gradient, state = local(p), local(p.grad), {key: local(value) for key, value in state.items()}
        if "exp_avg" in state:
            adamw8.update_ref(own, gradient, state["exp_avg"], state["exp_avg_sq"], rates)
            return
        dense = own.contiguous()
        adamw8.step(dense, gradient.contiguous(), adamw8.Moments(*(state[key] for key in _EIGHT_BITS)), rates)
        if dense.data_ptr() != own.data_ptr():
            own.copy_(dense)


#: In the order of adamw8.Moments.
_EIGHT_BITS = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")


def _layout(p: Tensor, smallest: float) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Format and shape of each tensor of a parameter's state."""
    shape, blocks = tuple(p.shape), (-(-p.numel() // adamw8.BLOCK),)
    if p.numel() < smallest:
        moments = {key: (torch.float32, shape) for key in ("exp_avg", "exp_avg_sq")}
    else:
        kinds = ((torch.uint8, shape), (torch.float32, blocks)) * 2
        moments = dict(zip(_EIGHT_BITS, kinds, strict=True))
    return {"step": (torch.int64, ()), **moments}


def _named(group: dict[str, Any], number: int) -> Iterable[tuple[str, Tensor]]:
    """A group's parameters, by their names or, where it was not given any, by their places."""
    places = (f"parameter {place} of group {number}" for place in range(len(group["params"])))
    return zip(group.get("param_names") or places, group["params"], strict=True)


def _check_settings(group: dict[str, Any]) -> None:
    first, second = group["betas"]
    wrong = [
        f"{name} is {group[name]}; give {what}"
        for name, what, fits in (
            ("lr", "0 or more", group["lr"] >= 0),
            ("betas", "two numbers from 0 to less than 1", 0 <= first < 1 and 0 <= second < 1),
            ("eps", "0 or more", group["eps"] >= 0),
            ("weight_decay", "0 or more", group["weight_decay"] >= 0),
        )
        if not fits
    ]
    if wrong:
        raise InputError(wrong[0])


def _check_cut(name: str, p: Tensor, smallest: float) -> None:
    sharded: Any = p
    if not hasattr(p, "device_mesh") or p.numel() < smallest:
        return
    parts = sharded.device_mesh.size()
    if p.shape[0] % parts or p.numel() // parts % adamw8.BLOCK:
        raise InputError(
            f"{name}, {tuple(p.shape)}, cannot be cut into {parts} equal parts of whole blocks of {adamw8.BLOCK} "
            "numbers, as adamw8 with fsdp needs; take --optimizer adamw, or --parallel ddp"
        )


def _check_gradient(name: str, p: Tensor) -> None:
    assert p.grad is not None
    g = local(p.grad)
    if g.layout != torch.strided:
        raise InputError(f"the gradient of {name} is sparse; make its embedding without sparse=True")
    least, most = (float(x) for x in torch.aminmax(g)) if g.numel() else (0.0, 0.0)  # a rank may have no row of it
    largest = max(-least, most)  # NaN: both are
    if not largest < LARGEST_GRADIENT:
        raise NumericsError(
            f"the gradient of {name} has {largest:.3g} in it; lower the learning rate, or look at the batch"
        )


def _check_state(name: str, state: State, p: Tensor, smallest: float) -> None:
    found = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    expected = _layout(p, smallest)
    if found != expected:
        odd = min(key for key in {**found, **expected} if found.get(key) != expected.get(key))
        raise CheckpointError(
            f"the saved state of {name} has {odd} {found.get(odd)}, this optimizer {expected.get(odd)}; resume with "
            "the same recipe and optimizer"
        )

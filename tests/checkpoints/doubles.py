"""Modules with the names and attributes of gptqmodel 7.7 and bitsandbytes 0.50, for machines without these libraries.

A double is made of a file's tensors as the library makes its module of them, and multiplies by the values that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.checkpoints.packers import Case
from tests.checkpoints.support import linears


class BaseQuantLinear(nn.Module):
    """What gptqmodel's kernels have in common."""

    REQUIRES_FORMAT_V2 = False
    values: Tensor

    def __init__(self, linear: nn.Linear, case: Case, tensors: dict[str, Tensor], values: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = case.config["bits"]
        self.requested_group_size = case.config["group_size"]
        self.group_size = self.requested_group_size if self.requested_group_size != -1 else self.in_features
        self.sym = case.config.get("sym", True)
        self.pack_dtype = torch.int32
        self.adapter = None
        self.linear_mode: str | None = None
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor.contiguous())
        if linear.bias is not None:
            self.register_buffer("bias", linear.bias.detach().to(torch.float16))
        else:
            self.bias = None
        self.register_buffer("wf_unsqueeze_zero", torch.arange(0, 32, self.bits).reshape(1, 1, -1), persistent=False)
        self.register_buffer("values", values.to(torch.bfloat16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.matmul(x, self.values.t())
        return out if self.bias is None else out + self.bias.to(out.dtype)


class GPTQQuantLinear(BaseQuantLinear):
    """Holds zero points as the kernel wants them, not as the file has them."""

    def __init__(self, linear: nn.Linear, case: Case, tensors: dict[str, Tensor], values: Tensor) -> None:
        version = case.config["checkpoint_format"]
        if version == "gptq" and self.REQUIRES_FORMAT_V2:
            one = sum(1 << place for place in range(0, 32, case.config["bits"]))
            tensors = {
                **tensors,
                "qzeros": tensors["qzeros"] + torch.tensor(one - (1 << 32) * (one >> 31), dtype=torch.int32),
            }
        super().__init__(linear, case, tensors, values)
        self.desc_act = case.config["desc_act"]
        self.planar = version == "gptq_p"


class TorchLinear(GPTQQuantLinear):
    """gptqmodel's kernel of plain torch."""

    REQUIRES_FORMAT_V2 = True

    @property
    def weight(self) -> SimpleNamespace:
        """gptqmodel tells shape and dtype here."""
        return SimpleNamespace(device=self.values.device, dtype=self.values.dtype)


class MarlinLinear(GPTQQuantLinear):
    """A kernel that has its codes in an order of its own."""


class AWQuantLinear(BaseQuantLinear):
    """AWQ's."""


class AwqTorchLinear(AWQuantLinear):
    """gptqmodel's kernel of plain torch."""


class Int8Params(nn.Parameter):
    """bitsandbytes' rows."""

    SCB: Tensor | None
    CB: Tensor | None


class Linear8bitLt(nn.Linear):
    """bitsandbytes': scales lie with the Parameter until a first call takes them into the state."""

    def __init__(self, linear: nn.Linear, case: Case, tensors: dict[str, Tensor], values: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=torch.bfloat16)
        self.weight = Int8Params(tensors["weight"], requires_grad=False)
        self.weight.CB, self.weight.SCB = self.weight.data, tensors["SCB"]
        self.bias = linear.bias
        self.state = SimpleNamespace(CB=None, SCB=None, threshold=6.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.SCB is not None:
            self.state.CB, self.state.SCB, self.weight.SCB = self.weight.CB, self.weight.SCB, None
        w = (self.state.CB.float() * self.state.SCB[:, None] / 127).to(x.dtype)
        return nn.functional.linear(x, w, self.bias)


class Params4bit(nn.Parameter):
    """bitsandbytes' codes in a table of their own."""


class Linear4bit(nn.Linear):
    """bitsandbytes'."""

    def __init__(self, linear: nn.Linear, case: Case, tensors: dict[str, Tensor], values: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)
        self.weight = Params4bit(tensors["weight"], requires_grad=False)
        self.values = values.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values)


def with_modules(model: nn.Module, case: Case, kind: Callable[..., nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose linears are such modules, and the tensors of its checkpoint."""
    tensors = dict(model.state_dict())
    for name, linear in linears(model).items():
        made, values = case.pack(name, linear.weight.detach().float())
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, kind(linear, case, made, values))
    return model.eval(), tensors

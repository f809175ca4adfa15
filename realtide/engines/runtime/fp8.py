"""Linear layers whose products are in 8-bit floating point, half of bfloat16's bytes (ours).

Weights are stored as float8 (e4m3) with one scale for each layer; an input is brought to float8 with one
scale of its own, found on the device while the layer runs, so that nothing waits. Sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.quantize import FLOAT8_CAPABILITY

KIND = torch.float8_e4m3fn
_LARGEST = torch.finfo(KIND).max
_SMALLEST_SCALE = 1e-12
_MULTIPLE = 16  # of both widths of a product


def refusal(device: torch.device) -> str | None:
    """Why layers in float8 cannot run on a device; None: they can. A processor computes them slowly."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            have, least = (".".join(map(str, one)) for one in (capability, FLOAT8_CAPABILITY))
            return f"products in float8 need compute capability {least}, this device has {have}"
    return None


class Fp8Linear(nn.Module):
    """A linear layer in float8; both widths must be multiples of 16.

    Args:
        layer: whose weights it takes. Its type is that of inputs and outputs: float32 or bfloat16.

    Raises:
        ProgramError: the device cannot multiply float8, or a width is no multiple of 16.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if (reason := refusal(layer.weight.device)) is not None:
            raise ProgramError(reason)
        if not fits(layer):
            raise ProgramError(
                f"a layer of {layer.in_features} to {layer.out_features} cannot be in float8:"
                f" widths must be multiples of {_MULTIPLE}"
            )
        weight, scale = _narrow(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], of the type of x."""
        rows, scale = _narrow(x.flatten(0, -2))
        # GPUs add a bias within the product only where its result is of 16 bits.
        within = self.bias if x.dtype != torch.float32 else None
        # The second factor must lie column by column, which a transposed view of the weight does.
        out: Tensor = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=within, out_dtype=x.dtype
        )
        if self.bias is not None and within is None:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)


def fits(layer: nn.Linear) -> bool:
    """True if the layer's widths allow float8."""
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


def convert(module: nn.Module) -> int:
    """Replace every linear layer below `module` that fits; the layers' own weights are let go.

    Returns:
        How many were replaced.

    Raises:
        ProgramError: the device cannot multiply float8; nothing is replaced.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and fits(child)
    ]
    for parent, name, child in found:
        parent.register_module(name, Fp8Linear(child))
    return len(found)


def _narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float8, and the scale [] in float32 that brings it back."""
    scale = (x.abs().amax().float() / _LARGEST).clamp(min=_SMALLEST_SCALE)
    # Rounding may lead out of the range, where a conversion gives no number.
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(KIND), scale

"""The decoder's small operations and products, faster and in less memory.

Plain (model.py): nn.Linear, F.rms_norm, silu(gate) * up. Fast, with the same results up to rounding:

- Products in fp32 on CPU go through oneDNN instead of MKL: 5% of a training step on AMD, nearly twice as fast
  for the head on few rows. For sampling the weights are laid out for it once (`pack_weights`): a step of 10
  rows of SmolLM2 spends 43 ms on its products instead of 55.
- RMSNorm has a backward pass of its own, written out below: autograd keeps the normalized x beside x.
- A product whose input is cheap to make (the output of a norm, or of the activation) keeps what its input was
  made of, and makes it again in its backward pass. So a layer keeps 2 C + (2 H + 2 KV) D + 2 I numbers of a
  token, not 4 C + (2 H + 2 KV) D + 4 I. SFT of SmolLM2 needs 6.0 GB instead of 9.3 (bench/LOG.md).
- A product with adapters (lora/) is one with the merged weight, x (W + s B A)^T, and its backward pass
  computes no gradient of W. In bf16 the sum would lose the adapters' digits; so only in fp32.

`speed_up` puts them into a model; parameters and their names stay. The activation is the model's own
(`MLP.activate`), so another one needs no change here; another norm does, or --plain.
"""
from functools import partial
from types import MethodType
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.attention import TreeAttention
from fast.fused import fuse
from lora import LoRALinear, change
from model import Decoder, Layer, RMSNorm, at_least_fp32

ONEDNN_SIZE = 2 ** 23  # multiply-adds of a product from which oneDNN is worth its call
PACKED_SIZE = 2 ** 18  # numbers of a weight from which a layout for oneDNN is worth its call
ROWS = 256             # rows of an activation whose backward pass fits the caches of a CPU


def speed_up(model: Decoder) -> Decoder:
    """Replace the forward functions of a decoder, and its attention over trees, by fast ones. -> the model.

    It must be where it will run: a GPU has other ones (fast/fused.py).
    """
    if model.device.type == "cuda":
        fuse(model)
        return model
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.forward = MethodType(lora_forward, module)
        elif isinstance(module, nn.Linear):
            module.forward = MethodType(linear_forward, module)
        elif isinstance(module, RMSNorm):
            module.forward = MethodType(rms_norm_forward, module)
        elif isinstance(module, Layer):
            module.forward = MethodType(layer_forward, module)
    model.logits = MethodType(logits, model)
    model.tree_attention = TreeAttention
    return model


@torch.inference_mode()
def pack_weights(model: Decoder) -> Decoder:
    """Lay a model's weights out in the blocks that oneDNN reads. -> the model, which samples, and cannot be
    trained or saved any more.

    Otherwise oneDNN lays them out at every product, which is a third of the time of one on few rows.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    if model.embed.weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return model
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.is_mkldnn:
            continue
        if module.weight.numel() >= PACKED_SIZE:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, ROWS)
            module.weight = nn.Parameter(packed, requires_grad=False)
    return model


Made = tuple[Callable, Tensor]  # (make, source): what a product's input was made of


def linear_forward(self: nn.Linear, x: Tensor, made: Made | None = None) -> Tensor:
    return linear(x, self.weight, self.bias, made)


def lora_forward(self: LoRALinear, x: Tensor, made: Made | None = None) -> Tensor:
    if not is_for_onednn(x, self.weight):
        return LoRALinear.forward(self, x)
    return OneDNNLoRA.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self, made)


def rms_norm_forward(self: RMSNorm, x: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():
        return RMSNorm.forward(self, x)
    return LeanRMSNorm.apply(at_least_fp32(x), at_least_fp32(self.weight), self.eps).to(x.dtype)


def layer_forward(self: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
    """model.Layer, with the outputs of norms and activation made again in the backward pass.

    The engines run in inference mode, where none comes: there the layer is the plain one. A reference of DPO,
    which has none either, is not: it must round as its policy does.
    """
    if torch.is_inference_mode_enabled():
        return Layer.forward(self, x, cos, sin, attend)
    qkv = linear_of(self.attention_norm, x, self.attention.qkv)
    q, k, v = self.attention.heads(qkv, cos, sin)
    x = x + self.attention.out(attend(q, k, v).flatten(1))
    gate_up = linear_of(self.mlp_norm, x, self.mlp.gate_up)
    return x + linear_of(partial(Remade.apply, self.mlp.activate), gate_up, self.mlp.down)


def logits(self: Decoder, hidden: Tensor) -> Tensor:
    weight = self.embed.weight if self.head is None else self.head.weight
    return linear(hidden, weight)


# ---------------------------------------------------------------------------------------------- products

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, made: Made | None = None) -> Tensor:
    """F.linear: x (T, I), weight (O, I), bias (O,) or None -> (T, O). `made`: see OneDNNLinear."""
    if weight.is_mkldnn:
        return onednn(x, weight, bias)
    if not is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, weight, bias, made)
    return onednn(x, weight, bias)


def linear_of(make: Callable, x: Tensor, module: nn.Linear) -> Tensor:
    """module(make(x)). x is kept for the backward pass of the product, and not make(x)."""
    return module.forward(make(x), (make, x))


def is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    is_fp32 = x.dtype == weight.dtype == torch.float32
    return is_fp32 and len(x) * weight.numel() >= ONEDNN_SIZE and torch.backends.mkldnn.is_available()


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b, so grad_x = grad_y W, grad_W = grad_y^T x, grad_b = sum of grad_y over the rows.

    x is kept for the backward pass; or, where `made` is (make, source), the source is, and x is made again as
    make(source). A frozen weight has no gradient, and x is not needed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, made):
        ctx.make, source = made or (None, x)
        ctx.save_for_backward(source if ctx.needs_input_grad[1] else None, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.make and x is not None:
            x = ctx.make(x)
        grad_x = onednn(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


class OneDNNLoRA(torch.autograd.Function):
    """y = x V^T + bias with V = W + s B A, so grad_x = grad_y V: the adapters take no pass of their own over
    x, y or grad_x.

    W and bias are frozen. For each part of the output, with its own A and B and its columns g of grad_y, and
    u = x A^T: grad_B = s g^T u, grad_u = s g B and grad_A = grad_u^T x. V is made again in the backward pass;
    x is kept, or made again, as in OneDNNLinear.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, module, made):
        ctx.make, source = made or (None, x)
        ctx.module = module
        ctx.save_for_backward(source, weight, a, b)
        return onednn(x, weight + change(a, b, module.parts, module.lora), bias)

    @staticmethod
    def backward(ctx, grad):
        source, weight, a, b = ctx.saved_tensors
        parts, lora = ctx.module.parts, ctx.module.lora
        x = ctx.make(source) if ctx.make else source
        u = x @ a.t()  # (T, parts * R)
        grads_b = []
        grads_u = []
        parts_of_all = zip(grad.split(parts, dim=1), u.split(lora.rank, dim=1), b.split(parts), strict=True)
        for g, u_p, b_p in parts_of_all:
            grads_b.append(g.t() @ u_p)
            grads_u.append(g @ b_p)
        grad_b = lora.scale * torch.cat(grads_b)
        grad_a = lora.scale * torch.cat(grads_u, dim=1).t() @ x
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = onednn(grad, (weight + change(a, b, parts, lora)).t(), None)
        return grad_x, None, None, grad_a, grad_b, None, None


# ------------------------------------------------------------------------------------------- small operations

class LeanRMSNorm(torch.autograd.Function):
    """y = n * weight with n = x * scale and scale = 1 / sqrt(mean(x²) + eps). x (..., C), weight (C,).

    RMSNorm ignores the scale of x, so the gradient along x is zero: with g = grad_y * weight, grad_x = scale
    * (g - n * mean(g * n)).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = (grad * normal).mean(dim=-1, keepdim=True)
        grad_x = normal.mul_(-along).add_(grad).mul_(scale)
        return grad_x, grad_weight, None


class Remade(torch.autograd.Function):
    """f(x), for an f that takes each row by itself. Only x is kept: the backward pass makes f(x) again.

    It goes back over as many rows at a time as the caches of a CPU hold.
    """

    @staticmethod
    def forward(ctx, f, x):
        ctx.f = f
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        for first in range(0, len(x), ROWS):
            rows = slice(first, first + ROWS)
            with torch.enable_grad():
                some = x[rows].detach().requires_grad_()
                grad_x[rows], = torch.autograd.grad(ctx.f(some), some, grad[rows])
        return None, grad_x

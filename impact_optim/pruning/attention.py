"""Attention whose heads can be cut: of ``nn.MultiheadAttention``, and of the windows of torchvision's Swin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def open_heads(model: nn.Module) -> nn.Module:
    """Lets the heads of every ``nn.MultiheadAttention`` and of torchvision's Swin be cut, in place; returns the model.

    Their own forward passes take the width of a head from that of the input, so that there can be no heads less. The
    modules become :class:`OpenMultiheadAttention` and :class:`OpenWindowAttention`, with the same parameters and names,
    and the same results. Do so before an ``ActivationPruner`` is made, and before ``load_pruned``. Those with
    ``add_bias_kv`` or ``add_zero_attn`` stay as they are.
    """
    for module in model.modules():
        kind = type(module)
        if kind is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = OpenMultiheadAttention
            # Else nn.TransformerEncoderLayer evaluates in a kernel of its own, which knows one width only.
            module._qkv_same_embed_dim = False
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only that kernel takes
        elif kind.__module__ == "torchvision.models.swin_transformer" and kind.__name__ in _WINDOWED:
            module.__class__ = OpenWindowAttention
    return model


class OpenMultiheadAttention(nn.MultiheadAttention):
    """Attention as torch's, with heads as wide as its weights make them; see :func:`open_heads`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`; ``is_causal`` is only a hint, the mask is what counts."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: hand in the mask as well")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        packed = self.in_proj_weight
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3, dim=0)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3, dim=0)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            attention = (scores if mask is None else scores + mask).softmax(-1)
            if dropout:
                attention = F.dropout(attention, dropout)
            seen = attention @ v
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(seen.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if attention is None else attention.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), attention

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, [samples or 1, heads or 1, queries or 1, keys]."""
        masks = []
        for mask in (attn_mask, key_padding_mask):
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
            masks.append(mask)
        of_pairs, of_keys = masks
        if of_pairs is not None and of_pairs.dim() == 3:
            of_pairs = of_pairs.unflatten(0, (-1, self.num_heads))
        if of_keys is not None:
            of_keys = of_keys[:, None, None, :]
        return of_keys if of_pairs is None else of_pairs if of_keys is None else of_pairs + of_keys


_WINDOWED = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")


class OpenWindowAttention(nn.Module):
    """Attention within windows as torchvision's Swin and Swin V2 have it; see :func:`open_heads`."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    relative_position_index: Tensor
    relative_position_bias_table: Tensor  # of Swin
    relative_coords_table: Tensor  # this and the rest of Swin V2
    cpb_mlp: nn.Sequential
    logit_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """From [batch, height, width, channels] to the same shape."""
        window, (height, width) = self.window_size, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        padded = x.shape[1:3]
        shift = [0 if window[i] >= padded[i] else self.shift_size[i] for i in (0, 1)]
        parts = _windows(x.roll((-shift[0], -shift[1]), (1, 2)), window)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self._project(parts).chunk(3, -1)
        )
        if self._is_second():
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * self.logit_scale.clamp(max=math.log(100.0)).exp()
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self._position_bias()
        if any(shift):  # what the roll has brought together does not see each other
            places = [torch.arange(size, device=x.device) for size in padded]
            row, column = (
                (places[i] >= padded[i] - window[i]).int() + (places[i] >= padded[i] - shift[i]).int() for i in (0, 1)
            )
            regions = _windows((3 * row[:, None] + column)[None, ..., None], window).squeeze(-1)
            apart = (regions[:, None] != regions[:, :, None]).to(scores.dtype) * -100.0
            scores = (scores.unflatten(0, (-1, len(apart))) + apart[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        parts = F.dropout(self.proj((weights @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)
        rows, columns = padded[0] // window[0], padded[1] // window[1]
        x = parts.unflatten(1, (window[0], window[1])).unflatten(0, (-1, rows, columns))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _is_second(self) -> bool:
        return "logit_scale" in self._parameters

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side; Swin V2's keys have no bias, though its layer does."""
        bias = self.qkv.bias
        if not self._is_second() or bias is None:
            return self.qkv(x)
        q, k, v = bias.chunk(3)  # not zeros for k, which would be other rows than those of its weight
        return torch.func.functional_call(self.qkv, {"bias": torch.cat([q, k * 0, v])}, x)

    def _position_bias(self) -> Tensor:
        """What is added to the scores, [heads, queries, keys]."""
        second, tokens = self._is_second(), self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2) if second else self.relative_position_bias_table
        bias = table[self.relative_position_index].unflatten(0, (tokens, tokens)).permute(2, 0, 1)
        return 16 * bias.sigmoid() if second else bias


def _windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """[batch, height, width, channels] -> [batch * windows, places, channels]."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)

"""``nn.MultiheadAttention`` whose heads can be cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def open_heads(model: nn.Module) -> nn.Module:
    """Lets the heads of every ``nn.MultiheadAttention`` of a model be cut, in place, and returns the model.

    Torch's own forward pass takes the width of a head from that of the input, so that there can be no heads less. The
    modules become :class:`OpenMultiheadAttention`, with the same parameters and names, and the same results. Do so
    before an ``ActivationPruner`` is made, and before ``load_pruned``. Those with ``add_bias_kv`` or ``add_zero_attn``
    stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = OpenMultiheadAttention
            # Else nn.TransformerEncoderLayer evaluates in a kernel of its own, which knows one width only.
            module._qkv_same_embed_dim = False
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only that kernel takes
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

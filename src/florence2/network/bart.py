"""BART's encoder and decoder: post-LayerNorm, learned positions with an offset of 2.

Source of the architecture: BART (arXiv 1910.13461) as published in Florence-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from florence2 import tokens
from florence2.errors import RequestError
from florence2.network.config import TextConfig
from florence2.network.linear import Embedding, Linear, activation, attend, linear

POSITION_OFFSET = 2


class Attention(nn.Module):
    """The projections of multi-head attention; ``attend`` is the attention itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self._fused: tuple[Tensor, Tensor] | None = None

    @property
    def fused_weight(self) -> Tensor | None:
        """The three input projections as one weight [3 * dim, dim], see ``fuse``."""
        return None if self._fused is None else self._fused[0]

    def fuse(self) -> None:
        """Lays the three input projections out as one weight.

        Theirs become views of it, so it takes no memory of its own. Moving or casting the module
        undoes it, and gradients are computed without it.
        """
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = torch.cat([part.bias.detach() for part in parts])
        for part, rows, offset in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight.data, part.bias.data = rows, offset
        self._fused = weight, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        self._fused = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def split(self, rows: Tensor) -> Tensor:
        """[B, L, dim] -> [B, heads, L, dim / heads]."""
        batch, length, dim = rows.shape
        return rows.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)

    def project_query(self, rows: Tensor) -> Tensor:
        """[B, L, dim] -> queries [B, heads, L, head_dim]."""
        return self.split(self.q_proj(rows))

    def project_key_value(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, dim] -> keys and values, each [B, heads, L, head_dim]."""
        if self._fused is None or torch.is_grad_enabled():
            return self.split(self.k_proj(rows)), self.split(self.v_proj(rows))
        weight, bias = (part[rows.shape[-1] :] for part in self._fused)
        key, value = self._split_all(linear(rows, weight, bias), 2)
        return key, value

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, dim] -> queries, keys and values, each [B, heads, L, head_dim]."""
        if self._fused is None or torch.is_grad_enabled():
            return self.project_query(rows), *self.project_key_value(rows)
        query, key, value = self._split_all(linear(rows, *self._fused), 3)
        return query, key, value

    def _split_all(self, rows: Tensor, count: int) -> tuple[Tensor, ...]:
        batch, length, dim = rows.shape
        head_dim = dim // (count * self.heads)
        return rows.view(batch, length, count, self.heads, head_dim).permute(2, 0, 3, 1, 4).unbind()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Projected heads -> [B, L, dim]; ``mask`` is True, or added zero, where one may look."""
        mixed = attend(query, key, value, mask, is_causal)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).flatten(2)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation(config.activation)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        attention = self.self_attn
        mixed = attention.attend(*attention.project(states), mask)
        states = self.self_attn_layer_norm(states + mixed)
        return cast(
            Tensor,
            self.final_layer_norm(states + self.fc2(self.activation(self.fc1(states)))),
        )


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's states, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        heads = config.decoder_attention_heads
        self.self_attn = Attention(config.d_model, heads)
        self.activation = activation(config.activation)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config.d_model, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def after_self_attention(
        self,
        rows: Tensor,
        mixed: Tensor,
        cross_key: Tensor,
        cross_value: Tensor,
        cross_mask: Tensor | None,
    ) -> Tensor:
        """The rest of the layer: ``rows`` its input, ``mixed`` its self-attention, [B, L, d]."""
        rows = self.self_attn_layer_norm(rows + mixed)
        query = self.encoder_attn.project_query(rows)
        mixed = self.encoder_attn.attend(query, cross_key, cross_value, cross_mask)
        rows = self.encoder_attn_layer_norm(rows + mixed)
        return cast(Tensor, self.final_layer_norm(rows + self.fc2(self.activation(self.fc1(rows)))))

    def forward(self, rows: Tensor, states: Tensor, cross_mask: Tensor | None) -> Tensor:
        """Teacher-forced: rows [B, L, d] over states [B, S, d] -> [B, L, d]."""
        mixed = self.self_attn.attend(*self.self_attn.project(rows), is_causal=True)
        cross_key, cross_value = self.encoder_attn.project_key_value(states)
        return self.after_self_attention(rows, mixed, cross_key, cross_value, cross_mask)


class Stack(nn.Module):
    """What encoder and decoder share: embeddings, positions and their LayerNorm."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__()
        self.limit = config.max_position_embeddings
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = embed_tokens
        self.embed_positions = Embedding(self.limit + POSITION_OFFSET, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., d], scaled if the checkpoint says so."""
        vectors = self.embed_tokens(token_ids)
        return cast(Tensor, vectors if self.scale == 1.0 else vectors * self.scale)

    def add_positions(self, vectors: Tensor, start: int = 0) -> Tensor:
        """[B, L, d] at positions start ... start + L - 1 -> the first layer's input."""
        end = start + vectors.shape[1]
        self.check_length(end)
        table = self.embed_positions.weight[start + POSITION_OFFSET : end + POSITION_OFFSET]
        return cast(Tensor, self.layernorm_embedding(vectors + table))

    def add_position(self, vectors: Tensor, position: int) -> Tensor:
        """[..., d], all at one position -> the first layer's input."""
        self.check_length(position + 1)
        row = self.embed_positions.weight[position + POSITION_OFFSET]
        return cast(Tensor, self.layernorm_embedding(vectors + row))

    def add_position_each(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """[B, L, d], each item's at its own of ``positions`` [B] -> the first layer's input.

        Positions beyond the table take its last row: they belong to items nobody waits for.
        """
        places = (positions + POSITION_OFFSET).clamp(max=self.limit + POSITION_OFFSET - 1)
        rows = self.embed_positions(places).unsqueeze(1)
        return cast(Tensor, self.layernorm_embedding(vectors + rows))

    def check_length(self, length: int) -> None:
        """Raises when a sequence is longer than the position table."""
        if length > self.limit:
            raise RequestError(
                f"This checkpoint reads and writes at most {self.limit} tokens, got {length}; "
                "shorten the prompt or lower max_new_tokens."
            )


class Encoder(Stack):
    """The text encoder."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__(config, embed_tokens)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors [B, S, d], mask [B, S] True where filled -> states [B, S, d]."""
        rows = self.add_positions(vectors)
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            rows = layer(rows, wide)
        return rows


class Decoder(Stack):
    """The text decoder."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__(config, embed_tokens)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, token_ids: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Ids [B, L] over states [B, S, d] with mask [B, S] -> rows [B, L, d], all causal."""
        rows = self.add_positions(self.embed(token_ids))
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            rows = layer(rows, states, wide)
        return rows

    def product_weights(self) -> list[Tensor]:
        """Every matrix that a step multiplies its rows by."""
        found: list[Tensor] = []
        for module in self.modules():
            if isinstance(module, Linear):
                found.append(module.weight)
            elif isinstance(module, Attention) and module.fused_weight is not None:
                found.append(module.fused_weight)
        return found


class LanguageModel(nn.Module):
    """BART with one embedding shared by encoder and decoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.shared = Embedding(config.vocab_size, config.d_model, padding_idx=tokens.PAD_ID)
        self.encoder = Encoder(config, self.shared)
        self.decoder = Decoder(config, self.shared)

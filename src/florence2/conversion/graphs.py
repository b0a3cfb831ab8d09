"""The network as three OpenVINO models: vision tower, text encoder, and one pass of the decoder.

Written operation by operation and not traced, because layout decides the speed on a CPU:

- Tokens lie flat, [tokens, C], between operations, and the image's size is fixed, for one image at
  a time. Then OpenVINO needs no copy between a convolution's layout and a product's; with a free
  batch or with [B, H, W, C] a fifth of the tower's time went into copies.
- Cross-attention keys and values are made by the encoder's model, once per prompt.
- The decoder's model keeps no state. Its caches are inputs, and it gives the keys and values of the
  new tokens only: who runs it puts them into the caches, so items may come, go and be reordered
  as with the network itself (``florence2.generation.kv_cache``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as ops
from torch import Tensor, nn

from florence2.network.bart import Attention, Decoder, DecoderLayer, EncoderLayer
from florence2.network.davit import (
    AttentionBlock,
    Block,
    ChannelAttention,
    ConvEmbed,
    FeedForward,
    VisionTower,
    WindowAttention,
)
from florence2.network.florence import Florence2Network
from florence2.runtimes.openvino import LAYER_INPUTS

Node = Any
"""A node or an output of a model; the library has no types for them."""

AttentionGraph = Callable[[Node, Any, tuple[int, int]], Node]
"""Tokens, the module and the grid -> tokens."""

FEED_FORWARD: Final = "feed_forward"
"""What the names of products begin with whose activations bear 8 bits well in a text network."""

CROSS_OUTPUTS: Final = ("cross_key", "cross_value")
NEW_OUTPUTS: Final = ("new_key", "new_value")

_TYPES: Final = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}


def vision_model(network: Florence2Network, height: int, width: int) -> ov.Model:
    """``pixels`` [1, H, W, 3], normalised -> ``features`` [1, num_visual_tokens, d_model]."""
    pixels = ops.parameter([1, height, width, 3], ov.Type.f32, name="pixels")
    return _VisionGraph(network).build(pixels, (height, width))


def encoder_model(network: Florence2Network, cache_dtype: torch.dtype) -> ov.Model:
    """Encodes an image's tokens and a prompt, and projects what cross-attention looks at.

    ``vectors`` [B, S, d_model] with their positions added and ``mask`` [B, 1, 1, S], added to the
    scores -> for each decoder layer n ``cross_key.n`` and ``cross_value.n`` [B, heads, S, head_dim]
    in ``cache_dtype``.
    """
    text = network.config.text
    language_model = network.model.language_model
    vectors = ops.parameter([-1, -1, text.d_model], ov.Type.f32, name="vectors")
    mask = ops.parameter([-1, 1, 1, -1], ov.Type.f32, name="mask")
    states = _norm(vectors, language_model.encoder.layernorm_embedding)
    for layer in cast(Sequence[EncoderLayer], language_model.encoder.layers):
        states = _encoder_layer(states, layer, mask, text.activation)
    results = []
    for number, decoder_layer in enumerate(language_model.decoder.layers):
        attention = cast(DecoderLayer, decoder_layer).encoder_attn
        for name, part in zip(CROSS_OUTPUTS, (attention.k_proj, attention.v_proj), strict=True):
            heads = _heads(_linear(states, part), attention.heads)
            results.append(_result(_cast(heads, cache_dtype), f"{name}.{number}"))
    return ov.Model(results, [vectors, mask], "encoder")


def decoder_model(network: Florence2Network, cache_dtype: torch.dtype) -> ov.Model:
    """One pass of the decoder over L new tokens of every item.

    ``vectors`` [B, L, d_model] with their positions added; ``own_mask`` [B, 1, L, slots],
    ``new_mask`` [1, 1, L, L] and ``cross_mask`` [B, 1, 1, S] are added to the scores over the
    item's own cache, over the new tokens, and over the encoded prompt; of each layer n the cache's
    ``cross_key.n``, ``cross_value.n`` [B, heads, S, head_dim], ``own_key.n`` and ``own_value.n``
    [B, heads, slots, head_dim] in ``cache_dtype``. Gives ``logits`` [B, L, V], ``hidden``
    [B, L, d_model], and of each layer ``new_key.n`` and ``new_value.n`` [B, heads, L, head_dim].
    """
    text = network.config.text
    decoder = network.model.language_model.decoder
    graph = _DecoderGraph(decoder, text.decoder_attention_heads, cache_dtype, text.activation)
    hidden = graph.hidden(text.d_model)
    logits = _linear(hidden, network.lm_head)
    results = [_result(logits, "logits"), _result(hidden, "hidden"), *graph.results]
    return ov.Model(results, graph.parameters, "decoder")


class _VisionGraph:
    """DaViT and the projector for images of one size."""

    def __init__(self, network: Florence2Network) -> None:
        self._network = network
        self._activation = network.config.vision.activation

    def build(self, pixels: Node, grid: tuple[int, int]) -> ov.Model:
        tower: VisionTower = self._network.model.vision_tower
        tokens = pixels
        for embed, blocks in zip(tower.convs, tower.blocks, strict=True):
            tokens, grid = self._embed(tokens, cast(ConvEmbed, embed), grid)
            for block in cast(Sequence[Block], blocks):
                tokens = self._block(tokens, block.spatial_block, grid, self._window_attention)
                tokens = self._block(tokens, block.channel_block, grid, self._channel_attention)
        features = self._project(tokens, grid)
        return ov.Model([_result(features, "features")], [pixels], "vision")

    def _embed(
        self, tokens: Node, embed: ConvEmbed, grid: tuple[int, int]
    ) -> tuple[Node, tuple[int, int]]:
        """Patches of a stage: [tokens, C_in] of a grid -> [tokens, C_out] and their grid."""
        conv = embed.conv
        if embed.pre_norm:
            tokens = _norm(tokens, embed.norm)
        image = _reshape(tokens, -1, *grid, conv.in_channels)
        image = _convolution(image, conv)
        rows, columns = (
            (size + 2 * padding - side) // stride + 1
            for size, padding, side, stride in zip(
                grid,
                cast(tuple[int, int], conv.padding),
                conv.kernel_size,
                conv.stride,
                strict=True,
            )
        )
        tokens = _reshape(image, -1, conv.out_channels)
        if not embed.pre_norm:
            tokens = _norm(tokens, embed.norm)
        return tokens, (rows, columns)

    def _block(
        self, tokens: Node, block: AttentionBlock, grid: tuple[int, int], attention: AttentionGraph
    ) -> Node:
        tokens = self._residual_convolution(tokens, block.conv1, grid)
        mixed = attention(_norm(tokens, block.norm1), block.attention, grid)
        tokens = ops.add(tokens, mixed)
        tokens = self._residual_convolution(tokens, block.conv2, grid)
        ffn: FeedForward = block.ffn
        return ops.add(tokens, _feed_forward(_norm(tokens, block.norm2), ffn, self._activation))

    def _residual_convolution(self, tokens: Node, conv: nn.Conv2d, grid: tuple[int, int]) -> Node:
        image = _convolution(_reshape(tokens, -1, *grid, conv.in_channels), conv)
        return ops.add(tokens, _reshape(image, -1, conv.out_channels))

    def _window_attention(
        self, tokens: Node, attention: WindowAttention, grid: tuple[int, int]
    ) -> Node:
        (height, width), side = grid, attention.window
        dim = attention.proj.out_features
        rows, columns = -(-height // side), -(-width // side)
        is_padded = (rows * side, columns * side) != grid
        if is_padded:
            ends = _integers(0, rows * side - height, columns * side - width, 0)
            image = _reshape(tokens, -1, height, width, dim)
            tokens = ops.pad(image, _integers(0, 0, 0, 0), ends, "constant", _number(0.0))
        windows = _transpose(_reshape(tokens, -1, side, columns, side, dim), 0, 2, 1, 3, 4)
        query, key, value = _qkv(
            _reshape(windows, -1, dim), attention.qkv, attention.heads, side**2
        )
        scores = ops.softmax(ops.matmul(query, key, False, True), -1)
        mixed = _reshape(_transpose(ops.matmul(scores, value, False, False), 0, 2, 1, 3), -1, dim)
        # In the order of the windows, which spares a copy where nothing is cut off.
        mixed = _linear(mixed, attention.proj)
        mixed = _transpose(_reshape(mixed, -1, columns, side, side, dim), 0, 2, 1, 3, 4)
        if is_padded:
            image = _reshape(mixed, -1, rows * side, columns * side, dim)
            steps, axes = _integers(1, 1), _integers(1, 2)
            mixed = ops.slice(image, _integers(0, 0), _integers(height, width), steps, axes)
        return _reshape(mixed, -1, dim)

    def _channel_attention(
        self, tokens: Node, attention: ChannelAttention, grid: tuple[int, int]
    ) -> Node:
        count = grid[0] * grid[1]
        query, key, value = _qkv(tokens, attention.qkv, attention.groups, count, count**-0.5)
        scores = ops.softmax(ops.matmul(query, key, True, False), -1)
        mixed = _transpose(ops.matmul(value, scores, False, True), 0, 2, 1, 3)
        return _linear(_reshape(mixed, -1, attention.proj.out_features), attention.proj)

    def _project(self, tokens: Node, grid: tuple[int, int]) -> Node:
        projector = self._network.model.multi_modal_projector
        positions = projector.image_position_embed(grid)
        positions = positions + projector.visual_temporal_embed.pos_idx_to_embed[0]
        features = _reshape(tokens, -1, *positions.shape)
        features = ops.add(features, _constant(positions.unsqueeze(0)))
        features = ops.concat([ops.reduce_mean(features, _integers(1), True), features], 1)
        projected = _linear(features, projector.image_projection)
        return _norm(projected, projector.image_proj_norm)


class _DecoderGraph:
    """All layers of one pass, with the parameters and results that it needs on the way."""

    def __init__(
        self, decoder: Decoder, heads: int, cache_dtype: torch.dtype, activation: str
    ) -> None:
        self._decoder = decoder
        self._heads = heads
        self._cache_dtype = cache_dtype
        self._activation = activation
        self.parameters: list[Node] = []
        self.results: list[Node] = []

    def hidden(self, d_model: int) -> Node:
        """The last layer's states [B, L, d_model]."""
        vectors = self._parameter([-1, -1, d_model], "vectors")
        self._own_mask = self._parameter([-1, 1, -1, -1], "own_mask")
        self._new_mask = self._parameter([1, 1, -1, -1], "new_mask")
        self._cross_mask = self._parameter([-1, 1, 1, -1], "cross_mask")
        slots = ops.gather(ops.shape_of(self._own_mask), _integers(3), _integers(0))
        self._lengths = ops.concat([slots, _integers(-1)], 0)
        hidden = _norm(vectors, self._decoder.layernorm_embedding)
        for number, layer in enumerate(cast(Sequence[DecoderLayer], self._decoder.layers)):
            hidden = self._layer(hidden, layer, number)
        return hidden

    def _layer(self, hidden: Node, layer: DecoderLayer, number: int) -> Node:
        head_dim = layer.self_attn.q_proj.out_features // self._heads
        shape = [-1, self._heads, -1, head_dim]
        cross_key, cross_value, own_key, own_value = (
            self._cached(shape, f"{name}.{number}") for name in LAYER_INPUTS
        )
        query, key, value = self._projected(hidden, layer.self_attn)
        mixed = self._own_attention(query, key, value, own_key, own_value)
        hidden = _norm(
            ops.add(hidden, _linear(_merged(mixed), layer.self_attn.out_proj)),
            layer.self_attn_layer_norm,
        )
        for name, new in zip(NEW_OUTPUTS, (key, value), strict=True):
            self.results.append(_result(_cast(new, self._cache_dtype), f"{name}.{number}"))
        attention = layer.encoder_attn
        query = _heads(_linear(hidden, attention.q_proj, head_dim**-0.5), self._heads)
        mixed = _attend(query, cross_key, cross_value, self._cross_mask)
        hidden = _norm(
            ops.add(hidden, _linear(_merged(mixed), attention.out_proj)),
            layer.encoder_attn_layer_norm,
        )
        widened = _feed_forward(hidden, layer, self._activation)
        return _norm(ops.add(hidden, widened), layer.final_layer_norm)

    def _projected(self, hidden: Node, attention: Attention) -> list[Node]:
        """Queries, keys and values [B, heads, L, head_dim] by one product: it reads a weight."""
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        scale = (parts[0].out_features // self._heads) ** -0.5
        weight = torch.cat([parts[0].weight * scale, *(part.weight for part in parts[1:])])
        bias = torch.cat([parts[0].bias * scale, *(part.bias for part in parts[1:])])
        split = _reshape(_product(hidden, weight, bias), 0, 0, 3, self._heads, -1)
        stacked = _transpose(split, 2, 0, 3, 1, 4)
        halves = ops.split(stacked, _axis(0), 3).outputs()
        return [ops.squeeze(half, _integers(0)) for half in halves]

    def _own_attention(
        self, query: Node, key: Node, value: Node, own_key: Node, own_value: Node
    ) -> Node:
        """Over the cache and the new tokens, without joining them: that would copy the cache."""
        scores = [
            ops.add(ops.matmul(query, own_key, False, True), self._own_mask),
            ops.add(ops.matmul(query, key, False, True), self._new_mask),
        ]
        weights = ops.softmax(ops.concat(scores, -1), -1)
        cached, new = ops.variadic_split(weights, _axis(3), self._lengths).outputs()
        return ops.add(
            ops.matmul(cached, own_value, False, False), ops.matmul(new, value, False, False)
        )

    def _parameter(self, shape: Sequence[int], name: str) -> Node:
        parameter = ops.parameter(list(shape), ov.Type.f32, name=name)
        self.parameters.append(parameter)
        return parameter

    def _cached(self, shape: Sequence[int], name: str) -> Node:
        parameter = ops.parameter(list(shape), _TYPES[self._cache_dtype], name=name)
        self.parameters.append(parameter)
        return _cast(parameter, torch.float32) if self._cache_dtype != torch.float32 else parameter


def _encoder_layer(states: Node, layer: EncoderLayer, mask: Node, activation: str) -> Node:
    attention = layer.self_attn
    scale = (attention.q_proj.out_features // attention.heads) ** -0.5
    query = _heads(_linear(states, attention.q_proj, scale), attention.heads)
    key = _heads(_linear(states, attention.k_proj), attention.heads)
    value = _heads(_linear(states, attention.v_proj), attention.heads)
    mixed = _linear(_merged(_attend(query, key, value, mask)), attention.out_proj)
    states = _norm(ops.add(states, mixed), layer.self_attn_layer_norm)
    widened = _feed_forward(states, layer, activation)
    return _norm(ops.add(states, widened), layer.final_layer_norm)


def _attend(query: Node, key: Node, value: Node, mask: Node) -> Node:
    scores = ops.add(ops.matmul(query, key, False, True), mask)
    return ops.matmul(ops.softmax(scores, -1), value, False, False)


def _feed_forward(tokens: Node, layer: nn.Module, activation: str) -> Node:
    """Of a layer with ``fc1`` and ``fc2``."""
    widen, narrow = cast(nn.Linear, layer.fc1), cast(nn.Linear, layer.fc2)
    widened = _activated(_linear(tokens, widen, kind=FEED_FORWARD), activation)
    return _linear(widened, narrow, kind=FEED_FORWARD)


def _activated(values: Node, activation: str) -> Node:
    if activation == "relu":
        return ops.relu(values)
    return ops.gelu(values, "TANH" if activation == "gelu_pytorch_tanh" else "ERF")


def _qkv(
    tokens: Node, layer: nn.Linear, heads: int, length: int, scale: float | None = None
) -> list[Node]:
    """Queries, scaled, keys and values [N, heads, length, head_dim] of tokens [N * length, C].

    Three products and not one: each is turned into heads where it is written.
    """
    head_dim = layer.in_features // heads
    scales = (head_dim**-0.5 if scale is None else scale, 1.0, 1.0)
    biases = [None] * 3 if layer.bias is None else layer.bias.chunk(3)
    made = []
    for weight, bias, by in zip(layer.weight.chunk(3), biases, scales, strict=True):
        product = _product(tokens, weight * by, None if bias is None else bias * by)
        made.append(_transpose(_reshape(product, -1, length, heads, head_dim), 0, 2, 1, 3))
    return made


def _heads(projected: Node, heads: int) -> Node:
    """[B, L, dim] -> [B, heads, L, head_dim]."""
    return _transpose(_reshape(projected, 0, 0, heads, -1), 0, 2, 1, 3)


def _merged(mixed: Node) -> Node:
    """[B, heads, L, head_dim] -> [B, L, dim]."""
    heads, head_dim = (mixed.get_output_partial_shape(0)[dim].get_length() for dim in (1, 3))
    return _reshape(_transpose(mixed, 0, 2, 1, 3), 0, 0, heads * head_dim)


def _linear(values: Node, layer: nn.Linear, scale: float = 1.0, kind: str = "") -> Node:
    bias = None if layer.bias is None else layer.bias * scale
    weight = layer.weight * scale if scale != 1.0 else layer.weight
    return _product(values, weight, bias, kind)


def _product(values: Node, weight: Tensor, bias: Tensor | None, kind: str = "") -> Node:
    product = ops.matmul(values, _constant(weight), False, True)
    if kind:
        product.set_friendly_name(f"{kind}/{product.get_name()}")
    return product if bias is None else ops.add(product, _constant(_last(bias, values)))


def _norm(values: Node, layer: nn.LayerNorm) -> Node:
    normed = ops.mvn(values, _integers(-1), True, layer.eps, "inside_sqrt")
    weight, bias = (_constant(_last(part, values)) for part in (layer.weight, layer.bias))
    return ops.add(ops.multiply(normed, weight), bias)


def _last(vector: Tensor, values: Node) -> Tensor:
    """A vector along the last dimension of ``values``."""
    rank = values.get_output_partial_shape(0).rank.get_length()
    return vector.reshape(*[1] * (rank - 1), -1)


def _convolution(image: Node, conv: nn.Conv2d) -> Node:
    """[B, H, W, C_in] -> [B, H', W', C_out]."""
    weight, stride, padding = conv.weight, list(conv.stride), list(conv.padding)
    channels_first = _transpose(image, 0, 3, 1, 2)
    if conv.groups > 1:
        grouped = weight.reshape(conv.groups, -1, *weight.shape[1:])
        made = ops.group_convolution(
            channels_first, _constant(grouped), stride, padding, padding, [1, 1]
        )
    else:
        made = ops.convolution(channels_first, _constant(weight), stride, padding, padding, [1, 1])
    if conv.bias is not None:
        made = ops.add(made, _constant(conv.bias.reshape(1, -1, 1, 1)))
    return _transpose(made, 0, 2, 3, 1)


def _cast(values: Node, dtype: torch.dtype) -> Node:
    return (
        values if values.get_element_type() == _TYPES[dtype] else ops.convert(values, _TYPES[dtype])
    )


def _result(values: Node, name: str) -> Node:
    result = ops.result(values)
    result.get_output_tensor(0).set_names({name})
    return result


def _reshape(values: Node, *shape: int) -> Node:
    """As torch's, and 0 keeps a dimension."""
    return ops.reshape(values, _integers(*shape), 0 in shape)


def _transpose(values: Node, *order: int) -> Node:
    return ops.transpose(values, _integers(*order))


def _constant(values: Tensor) -> Node:
    return ops.constant(np.ascontiguousarray(values.detach().float().numpy()))


def _integers(*values: int) -> Node:
    return ops.constant(np.array(values, np.int64))


def _axis(number: int) -> Node:
    return ops.constant(np.array(number, np.int64))


def _number(value: float) -> Node:
    return ops.constant(np.array(value, np.float32))

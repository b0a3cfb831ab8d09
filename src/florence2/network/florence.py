"""The whole network. Parameter names are those of the published native layout."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.errors import ImageError
from florence2.network.bart import (
    Attention,
    Embedding,
    LanguageModel,
    LayerCache,
    Linear,
    TransposedCounts,
    WeightKind,
    choose_forms,
)
from florence2.network.config import NetworkConfig, VisionConfig
from florence2.network.davit import Grid, VisionTower


class PositionEmbedding2D(nn.Module):
    """Learned tables of columns (first half of the channels) and rows (second half)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.embed_dim[-1]
        self.limit = config.max_position_embeddings
        self.row_embeddings = Embedding(self.limit, dim // 2)
        self.column_embeddings = Embedding(self.limit, dim - dim // 2)

    def forward(self, grid: Grid) -> Tensor:
        """[rows * columns, C]."""
        rows, columns = grid
        if max(grid) > self.limit:
            raise ImageError(
                f"The vision grid may have at most {self.limit} rows and columns, "
                f"got {rows} x {columns}; use a smaller input size."
            )
        column_part = self.column_embeddings.weight[:columns].expand(rows, -1, -1)
        row_part = self.row_embeddings.weight[:rows, None].expand(-1, columns, -1)
        return torch.cat([column_part, row_part], dim=-1).flatten(0, 1)


class TemporalEmbedding(nn.Module):
    """The sine and cosine table over frames; an image is frame 0."""

    pos_idx_to_embed: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        table = torch.empty(config.max_temporal_embeddings, config.embed_dim[-1])
        self.register_buffer("pos_idx_to_embed", table)

    def fill(self) -> None:
        """Computes the table; most checkpoints bring their own."""
        self.pos_idx_to_embed.copy_(temporal_table(*self.pos_idx_to_embed.shape))


def temporal_table(frames: int, dim: int) -> Tensor:
    """Sines and cosines of each frame's number in turn, from fast to slow: [frames, dim]."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(10000) / (dim // 2)))
    angles = torch.arange(frames)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Projector(nn.Module):
    """Adds positions, puts the mean token in front, projects to the text width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_projection = Linear(config.embed_dim[-1], config.projection_dim, bias=False)
        self.image_proj_norm = nn.LayerNorm(config.projection_dim)
        self.image_position_embed = PositionEmbedding2D(config)
        self.visual_temporal_embed = TemporalEmbedding(config)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] of a grid -> [B, 1 + N, d_model]."""
        features = features + self.image_position_embed(grid)
        features = features + self.visual_temporal_embed.pos_idx_to_embed[0]
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)
        return cast(Tensor, self.image_proj_norm(self.image_projection(features)))


class FlorenceModel(nn.Module):
    """Tower, projector and language model."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision)
        self.language_model = LanguageModel(config.text)


class Florence2Network(nn.Module):
    """Florence-2: images and prompts in, logits out.

    A new network is randomly initialised; ``florence2.checkpoint.weights.build_network`` makes one
    from a checkpoint. ``lm_head`` shares its weight with the embedding unless the checkpoint has
    one of its own.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.notes: tuple[str, ...] = ()
        """What reading the weights met that their user should know, a sentence each."""
        self.model = FlorenceModel(config)
        self.lm_head = Linear(config.text.d_model, config.text.vocab_size, bias=False)
        self.tie()
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> visual tokens [B, N_visual, d_model]."""
        features, grid = self.model.vision_tower(pixels)
        return cast(Tensor, self.model.multi_modal_projector(features, grid))

    def encode_prompts(
        self, visual: Tensor, prompt_ids: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes each image's tokens followed by its prompt.

        ``visual`` [B, N_visual, d]; ``prompt_ids`` [B, T] with ``<s>`` and ``</s>``, padded on the
        right; ``prompt_mask`` [B, T] bool, True where not padding. Gives states [B, S, d] and
        their mask [B, S] bool with S = N_visual + T.
        """
        encoder = self.model.language_model.encoder
        vectors = torch.cat([visual, encoder.embed(prompt_ids)], dim=1)
        mask = torch.cat([prompt_mask.new_ones(visual.shape[:2]), prompt_mask], dim=1)
        return encoder(vectors, mask), mask

    def decode(self, decoder_ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Teacher-forced: ids [B, L] (from ``</s>`` on) -> logits [B, L, V] of the next ids."""
        hidden = self.model.language_model.decoder(decoder_ids, states, mask)
        return cast(Tensor, self.lm_head(hidden))

    @property
    def position_limit(self) -> int:
        """The most tokens that are read and written."""
        return self.model.language_model.decoder.limit

    def check_length(self, length: int) -> None:
        """RequestError for a sequence that is longer."""
        self.model.language_model.decoder.check_length(length)

    def prefill_logits(
        self,
        token_ids: Tensor,
        caches: Sequence[LayerCache],
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """Ids [P] that every item begins with -> logits [B, V] after the last of them.

        As ``Decoder.prefill`` and ``next_logits``.
        """
        hidden = self.model.language_model.decoder.prefill(token_ids, caches, cross_mask)
        return self.next_logits(hidden[:, -1], num_exact)

    def step_logits(
        self,
        token_ids: Tensor,
        position: int | Tensor,
        caches: Sequence[LayerCache],
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """Ids [B, beams] -> logits [B, beams, V]; as ``Decoder.step`` and ``next_logits``."""
        decoder = self.model.language_model.decoder
        hidden = decoder.step(token_ids, position, caches, slots, mask, cross_mask)
        return self.next_logits(hidden, num_exact)

    def next_logits(self, hidden: Tensor, num_exact: int) -> Tensor:
        """Decoder states [..., d] -> logits [..., V] of the next ids, the best of them float32.

        Reduced precision rounds every logit to 8 or 11 bits, and then the best of a row are often
        equal. So the ``num_exact`` best of each row are computed once more, in float32, from the
        same states and weights. Otherwise the logits are those of ``lm_head``.
        """
        logits = cast(Tensor, self.lm_head(hidden))
        if logits.dtype not in (torch.bfloat16, torch.float16):
            return logits
        return rescored(logits, hidden, self.lm_head.weight, num_exact)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def is_tied(self) -> bool:
        """Whether ``lm_head`` uses the shared embedding's weight."""
        return self.lm_head.weight is self.model.language_model.shared.weight

    def tie(self) -> None:
        """Makes ``lm_head`` use the shared embedding's weight."""
        self.lm_head.weight = self.model.language_model.shared.weight

    def prepare_for_inference(self) -> Florence2Network:
        """Freezes the weights and lays them out for speed; to be called again once moved."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif isinstance(module, Attention):
                module.fuse()
        weights = [
            layer.fused and layer.fused[0] if isinstance(layer, Attention) else layer.weight
            for layer in self._layers_of_step()
        ]
        self.take_forms(choose_forms([weight for weight in weights if weight is not None]))
        return self.eval().requires_grad_(False)

    def sharing(self, changed: Mapping[str, Tensor]) -> Florence2Network:
        """A network with ``changed`` values of some weights, and this one's own for all others.

        ``changed`` has names of ``state_dict``, any precision and device; this network is laid out
        for inference. The three input projections of an attention are one weight: with one of them
        changed, the other network has all three of its own. Its other weights are this one's
        parameters themselves, which move with it; once they have, ``lay_out_as`` is to be called.
        """
        # Kept out of the copy; to torch what is fused is no parameter.
        fused = [one.fused for one in self._attentions() if one.fused is not None]
        held = {id(value): value for value in (*self.parameters(), *self.buffers(), *fused)}
        other = copy.deepcopy(self, held)
        for name, value in changed.items():
            path, _, own = name.rpartition(".")
            module = other.get_submodule(path)
            before = getattr(module, own)
            value = value.to(before.device, before.dtype)
            is_weight = isinstance(before, nn.Parameter)
            setattr(module, own, nn.Parameter(value, requires_grad=False) if is_weight else value)
        for attention, of_this in zip(other._attentions(), self._attentions(), strict=True):
            if not attention.shares(of_this):
                attention.own_projections()
        other.lay_out_as(self)
        return other.eval()

    def lay_out_as(self, base: Florence2Network) -> None:
        """Lays the weights out for speed, but for those it shares with ``base``, which has."""
        for module, of_base in zip(self.modules(), base.modules(), strict=True):
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif isinstance(module, Attention):
                module.fuse_as(cast(Attention, of_base))
            elif isinstance(module, Linear):
                module.take_form_of(cast(Linear, of_base))

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def take_forms(self, forms: Mapping[WeightKind, TransposedCounts]) -> None:
        """Has every layer of a decoder step multiply few rows in the form chosen for its weight."""
        for layer in self._layers_of_step():
            layer.choose_form(forms)

    def _layers_of_step(self) -> list[Attention | Linear]:
        """Only a decoder step has few rows: what it multiplies by, in its order."""
        modules = (*self.model.language_model.decoder.modules(), self.lm_head)
        return [module for module in modules if isinstance(module, (Attention, Linear))]

    def reset_parameters(self, std: float = 0.02) -> None:
        """Random weights for training from scratch: normal, biases zero."""
        self.model.multi_modal_projector.visual_temporal_embed.fill()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=std)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)

    def native_state(self) -> dict[str, Tensor]:
        """The state as the native layout stores it: tied copies appear once.

        Loadable by ``transformers``, safe to write as safetensors.
        """
        embedding = "model.language_model.{}.embed_tokens.weight"
        dropped = {embedding.format("encoder"), embedding.format("decoder")}
        if self.is_tied:
            dropped.add("lm_head.weight")
        return {
            name: _of_its_own(value.detach())
            for name, value in self.state_dict().items()
            if name not in dropped
        }


def _of_its_own(value: Tensor) -> Tensor:
    """Contiguous, and no part of a larger tensor: what is stored must not share memory."""
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value.contiguous()


def rescored(logits: Tensor, hidden: Tensor, weight: Tensor, num_exact: int) -> Tensor:
    """Logits [..., V] in float32, the ``num_exact`` best of each row computed anew in float32.

    From states ``hidden`` [..., d] and the output projection's ``weight`` [V, d].
    """
    flat = logits.float().flatten(0, -2)
    ids = top_candidates(flat, min(num_exact, flat.shape[-1]))[1]
    weights = functional.embedding(ids, weight).float()
    # Not a matrix product: its sums would depend on how many rows there are, and on TF32.
    exact = (weights * hidden.float().flatten(0, -2).unsqueeze(1)).sum(-1)
    return flat.scatter_(1, ids, exact).view(logits.shape)


BLOCK: Final = 128
SMALL_VOCABULARY: Final = 4096
"""Up to so many tokens a plain ``topk`` is as fast as looking for the best blocks first."""


def top_candidates(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best tokens of every row [rows, V], best first: values and ids [rows, count].

    Finds the blocks that hold the best maxima first: the winners are all inside the ``count``
    best blocks, so a large vocabulary is only read once, by a plain maximum.
    """
    rows, vocab = scores.shape
    blocks = vocab // BLOCK
    if vocab <= SMALL_VOCABULARY or blocks < count:
        values, ids = torch.topk(scores, count)
        return values, ids
    device = scores.device
    whole = blocks * BLOCK
    maxima = scores[:, :whole].view(rows, blocks, BLOCK).amax(dim=2)
    best_blocks = torch.topk(maxima, count, sorted=False)[1]
    columns = best_blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=device)
    tail = torch.arange(whole, vocab, device=device).expand(rows, -1)
    columns = torch.cat((columns.flatten(1), tail), dim=1)
    values, places = torch.topk(scores.gather(1, columns), count)
    return values, columns.gather(1, places)

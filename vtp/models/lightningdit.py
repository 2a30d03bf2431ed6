"""LightningDiT: a diffusion transformer with rotary positions, RMSNorm and SwiGLU, conditioned by adaLN-zero.

Yao et al. 2025, as the paper uses it (4.1), told a class; or a caption (paper 5), which every block reads by an attention
of its own behind that of the picture (Chen et al. 2024, PixArt), or as more tokens beside those of the picture. Argument
names and state-dict keys are the official ones, so checkpoints go both ways. The forward pass is pure: whoever trains
replaces dropped conditions by those of `without`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtp.artefact import load_module
from vtp.layers.captions import Captions, Condition
from vtp.layers.grid_positions import GridPositions, GridRope, sine_table, turn
from vtp.layers.latent_space import LatentSpace
from vtp.layers.norm import RMSNorm
from vtp.layers.rope import Rotation
from vtp.models.captions import CaptionEmbed, CrossAttention
from vtp.models.generator_folder import LightningDiTConfig, read_generator, save_generator

FREQUENCIES = 256  # width of the sinusoidal time embedding


class LightningDiT(nn.Module):
    """Velocity of noisy latents: (x [B, C, H, W], t [B] in [0, 1], condition) -> [B, C, H, W].

    The condition is labels [B], or the captions of a model with `config.text`. H and W are any multiples of the patch.
    Positions of squares of `input_size` are stored, as the official ones are; what those of other grids are is said by
    `other_sizes`.
    """

    pos_embed: nn.Parameter
    space: LatentSpace | None = None  # of its latents; None: the folder does not say, as published ones do not
    sampler: Mapping[str, Any] | None = (
        None  # how to draw, unless one says otherwise; a record of vtp.flow.SamplerConfig
    )
    text_encoder: Mapping[str, Any] | None = None  # whose captions it reads; a record of vtp.models.text_encoder
    residual: torch.dtype | None = None  # of what blocks add to, in training; None: as the layers' precision gives it
    recompute = False  # whether blocks compute their activations again in the backward pass instead of keeping them

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.config = config
        side, dim = config.input_size // config.patch_size, config.hidden_size
        self.x_embedder = LatentEmbed(config.in_channels, dim, config.patch_size)
        self.t_embedder = TimeEmbed(dim)
        self.y_embedder = (
            LabelEmbed(config.num_classes, dim) if config.text is None else CaptionEmbed(config.text.width, dim)
        )
        self.pos_embed = nn.Parameter(sine_table(side, side, dim)[None], requires_grad=False)
        self.feat_rope = GridRope(side, dim // config.num_heads) if config.use_rope else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._other_grids: dict[tuple[object, ...], GridPositions] = {}  # by size and device; no state
        self._initialise()

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def without(self, condition: Condition, dropped: Tensor | None = None) -> Condition:
        """The condition with that of nothing where `dropped` [B] says so, or everywhere."""
        if isinstance(condition, Captions):
            gone = torch.ones_like(condition.mask[:, 0]) if dropped is None else dropped
            return Captions(condition.features, condition.mask & ~gone[:, None])
        null = torch.full_like(condition, self.null_label)
        return null if dropped is None else torch.where(dropped, null, condition)

    def shape_of_condition(self, count: int) -> Condition:
        """What so many samples are told, as far as shapes go: zeros."""
        text = self.config.text
        if text is None:
            return torch.zeros(count, dtype=torch.long)
        return Captions(torch.zeros(count, text.length, text.width), torch.ones(count, text.length, dtype=torch.bool))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the size whose positions are stored."""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    def latents_of(self, size: tuple[int, int] | None, pixels_per_latent: int) -> tuple[int, int, int]:
        """(C, H, W) of pictures of that height and width; None: those whose positions are stored.

        Raises ValueError for sides that are no whole tokens.
        """
        if size is None:
            return self.latent_shape
        unit = pixels_per_latent * self.config.patch_size
        height, width = size
        if min(size) < 1 or height % unit or width % unit:
            raise ValueError(
                f"pictures of {width} x {height} pixels: sides must be multiples of {unit}, the pixels of a token of this "
                "generator"
            )
        return self.config.in_channels, height // pixels_per_latent, width // pixels_per_latent

    @property
    def compiled_units(self) -> Sequence[nn.Module]:
        """What torch.compile takes one by one, so that equal blocks are compiled once."""
        return [*self.blocks, self.final_layer]

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raises ValueError when H or W is not a multiple of the patch size."""
        p, text = self.config.patch_size, self.config.text
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"latents are {x.shape[2]}x{x.shape[3]}, no multiple of patch_size {p}")
        grid = x.shape[2] // p, x.shape[3] // p
        table, rotation = self._positions(*grid)
        x = self.x_embedder(x) + table  # [B, N, D]
        tokens, time, said = x.shape[1], self.t_embedder(t), self.y_embedder(condition)
        modulation, captions = (time + said, None) if text is None else (time, said)  # [B, D]
        if text is not None and text.reading == "joint":
            x = torch.cat([x, said.features.to(x.dtype)], dim=1)
        x = x if self.residual is None else x.to(self.residual)
        for block in self.blocks:
            given = (x, modulation, rotation, captions)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*given)
        x = self.final_layer(x[:, :tokens], modulation)  # [B, N, p * p * C]
        x = x.unflatten(2, (p, p, -1)).unflatten(1, grid)  # [B, h, w, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _positions(self, height: int, width: int) -> GridPositions:
        """Of a grid of tokens: stored ones, or others that are made once."""
        base = self.config.input_size // self.config.patch_size
        if height == width == base:
            return GridPositions(self.pos_embed, None if self.feat_rope is None else self.feat_rope.rotation)
        key = height, width, self.pos_embed.device, self.pos_embed.dtype
        if key not in self._other_grids:
            dim, heads = self.config.hidden_size, self.config.num_heads
            head_dim = None if self.feat_rope is None else dim // heads
            scale = base / math.sqrt(height * width) if self.config.other_sizes == "interpolate" else 1.0
            with torch.inference_mode(False):  # a training may use them later
                made = GridPositions.of(height, width, dim, head_dim, scale=scale, like=self.pos_embed)
            self._other_grids[key] = made
        return self._other_grids[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder as `save_generator` does; equal weights give equal bytes."""
        save_generator(
            Path(folder),
            self.config,
            self.state_dict(),
            space=self.space,
            sampler=self.sampler,
            text_encoder=self.text_encoder,
        )

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a folder with `config.json` and `model.safetensors`, or an official `.pt` beside a `config.json`.

        A `.pt` holds `ema`, which is taken first, or `model`. Raises ArtefactError naming what does not fit.
        """
        stored = read_generator(Path(source))
        model = load_module(lambda: cls(stored.config), stored.weights, where=stored.where)
        model.space, model.sampler, model.text_encoder = stored.space, stored.sampler, stored.text_encoder
        return model.eval()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # pyright: ignore[reportArgumentType] - the convolution has one
        if isinstance(self.y_embedder, LabelEmbed):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the whole model as zero.
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or "cross_attn.proj" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


class LatentEmbed(nn.Module):
    """Latents to tokens by one convolution."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    """t in [0, 1], unscaled, through cosines and sines and a small MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbed(nn.Module):
    """One vector per class and one for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class DiTAttention(nn.Module):
    """Self-attention with optional QK-norm, then rotation."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """`mask` [B, tokens] bool: which are looked at; None: all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = turn(q, rotation), turn(k, rotation)
        keys = None if mask is None else mask[:, None, None, :]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2))


class DiTSwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b = w12 x; hidden width 2/3 of the given one."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden_dim = int(2 / 3 * hidden_dim)
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DiTMlp(nn.Module):
    """fc2(gelu(fc1 x)), tanh approximation as in DiT."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by time and class; between them, the caption is read."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        dim, self.shifted = config.hidden_size, not config.wo_shift
        hidden_dim = int(dim * config.mlp_ratio)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = DiTAttention(config)
        self.mlp = DiTSwiGLU(dim, hidden_dim) if config.use_swiglu else DiTMlp(dim, hidden_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if self.shifted else 4) * dim))
        self.joint = config.text is not None and config.text.reading == "joint"
        if config.text is not None and not self.joint:
            # Normalised, as what the other layers read is: the residual stream grows with depth.
            self.norm_cross = _norm(config)
            self.cross_attn = CrossAttention(
                dim, config.num_heads, q_norm=_head_norm(config), k_norm=_head_norm(config)
            )

    def forward(
        self, x: Tensor, condition: Tensor, rotation: Rotation | None, captions: Captions | None = None
    ) -> Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6 if self.shifted else 4, dim=-1)
        if self.shifted:
            attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = parts
        else:
            (attn_scale, attn_gate, mlp_scale, mlp_gate), attn_shift, mlp_shift = parts, 0.0, 0.0
        mask = None
        if captions is not None and self.joint:
            picture = captions.mask.new_ones(x.shape[0], x.shape[1] - captions.mask.shape[1])
            mask = torch.cat([picture, captions.mask], dim=1)
        x = x + attn_gate * self.attn(self.norm1(x) * (1 + attn_scale) + attn_shift, rotation, mask)
        if captions is not None and not self.joint:
            x = x + self.cross_attn(self.norm_cross(x), captions)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class FinalLayer(nn.Module):
    """Modulated norm, then tokens to patches of velocity."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = _norm(config)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def _norm(config: LightningDiTConfig) -> nn.Module:
    dim = config.hidden_size
    return RMSNorm(dim, eps=1e-6) if config.use_rmsnorm else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def _head_norm(config: LightningDiTConfig) -> nn.Module:
    if not config.use_qknorm:
        return nn.Identity()
    dim = config.hidden_size // config.num_heads
    return RMSNorm(dim, eps=1e-6) if config.use_rmsnorm else nn.LayerNorm(dim)

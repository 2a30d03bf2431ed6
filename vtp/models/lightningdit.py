"""LightningDiT: a diffusion transformer with rotary positions, RMSNorm and SwiGLU, conditioned by adaLN-zero.

Yao et al. 2025, as the paper uses it (4.1). Argument names and state-dict keys are the official ones, so checkpoints go
both ways. The forward pass is pure: whoever trains replaces dropped labels by `null_label`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtp.artefact import ArtefactError, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.config import Config
from vtp.layers.norm import RMSNorm

FORMAT_VERSION = 1
FREQUENCIES = 256  # width of the sinusoidal time embedding


class LightningDiTConfig(Config):
    """Architecture, under the official argument names."""

    input_size: int = Field(ge=1, description="side of the latent grid")
    patch_size: int = Field(ge=1, description="side of a token in latents")
    in_channels: int = Field(ge=1, description="latent channels")
    hidden_size: int = Field(ge=1, description="width")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="attention heads")
    mlp_ratio: float = Field(gt=0, description="hidden width of the feed-forward layers over the width")
    num_classes: int = Field(ge=1, description="classes; one more entry stands for no class")
    use_qknorm: bool = Field(description="normalise queries and keys per head; steadies training")
    use_swiglu: bool = Field(description="SwiGLU, else GELU feed-forward layers")
    use_rope: bool = Field(description="rotary positions beside the fixed sine table")
    use_rmsnorm: bool = Field(description="RMSNorm with weights, else LayerNorm without")
    wo_shift: bool = Field(description="leave the shifts out of adaLN")

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by 4 and by num_heads {self.num_heads}")
        if self.use_rope and self.hidden_size // self.num_heads % 4:
            raise ValueError(f"use_rope needs heads of a width divisible by 4, got {self.hidden_size}/{self.num_heads}")
        return self


# Defaults of the official constructor, for published config files that leave keys out.
OFFICIAL_DEFAULTS: Mapping[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 32,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "use_qknorm": False,
    "use_swiglu": False,
    "use_rope": False,
    "use_rmsnorm": False,
    "wo_shift": False,
}
_TRAINING_ONLY = ("class_dropout_prob", "use_checkpoint")


class GeneratorSize(NamedTuple):
    """Depth, width and heads of a named model."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES: Mapping[str, GeneratorSize] = {
    "S": GeneratorSize(12, 384, 6),
    "B": GeneratorSize(12, 768, 12),
    "L": GeneratorSize(24, 1024, 16),
    "XL": GeneratorSize(28, 1152, 16),
    "1p0B": GeneratorSize(24, 1536, 24),
    "1p6B": GeneratorSize(28, 1792, 28),
}


class LightningDiT(nn.Module):
    """Velocity of noisy latents: (x [B, C, H, W], t [B] in [0, 1], labels [B]) -> [B, C, H, W]."""

    pos_embed: nn.Parameter
    encoder: str | None = None  # digest of the encoder whose latents it makes; None: the file does not say
    recompute = False  # whether blocks compute their activations again in the backward pass instead of keeping them

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.config = config
        side, dim = config.input_size // config.patch_size, config.hidden_size
        self.x_embedder = LatentEmbed(config.in_channels, dim, config.patch_size)
        self.t_embedder = TimeEmbed(dim)
        self.y_embedder = LabelEmbed(config.num_classes, dim)
        self.pos_embed = nn.Parameter(sine_table(side, dim)[None], requires_grad=False)
        self.feat_rope = GridRope(side, dim // config.num_heads) if config.use_rope else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    @property
    def compiled_units(self) -> Sequence[nn.Module]:
        """What torch.compile takes one by one, so that equal blocks are compiled once."""
        return [*self.blocks, self.final_layer]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        side = x.shape[-1] // self.config.patch_size
        x = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        condition = self.t_embedder(t) + self.y_embedder(labels)  # [B, D]
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, self.feat_rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, condition, self.feat_rope)
        x = self.final_layer(x, condition)  # [B, N, p * p * C]
        p = self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B, h, w, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; equal weights give equal bytes."""
        save_generator(Path(folder), self.config, self.state_dict(), encoder=self.encoder)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a folder with `config.json` and `model.safetensors`, or an official `.pt` beside a `config.json`.

        A `.pt` holds `ema`, which is taken first, or `model`. Raises ArtefactError naming what does not fit.
        """
        source = Path(source)
        folder = source if source.is_dir() or source.suffix != ".pt" else source.parent
        weights = folder / "model.safetensors" if source == folder else source
        if not weights.exists() and source == folder and (found := sorted(folder.glob("*.pt"))):
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                raise ArtefactError(f"{folder} holds several checkpoints ({names}); give the path of one")
            weights = found[0]
        config, encoder = _read_config(folder / "config.json")
        model = cls(config)
        model.encoder = encoder
        tensors = _official_checkpoint(weights) if weights.suffix == ".pt" else load_tensors(weights)
        expected = model.state_dict()
        wrong = [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
        wrong += [f"unknown {key}" for key in sorted(tensors.keys() - expected.keys())]
        wrong += [
            f"{key} has shape {list(tensors[key].shape)}, config.json asks for {list(value.shape)}"
            for key, value in expected.items()
            if key in tensors and tensors[key].shape != value.shape
        ]
        if wrong:
            raise ArtefactError(f"{weights} does not fit {folder / 'config.json'}: {'; '.join(wrong[:5])}")
        model.load_state_dict(tensors)
        return model.eval()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # pyright: ignore[reportArgumentType] - the convolution has one
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the whole model as zero.
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


def save_generator(
    folder: Path,
    config: LightningDiTConfig,
    weights: Mapping[str, Tensor],
    *,
    encoder: str | None,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a generator, given by its state dict and the digest of the encoder whose latents it learnt.

    `others`, such as slower averages, become folders inside of it.
    """
    pipeline = {"format_version": FORMAT_VERSION} | ({"encoder": encoder} if encoder else {})
    description = config.model_dump() | {"vtp_pipeline": pipeline}
    with whole_folder(folder) as temporary:
        for place, state in {".": weights, **(others or {})}.items():
            (temporary / place).mkdir(exist_ok=True)
            write_json(temporary / place / "config.json", description)
            save_tensors(temporary / place / "model.safetensors", state)


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


class GridRope(nn.Module):
    """Rotary positions on a grid: the first half of a head turns with the row, the second with the column."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        per_axis = head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, per_axis, 2).float() / per_axis)
        angles = (torch.arange(side).float()[:, None] * frequencies).repeat_interleave(2, dim=1)  # [side, per_axis]
        rows = angles[:, None].expand(-1, side, -1)
        columns = angles[None].expand(side, -1, -1)
        grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [N, head_dim]
        self.register_buffer("freqs_cos", grid.cos())
        self.register_buffer("freqs_sin", grid.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn neighbouring pairs of x [B, heads, N, head_dim]."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)


class DiTAttention(nn.Module):
    """Self-attention with optional QK-norm, then rotation."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: nn.Module | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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
    """Attention and feed-forward, each scaled, shifted and gated by the condition."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        dim, self.shifted = config.hidden_size, not config.wo_shift
        hidden_dim = int(dim * config.mlp_ratio)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = DiTAttention(config)
        self.mlp = DiTSwiGLU(dim, hidden_dim) if config.use_swiglu else DiTMlp(dim, hidden_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if self.shifted else 4) * dim))

    def forward(self, x: Tensor, condition: Tensor, rope: nn.Module | None) -> Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6 if self.shifted else 4, dim=-1)
        if self.shifted:
            attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = parts
        else:
            (attn_scale, attn_gate, mlp_scale, mlp_gate), attn_shift, mlp_shift = parts, 0.0, 0.0
        x = x + attn_gate * self.attn(self.norm1(x) * (1 + attn_scale) + attn_shift, rope)
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


def sine_table(side: int, dim: int) -> Tensor:
    """Fixed positions [side * side, dim]: first half from the column, second from the row, sines then cosines (MAE)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim / 2]
    columns = waves[None].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def _norm(config: LightningDiTConfig) -> nn.Module:
    dim = config.hidden_size
    return RMSNorm(dim, eps=1e-6) if config.use_rmsnorm else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def _head_norm(config: LightningDiTConfig) -> nn.Module:
    if not config.use_qknorm:
        return nn.Identity()
    dim = config.hidden_size // config.num_heads
    return RMSNorm(dim, eps=1e-6) if config.use_rmsnorm else nn.LayerNorm(dim)


def _read_config(path: Path) -> tuple[LightningDiTConfig, str | None]:
    """The architecture, and the digest of the encoder that belongs to it, if it is known."""
    values = dict(OFFICIAL_DEFAULTS) | read_json(path)
    pipeline = values.pop("vtp_pipeline", {"format_version": FORMAT_VERSION})
    if pipeline.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(f"{path}: format {pipeline.get('format_version')!r}, this code reads {FORMAT_VERSION}")
    if values.pop("learn_sigma", False):
        raise ArtefactError(f"{path}: learn_sigma is not supported; no LightningDiT was published with it")
    for key in _TRAINING_ONLY:
        values.pop(key, None)
    return LightningDiTConfig.parse(values, where=str(path)), pipeline.get("encoder")


def _official_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ArtefactError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ArtefactError(f"{path}: not a checkpoint of plain tensors ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: holds a {type(content).__name__}, expected a dict with ema or model")
    for name in ("ema", "model"):
        if name in content:
            return {key.removeprefix("module."): value for key, value in content[name].items()}
    raise ArtefactError(f"{path}: holds {', '.join(map(str, content))}, expected ema or model")

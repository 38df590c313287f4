"""DiT written as a tutorial would: ``nn.MultiheadAttention``, nothing fused. The baseline of the training benchmark."""

import torch
from torch import Tensor, nn

from ditlit.models import DiT
from ditlit.models.embeddings import TimestepEmbedding, patchify, unpatchify


class PlainBlock(nn.Module):
    """An adaLN-Zero block of PyTorch's own modules."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=2)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h)[0]
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class PlainDiT(nn.Module):
    """The same function as a :class:`DiT`, whose weights it copies."""

    def __init__(self, model: DiT):
        super().__init__()
        width, heads = model.config["hidden_size"], model.config["num_heads"]
        self.patch_size, self.grid = model.patch_size, model.grid
        self.patch_embed = nn.Linear(model.patch_embed.in_features, width)
        self.register_buffer("positions", model.pos_embed.detach().clone())
        self.time_embed = TimestepEmbedding(width)
        self.label_embed = nn.Embedding(model.num_classes + 1, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in model.blocks)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, model.final.linear.out_features)
        pairs = [
            (self.patch_embed, model.patch_embed), (self.time_embed, model.time_embed),
            (self.label_embed, model.label_embed), (self.modulation[1], model.final.modulation),
            (self.linear, model.final.linear),
        ]  # fmt: skip
        for plain, block in zip(self.blocks, model.blocks, strict=True):
            pairs += [
                (plain.mlp[0], block.mlp.fc_in), (plain.mlp[2], block.mlp.fc_out),
                (plain.modulation[1], block.modulation), (plain.attention.out_proj, block.attn.out),
            ]  # fmt: skip
            with torch.no_grad():
                plain.attention.in_proj_weight.copy_(block.attn.qkv.weight)
                plain.attention.in_proj_bias.copy_(block.attn.qkv.bias)
        for plain, ours in pairs:
            plain.load_state_dict(ours.state_dict())

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patch_embed(patchify(x_t, self.patch_size)) + self.positions
        c = self.time_embed(t) + self.label_embed(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=2)
        return unpatchify(self.linear(self.norm(x) * (1 + scale) + shift), self.patch_size, self.grid)

"""The text tower: a Transformer over token ids. Texts in, one vector a text out.

Shapes:  B batch   T tokens of the longest text in the batch, at most `context`   C width of a token

    ids (B, T)           start  two  red  circles  end  pad  pad
      | embedding, + position
    tokens (B, T, C)
      | layers x Block, causal: no token sees a later one
    tokens (B, T, C)                               ^
      | pool                      the end of text has seen the whole text, and no padding
    vector (B, C)

Because nothing behind the end of text can reach it, T need not be the whole context: a batch cut to its longest text
(`tokenizer.trim`) gives the same vectors for a fraction of the work.

Radford et al. 2021   Learning transferable visual models (CLIP)             arXiv:2103.00020
Zhai et al. 2023      Sigmoid loss for language image pre-training (SigLIP)  arXiv:2303.15343
"""

from __future__ import annotations

import torch
from torch import nn

from clip.config import TextConfig
from clip.model.transformer import Block, initialise

TOKEN_STD, POSITION_STD = 0.02, 0.01  # standard deviations at the start, as CLIP was trained


class TextEncoder(nn.Module):
    """Token ids int64 (B, T) -> features (B, C): the text tower of Radford et al. 2021, section 2.4.

    Each row holds exactly one end of text, the last id of the vocabulary; what stands behind it is padding and without
    effect. With `pool="last"` the whole context is used instead, padding included, as SigLIP was trained.
    `width` is C. Raises ValueError for texts longer than the context.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.width = config.width
        self.end_id = config.vocab_size - 1
        hidden = int(config.width * config.mlp_ratio)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, hidden, config.activation, config.dropout, config.norm_eps)
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width, config.norm_eps)
        initialise(self.blocks)
        nn.init.normal_(self.embedding.weight, std=TOKEN_STD)
        nn.init.normal_(self.positions, std=POSITION_STD)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self._check(ids)
        tokens = self.embedding(ids) + self.positions[: ids.shape[1]]  # (B, T, C)
        for block in self.blocks:
            tokens = block(tokens, self.config.causal)
        return self.norm_out(self._pool(tokens, ids))  # LayerNorm is token by token: one token a text is enough

    def _pool(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, C)."""
        if self.config.pool == "last":
            return tokens[:, -1]
        # The first end of text, not the largest id: both are the same for CLIP's own vocabulary, but where the padding
        # is the end of text once more, or a word has a larger id, only this is right.
        end = (ids == self.end_id).int().argmax(dim=1)  # (B,)
        return tokens[torch.arange(len(ids), device=ids.device), end]

    def _check(self, ids: torch.Tensor) -> None:
        context = self.config.context
        if ids.shape[1] > context:
            raise ValueError(f"texts of {ids.shape[1]} tokens do not fit model.text.context={context}; cut them first")
        if self.config.pool == "last" and ids.shape[1] != context:
            raise ValueError(f'pool="last" needs texts padded to the whole context of {context}, not {ids.shape[1]}')

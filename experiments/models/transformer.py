"""Transformers in inference: ViT and GPT-2 with the norms first, BERT with the norms last.

Dosovitskiy et al., An Image is Worth 16x16 Words (2021), https://arxiv.org/abs/2010.11929.
Touvron et al., Training data-efficient image transformers & distillation through attention (2021),
https://arxiv.org/abs/2012.12877: DeiT is a ViT, trained otherwise.
Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers (2019),
https://arxiv.org/abs/1810.04805.
Radford et al., Language Models are Unsupervised Multitask Learners (2019),
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Mlp(nn.Module):
    """A hidden layer of four times the width, with GELU; `approximate` by tanh or exact."""

    approximate: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(x), approximate=self.approximate)
        return nn.Dense(width, name="down")(hidden)


class PreNormBlock(nn.Module):
    """Maps [B, S, D] to [B, S, D]: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      heads: number of attention heads.
      epsilon: of LayerNorm.
      approximate: see `Mlp`.
    """

    heads: int
    epsilon: float
    approximate: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        y = nn.LayerNorm(epsilon=self.epsilon, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        y = nn.LayerNorm(epsilon=self.epsilon, name="norm2")(x)
        return x + Mlp(self.approximate, name="mlp")(y)


class PostNormBlock(nn.Module):
    """Maps [B, S, D] to [B, S, D]: norm(x + attention(x)), then norm(x + mlp(x))."""

    heads: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        y = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x, mask=mask)
        x = nn.LayerNorm(epsilon=self.epsilon, name="norm1")(x + y)
        return nn.LayerNorm(epsilon=self.epsilon, name="norm2")(x + Mlp(name="mlp")(x))


class ViT(nn.Module):
    """A vision transformer for images [B, H, W, 3] (normalised), giving logits [B, num_classes].

    Attributes:
      patch: height and width of a patch; the image is cut into whole ones.
      width: features per token.
      depth: number of blocks.
      heads: number of attention heads.
      num_classes: number of logits, computed from the class token.
    """

    patch: int
    width: int
    depth: int
    heads: int
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, batch = (self.patch, self.patch), x.shape[0]
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="patches")(x)
        x = x.reshape(batch, -1, self.width)  # [B, patches, D]
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for index in range(self.depth):
            x = PreNormBlock(self.heads, epsilon=1e-6, name=f"block{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(self.num_classes, name="linear")(x[:, 0])


class Bert(nn.Module):
    """BERT without a task: the pooled class token, [B, width], of at most 512 tokens.

    Called with the tokens, their segments (0 or 1) and the mask (1 where there is a token, 0 where
    there is padding), each int32 [B, S].

    Attributes:
      width: features per token.
      depth: number of blocks.
      heads: number of attention heads.
      vocabulary: number of tokens that exist.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 30522

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]  # [1, S]
        x = nn.Embed(self.vocabulary, self.width, name="words")(tokens)
        x = x + nn.Embed(512, self.width, name="positions")(positions)
        x = x + nn.Embed(2, self.width, name="segments")(segments)
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        mask = mask[:, None, None, :] > 0  # [B, 1, 1, S]: no token looks at padding
        for index in range(self.depth):
            x = PostNormBlock(self.heads, epsilon=1e-12, name=f"block{index}")(x, mask)
        return nn.tanh(nn.Dense(self.width, name="pooler")(x[:, 0]))


class Gpt2(nn.Module):
    """GPT-2: tokens, int32 [B, S], to logits of the next one, [B, S, vocabulary]; S <= 1024.

    The last layer is the embedding of the tokens, transposed.

    Attributes:
      width: features per token.
      depth: number of blocks.
      heads: number of attention heads.
      vocabulary: number of tokens that exist.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 50257

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        words = nn.Embed(self.vocabulary, self.width, name="words")
        positions = jnp.arange(tokens.shape[1])[None]  # [1, S]
        x = words(tokens) + nn.Embed(1024, self.width, name="positions")(positions)
        mask = nn.make_causal_mask(tokens, dtype=bool)  # [B, 1, S, S]
        for index in range(self.depth):
            block = PreNormBlock(self.heads, epsilon=1e-5, approximate=True, name=f"block{index}")
            x = block(x, mask)
        return words.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))

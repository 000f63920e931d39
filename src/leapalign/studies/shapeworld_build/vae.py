"""The embedded generator's autoencoder: AutoencoderKL, factor 4, 8 latent channels, trained on clean scenes.

Loss: L1 + squared error of the posterior's sample, and a small KL term that keeps the latents smooth. The folder's
`shift_factor` and `scaling_factor` give latents of zero mean and unit variance, which τ = 0.1 (Eq. 12) assumes.
"""

# diffusers and transformers annotate some constructors more narrowly than they accept
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from leapalign.studies.shapeworld_build.progress import Log, cosine_lr
from leapalign.studies.shapeworld_build.scenes import random_images

KL_WEIGHT = 3e-5


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(folder: Path, steps: int, seed: int, batch: int = 32) -> AutoencoderKL:
    """Train from scratch and save to `folder`; return the module in eval mode."""
    torch.manual_seed(seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    log = Log("vae", steps)
    for step in range(steps):
        images = random_images(batch, seed=(seed, step)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - images
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / 8
        cosine_lr(optimizer, 2e-3, step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        log(step, loss=loss, l1=error.abs().mean())
    vae.eval().requires_grad_(False)
    latents = torch.cat([encode(vae, random_images(256, seed=(seed, steps + i))) for i in range(8)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [B, 3, 32, 32] in [0, 1] -> latents [B, 8, 8, 8] of unit variance (the posterior's mode)."""
    mode = vae.encode(images * 2 - 1).latent_dist.mode()
    return (mode - vae.config.shift_factor) * vae.config.scaling_factor

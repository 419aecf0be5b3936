"""The lab's small encoders: vision transformers of 4 blocks, trained by train.py's step on synthetic tissue.

python -m lab.small    trains the three encoders of part 5 and writes lab/encoders.pt (minutes each)
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dirl
from common.encoders import attention_of, normalize
from common.files import load_tensors, save_tensors
from common.optimization import Schedules, batches, build_optimizer
from data import Augmentation, collate, shuffle_places
from lab.tissue import draw, tiles
from train import Recipe, StepSettings, training_step

ENCODERS = Path(__file__).parent / "encoders.pt"
ARMS = {"DINO": ("baseline", False), "DiRL": ("dirl", False), "DiRL, shuffled prior": ("dirl", True)}

# Crop and flip only: the little that distinguishes drawn crops does not survive colour jitter in a short run.
VIEWS = Augmentation(local_crops=2, global_size=112, local_size=48, jitter=0, greyscale=0, solarize=0, blur=0)


def small_vit():
    """Returns the lab's encoder: d = 64, 4 blocks, 2 heads (ViT-T: 192, 12, 3)."""
    encoder = dirl.VisionTransformer(64, 4, 2)
    for block in encoder.blocks:
        block.attn.qkv.weight.data *= 2  # 0.04 instead of 0.02: q, k and v then start as large as ViT-T's
    return encoder


@torch.no_grad()
def center_colors(encoder, images):
    """Subtracts the mean colour of images (N, 3, H, W) uint8 in the filters E and divides by its sd.

    Synthetic tissue is all pink: without this a fresh encoder returns almost the same f for every crop, and a
    short run never gets away from that. Only the initial weights change, not the model.
    """
    x = normalize(images.float() / 255, encoder.mean, encoder.std)
    mean = x.mean((0, 2, 3))
    sd = x.std((0, 2, 3))
    layer = encoder.patch_embed.proj
    layer.weight.div_(sd.view(1, 3, 1, 1))
    layer.bias.copy_(-layer.weight.sum((2, 3)) @ mean)
    return encoder


def small_dirl(method, encoder, outputs):
    """Returns DiRL on an encoder with smaller heads than DINO's, which are 2048 wide and slow on a laptop."""
    model = dirl.DiRL(encoder, method, out_dim=1, disentangled_dim=1)
    for name in model.heads:
        model.heads[name] = dirl.DINOHead(encoder.embed_dim, outputs, hidden_dim=256, bottleneck_dim=64)
    return model


def crop_of(image, cells):
    """uint8 image (H, W, 3) and cells (K, 2) -> tensors (3, H, W) and (K, 2), as data.collate takes them."""
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(cells).float()


def training_crops(slides):
    """Returns the crops of N synthetic slides, every second one with tumour: [(image, cells), ...]."""
    crops = []
    for seed in range(slides):
        image, nuclei, _ = draw(seed, tumour=seed % 2 == 1, rows=5, columns=7)
        crops += [crop_of(tile, cells) for tile, cells in zip(*tiles(image, nuclei))]
    return crops


def shuffled_priors(crops, seed):
    """Returns the crops with each one's cell patches moved to random places in it."""
    shuffled = []
    for i, (image, cells) in enumerate(crops):
        moved = shuffle_places(cells.numpy(), np.random.default_rng([seed, i]))
        shuffled.append((image, torch.from_numpy(moved).float()))
    return shuffled


def schedules(steps):
    """Returns DINO's schedules for a short run of small batches: a faster teacher with sharper outputs."""
    return Schedules(
        steps=steps, lr=5e-4, min_lr=1e-6, warmup_steps=steps // 10, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.99, teacher_temp=0.01, warmup_teacher_temp=0.01, warmup_temp_steps=0, frozen_steps=0)


def train(method, crops, steps, batch=24, outputs=64, seed=0, report=None):
    """Pre-trains a small encoder on crops [(image, cells), ...] and returns the teacher's.

    report(step, teacher, loss) is called after each step.
    """
    torch.manual_seed(seed)
    images, _ = collate(crops[:200])
    student = small_dirl(method, center_colors(small_vit(), images), outputs)
    loss = dirl.DiRLLoss(student)
    recipe = Recipe(student, dirl.make_teacher(student), loss, names=tuple(student.heads))
    optimizer = build_optimizer(student)
    how = StepSettings(VIEWS, schedules(steps), seed, torch.device("cpu"), bf16=False)
    for step, chosen in enumerate(batches(len(crops), batch, 0, steps, seed)):
        images, cells = collate([crops[i] for i in chosen])
        _, values = training_step(recipe, student, optimizer, images, cells, step, how)
        if report:
            report(step, recipe.teacher, values[0].item())
    return recipe.teacher.encoder


def load(name):
    """Returns an encoder of lab/encoders.pt, in eval mode."""
    encoder = small_vit()
    encoder.load_state_dict({key: value.float() for key, value in load_tensors(ENCODERS)[name].items()})
    return encoder.eval()


@torch.no_grad()
def print_attention(name, step, encoder, images, loss, seconds):
    values = attention_of(encoder, images)
    low, middle, high = dirl.attention_bins(values)
    print(f"{name}, step {step}: loss {loss:.3f}; attention 0 to 0.5 {low:.1%}, 0.5 to 2 {middle:.1%}, "
          f"over 2 {high:.1%}, sd {values.std():.2f}; {seconds:.0f} s", flush=True)


def main(slides=12, steps=800):
    """Trains every arm and writes ENCODERS, in 16-bit floats."""
    torch.set_flush_denormal(True)
    crops = training_crops(slides)
    watched, _ = collate(crops[::12])
    trained = {}
    for name, (method, shuffled) in ARMS.items():
        start = time.time()

        def report(step, teacher, loss):
            if (step + 1) % 50 == 0:
                print_attention(name, step + 1, teacher.encoder, watched, loss, time.time() - start)
        encoder = train(method, shuffled_priors(crops, 0) if shuffled else crops, steps, report=report)
        trained[name] = {key: value.half() for key, value in encoder.state_dict().items()}
        save_tensors(ENCODERS, trained)


if __name__ == "__main__":
    sys.exit(main())

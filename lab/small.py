"""Small encoders for the lab: vision transformers of 4 blocks, trained as train.py does, on synthetic tissue.

python -m lab.small    trains the three encoders of part 5 and writes lab/encoders.pt (once; minutes each)
"""
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dirl
from common.encoders import attention_of, normalize
from common.files import load_tensors, save_tensors
from data import random_boxes, resample, shuffle_places
from lab.tissue import draw, tiles
from prior import view_prior

ENCODERS = Path(__file__).parent / "encoders.pt"
ARMS = {"DINO": ("baseline", False), "DiRL": ("dirl", False), "DiRL, shuffled prior": ("dirl", True)}


def small_vit():
    """The encoder of the lab: d = 64, 4 blocks, 2 heads (ViT-T: 192, 12, 3)."""
    encoder = dirl.VisionTransformer(64, 4, 2)
    for block in encoder.blocks:
        block.attn.qkv.weight.data *= 2  # 0.04 instead of 0.02: q, k and v then start as large as ViT-T's
    return encoder


@torch.no_grad()
def centre_colours(encoder, images):
    """Lets the filters E start on what differs from the mean colour of images (N, 3, H, W) uint8, in its sd.

    Synthetic tissue is all pink; without this a fresh encoder gives almost the same f for every crop, and a
    short run never gets away from that. It changes E at the start only: the model is the same.
    """
    x = normalize(images.float() / 255)
    mean, sd = x.mean((0, 2, 3)), x.std((0, 2, 3))
    layer = encoder.patch_embed.proj
    layer.weight.div_(sd.view(1, 3, 1, 1))
    layer.bias.copy_(-layer.weight.sum((2, 3)) @ mean)
    return encoder


def small_dirl(method, encoder, outputs):
    """DiRL on an encoder, with smaller heads than DINO's (which are 2048 wide and slow on a laptop)."""
    model = dirl.DiRL(encoder, method, out_dim=1, disentangled_dim=1)
    for name in model.heads:
        model.heads[name] = dirl.DINOHead(encoder.embed_dim, outputs, hidden_dim=256, bottleneck_dim=64)
    return model


def training_crops(slides):
    """The tiles of that many synthetic slides, every second with tumour: uint8 (N, 3, 224, 224), cells."""
    images, cells = [], []
    for seed in range(slides):
        image, nuclei, _ = draw(seed, tumour=seed % 2 == 1, rows=5, columns=7)
        some, inside = tiles(image, nuclei)
        images.append(torch.from_numpy(some).permute(0, 3, 1, 2))
        cells += [torch.from_numpy(xy).float() for xy in inside]
    return torch.cat(images), cells


def crop_and_flip(images, cells, generator, count, size, scale):
    """count views of uint8 images (B, 3, 224, 224) with cells (B, K, 2): (count, B, 3, size, size), P_c.

    As data.make_views, but the colours are left alone: the little that tells one drawn crop from another does
    not survive DINO's colour jitter in a run this short.
    """
    views, priors, x = [], [], normalize(images.float() / 255)
    for _ in range(count):
        boxes = random_boxes(len(x), x.shape[-1], scale, generator)
        flip = torch.rand(len(x), generator=generator) < 0.5
        views.append(resample(x, boxes, flip, size))
        priors.append(view_prior(cells, boxes, flip, size))
    return torch.stack(views), torch.stack(priors)


def padded(cells):
    """[(K, 2), ...] as one (B, K, 2), padded with NaN."""
    return torch.nn.utils.rnn.pad_sequence(cells, True, math.nan)


def half_cosine(start, end, share):
    """From start at share 0 to end at share 1, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def train(method, images, cells, steps, batch=24, shuffled=False, outputs=64, lr=5e-4, momentum=0.99,
          teacher_temp=0.01, seed=0, report=None):
    """Pre-trains a small encoder as train.py does and gives the teacher's.

    images uint8 (N, 3, 224, 224), cells [(K, 2), ...] in px of them. shuffled: each crop's cells are first
    moved to other patches. report(step, teacher, loss) is called after each step.
    """
    if shuffled:
        cells = [torch.from_numpy(shuffle_places(xy.numpy(), np.random.default_rng([seed, i]))).float()
                 for i, xy in enumerate(cells)]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = small_dirl(method, centre_colours(small_vit(), images[:200]), outputs)
    teacher, loss_fn = dirl.make_teacher(student), dirl.DiRLLoss(student)
    parameters, warmup = list(student.parameters()), steps // 10
    weights, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}])
    for step in range(steps):
        share = (step - warmup) / (steps - warmup)
        rate = lr * step / warmup if share < 0 else half_cosine(lr, 1e-6, share)
        optimizer.param_groups[0].update(lr=rate, weight_decay=half_cosine(0.04, 0.4, step / steps))
        optimizer.param_groups[1].update(lr=rate)
        some = torch.randint(len(images), (batch,), generator=generator).tolist()
        some_cells = padded([cells[i] for i in some])
        views, priors = zip(crop_and_flip(images[some], some_cells, generator, 2, 112, (0.4, 1.0)),
                            crop_and_flip(images[some], some_cells, generator, 2, 48, (0.05, 0.4)))
        with torch.no_grad():
            target = teacher(views[:1], priors[:1])
        loss, _ = loss_fn(student(views, priors), target, teacher_temp)
        optimizer.zero_grad()
        loss.backward()
        for parameter in parameters:  # each on its own, as DINO does
            torch.nn.utils.clip_grad_norm_(parameter, 3.0)
        optimizer.step()
        dirl.update_teacher(student, teacher, half_cosine(momentum, 1, step / steps))
        if report:
            report(step, teacher, loss.item())
    return teacher.encoder


def load(name):
    """An encoder of lab/encoders.pt, in eval mode."""
    encoder = small_vit()
    encoder.load_state_dict({key: value.float() for key, value in load_tensors(ENCODERS)[name].items()})
    return encoder.eval()


def main(slides=12, steps=800):
    """Trains every arm and writes ENCODERS, in 16-bit floats."""
    torch.set_flush_denormal(True)
    images, cells = training_crops(slides)
    some, trained = images[::12], {}
    for name, (method, shuffled) in ARMS.items():
        start = time.time()

        def report(step, teacher, loss):
            if (step + 1) % 50 == 0:
                with torch.no_grad():
                    values = attention_of(teacher.encoder, some)
                low, middle, high = dirl.attention_bins(values)
                print(f"{name}, step {step + 1}: loss {loss:.3f}; attention 0 to 0.5 {low:.1%}, "
                      f"0.5 to 2 {middle:.1%}, over 2 {high:.1%}, sd {values.std():.2f}; "
                      f"{time.time() - start:.0f} s", flush=True)
        encoder = train(method, images, cells, steps, shuffled=shuffled, report=report)
        trained[name] = {key: value.half() for key, value in encoder.state_dict().items()}
        save_tensors(ENCODERS, trained)


if __name__ == "__main__":
    sys.exit(main())

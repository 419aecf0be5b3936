"""The lab's crops and its small encoders: vision transformers of 12 blocks, trained on the demo's tissue.

python -m lab.small    trains the encoders of parts 5 and 6 and writes lab/encoders.pt (two minutes each)
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dirl
from common.encoders import RegisterViT, normalize
from common.errors import InputError, Parser, run_script
from common.files import load_tensors, save_tensors
from common.optimization import Schedules, batches, build_optimizer
from data import Augmentation, collate, shuffle_places
from demo.slides import CLASSES, cut_crops, render
from train import Recipe, StepSettings, training_step

ENCODERS = Path(__file__).parent / "encoders.pt"
METHODS = {"DINO": "baseline", "DINO, registers": "baseline", "DiRL": "dirl", "DiRL, shuffled prior": "dirl"}
REGISTERS = "DINO, registers"
SHUFFLED = "DiRL, shuffled prior"
SIZE = (3, 4)  # rows and columns of tiles in a slide
TRAINING_SLIDES = 24  # slides 0 to 23
STEPS = 600

# 112 and 48 px are 49 and 9 tokens; with much fewer, attention over the 196 of a crop means little. Views
# that share little, and DINO's colour jitter, are too hard for so small a network and so few steps.
VIEWS = Augmentation(local_crops=2, global_size=112, local_size=48, global_scale=(0.4, 1.0),
                     local_scale=(0.1, 0.4), jitter=0.3, greyscale=0, solarize=0, blur=0)


# ---------------------------------------------------------------- crops

def crops_of(slide):
    """Returns demo.slides.cut_crops of synthetic slide number `slide`, which is positive if it is odd."""
    return cut_crops(*render(CLASSES[slide % 2], [7, slide], SIZE))  # 7: not the demo's slides


def crop_of(image, cells):
    """uint8 image (H, W, 3) and cells (K, 2) -> tensors (3, H, W) and (K, 2), as data.collate takes them."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(cells).float()


def training_crops(slides):
    """Returns the crops of the first N synthetic slides: [(image, cells), ...] as tensors."""
    crops = []
    for slide in range(slides):
        crops += [crop_of(image, cells) for image, cells, _ in crops_of(slide)]
    return crops


def shuffled_priors(crops, seed):
    """Returns the crops with each one's cell patches moved to random places in it."""
    shuffled = []
    for i, (image, cells) in enumerate(crops):
        moved = shuffle_places(cells.numpy(), np.random.default_rng([seed, i]))
        shuffled.append((image, torch.from_numpy(moved).float()))
    return shuffled


# ---------------------------------------------------------------- networks

def small_vit(registers=0):
    """Returns the lab's encoder: d = 48, 12 blocks, 3 heads (ViT-T: 192, 12, 3)."""
    encoder = dirl.VisionTransformer(48, 12, 3)
    for block in encoder.blocks:
        block.attn.qkv.weight.data *= 2  # 0.04 instead of 0.02: q, k and v then start as large as ViT-T's
    return RegisterViT(encoder, registers) if registers else encoder


@torch.no_grad()
def center_colors(encoder, images):
    """Subtracts the mean colour of images (N, 3, H, W) uint8 in the filters E and divides by its sd.

    Tissue is all pink: without this a fresh encoder returns almost the same f for every crop, and a short run
    never gets away from that. Only the initial weights change, not the model.
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


def untrained(images, seed=0):
    """Returns the random start of the encoders, with the filters centred on images (N, 3, H, W) uint8."""
    torch.manual_seed(seed)
    return center_colors(small_vit(), images).eval()


def load(name):
    """Returns an encoder of lab/encoders.pt, in eval mode."""
    encoder = small_vit(4 if name == REGISTERS else 0)
    encoder.load_state_dict({key: value.float() for key, value in load_tensors(ENCODERS)[name].items()})
    return encoder.eval()


# ---------------------------------------------------------------- training

def train(name, crops, steps, batch=16, outputs=64, seed=0, report=None):
    """Pre-trains the network of METHODS on crops [(image, cells), ...]; returns the teacher's encoder.

    report(step, loss) is called after each step.
    """
    torch.manual_seed(seed)
    images, _ = collate(crops[:200])
    encoder = center_colors(small_vit(4 if name == REGISTERS else 0), images)
    student = small_dirl(METHODS[name], encoder, outputs)
    loss = dirl.DiRLLoss(student)
    recipe = Recipe(student, dirl.make_teacher(student), loss)
    optimizer = build_optimizer(student)
    schedules = Schedules(  # for a short run of small batches: a faster teacher with sharper outputs
        steps=steps, lr=1e-3, min_lr=1e-6, warmup_steps=steps // 10, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.98, teacher_temp=0.01, warmup_teacher_temp=0.01, warmup_temp_steps=0,
        frozen_steps=steps // 20)
    settings = StepSettings(VIEWS, schedules, seed, torch.device("cpu"), bf16=False)
    if name == SHUFFLED:
        crops = shuffled_priors(crops, seed)
    for step, chosen in enumerate(batches(len(crops), batch, 0, steps, seed)):
        images, cells = collate([crops[i] for i in chosen])
        _, values = training_step(recipe, student, optimizer, images, cells, step, settings)
        if report:
            report(step, values[0].item())
    return recipe.teacher.encoder


def train_all(names):
    """Trains networks of METHODS and writes them to ENCODERS, in 16-bit floats; returns 0."""
    torch.set_flush_denormal(True)
    crops = training_crops(TRAINING_SLIDES)
    for name in names:
        start = time.time()

        def report(step, loss):
            if (step + 1) % 50 == 0:
                print(f"{name}, step {step + 1}: loss {loss:.3f}; {time.time() - start:.0f} s", flush=True)
        encoder = train(name, crops, STEPS, report=report)
        trained = load_tensors(ENCODERS) if ENCODERS.is_file() else {}
        trained[name] = {key: value.half() for key, value in encoder.state_dict().items()}
        save_tensors(ENCODERS, trained)
    return 0


def main(argv=None):
    parser = Parser(prog="python -m lab.small", description="Trains the lab's encoders.")
    parser.add_argument("networks", nargs="*", help=f"only these; default: {', '.join(METHODS)}")

    def command():
        names = parser.parse_args(argv).networks or list(METHODS)
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise InputError(f"{unknown[0]}: is none of {', '.join(METHODS)}")
        return train_all(names)
    return run_script("small", command, again="run it again")


if __name__ == "__main__":
    sys.exit(main())

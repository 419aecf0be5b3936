"""DINO's views of a batch of crops, made on the device in batch, with the same geometry for the cells (3.2, 3.5).

Probabilities and strengths are DINO's (Caron et al. 2021). Two things are done otherwise, for speed: crops are
resampled bilinearly (DINO: bicubic), and colour jitter is one affine map of RGB (`jitter_matrix`), in which hue
turns about the grey axis and only the end result is clipped.
"""
import math

import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)  # luma, as Pillow's "L"
BLUR_SIGMA = (0.1, 2.0)  # px
# Each kind of view: probability of blur and of solarising.
GLOBAL_1 = dict(blur=1.0, solarize=0.0)
GLOBAL_2 = dict(blur=0.1, solarize=0.2)
LOCAL = dict(blur=0.5, solarize=0.0)
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREYSCALE, FLIP = 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5


def uniform(shape, low, high, generator):
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)


def random_boxes(count, size, scale, generator, ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops of a size x size image: (count, 4) as left, top, width, height in whole px.

    Area uniform in scale, log of the aspect ratio uniform; the first of ten tries that fits, else the whole image.
    """
    area = uniform((count, tries), *scale, generator) * size * size
    aspect = uniform((count, tries), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= size) & (h > 0) & (h <= size)
    first = fits.float().argmax(1, keepdim=True)
    w, h = (torch.where(fits.any(1, keepdim=True), v.gather(1, first), size).squeeze(1) for v in (w, h))
    left, top = (((size - v + 1) * uniform((count,), 0, 1, generator)).floor().clamp(max=size - v) for v in (w, h))
    return torch.stack([left, top, w, h], 1)


def resample(images, boxes, flip, size):
    """Boxes of images (B, 3, H, W) to (B, 3, size, size), mirrored where flip (B,); bilinear."""
    B, _, H, W = images.shape
    left, top, w, h = boxes.unbind(1)
    sign = 1 - 2 * flip.float()
    theta = torch.zeros(B, 2, 3, device=images.device)  # view coordinates in -1..1 to image coordinates in -1..1
    theta[:, 0, 0], theta[:, 0, 2] = sign * w / W, (2 * left + w) / W - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / H, (2 * top + h) / H - 1
    grid = F.affine_grid(theta, (B, 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def view_prior(cells, boxes, flip, size, patch_size=16):
    """P_c (B, n) of views: cells (B, K, 2), px of the image, NaN where there is none, through box and flip.

    Binned before the flip, and the patches are mirrored: a mirrored px lies in the mirrored patch.
    """
    grid = size // patch_size
    xy = (cells - boxes[:, None, :2]) / boxes[:, None, 2:] * size  # px of the view
    inside = ((xy >= 0) & (xy < size)).all(-1)  # false for NaN
    xy = (torch.where(inside.unsqueeze(-1), xy, 0) // patch_size).long()
    where = torch.where(inside, xy[..., 1] * grid + xy[..., 0], grid * grid)  # one bin more for what is outside
    prior = torch.zeros(len(cells), grid * grid + 1, device=cells.device).scatter_(1, where, 1.0)[:, :-1]
    prior = prior.view(-1, grid, grid)
    return torch.where(flip[:, None, None], prior.flip(-1), prior).flatten(1)


def jitter_matrix(mean, brightness, contrast, saturation, hue, grey, order):
    """Colour jitter and grey as one affine map of RGB: (B, 3, 4), rgb -> A rgb + b.

    mean (B, 3): each image's mean colour. brightness, contrast, saturation (B,): factors as Pillow's ImageEnhance,
    1 changes nothing; hue (B,): turn about the grey axis as a share of a circle; grey (B,) bool, done last.
    order (B, 4): the order of the four, a permutation of 0 to 3 a row.
    """
    B, device = len(mean), mean.device
    eye = torch.eye(4, device=device).expand(B, 4, 4)
    luma = torch.tensor(GREY, device=device)
    to_grey = torch.zeros(4, 4, device=device)
    to_grey[:3, :3], to_grey[3, 3] = luma.expand(3, 3), 1
    mean = torch.cat([mean, torch.ones(B, 1, device=device)], 1).unsqueeze(-1)  # (B, 4, 1)
    scale = torch.ones(B, 4, device=device)
    scale[:, :3] = brightness[:, None]
    bright = torch.diag_embed(scale)
    saturate = to_grey + saturation[:, None, None] * (eye - to_grey)
    yiq = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=device)
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    turn, hued = eye[:, :3, :3].clone(), eye.clone()
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, sin, -sin, cos
    hued[:, :3, :3] = torch.linalg.inv(yiq) @ turn @ yiq
    total = eye
    for step in range(4):
        flat = (total @ mean)[:, :3, 0] @ luma  # the image's mean grey, where contrast turns
        contrasted = eye.clone()
        contrasted[:, :3, :3] *= contrast[:, None, None]
        contrasted[:, :3, 3] = ((1 - contrast) * flat)[:, None]
        choices = torch.stack([bright, contrasted, saturate, hued], 1)  # (B, 4 operations, 4, 4)
        total = choices[torch.arange(B, device=device), order[:, step]] @ total
    total = torch.where(grey[:, None, None], to_grey @ total, total)
    return total[:, :3]


def random_jitter(images, generator):
    """Brightness and contrast 0.4, saturation 0.2, hue 0.1 with probability 0.8; then grey with 0.2."""
    B = len(images)
    on = (uniform((B,), 0, 1, generator) < JITTER).float()
    factor = lambda s: 1 + on * uniform((B,), -s, s, generator)
    matrix = jitter_matrix(
        images.mean((2, 3)), factor(BRIGHTNESS), factor(CONTRAST), factor(SATURATION),
        on * uniform((B,), -HUE, HUE, generator), uniform((B,), 0, 1, generator) < GREYSCALE,
        uniform((B, 4), 0, 1, generator).argsort(1))
    flat = torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def blur(images, sigma):
    """Gaussian blur, sigma (B,) px, edges continued. (B, 3, H, W)."""
    B, C, H, W = images.shape
    radius = math.ceil(3 * BLUR_SIGMA[1])
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None]  # (B * 3, 1, 13)
    flat = F.pad(images.reshape(1, B * C, H, W), [radius] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=B * C)
    return F.conv2d(flat, kernel[:, :, :, None], groups=B * C).view_as(images)


def solarize(images):
    """Values from a half up are turned round: x to 1 - x."""
    return torch.where(images >= 0.5, 1 - images, images)


def make_view(images, cells, kind, size, scale, generator):
    """One view of every image: images (B, 3, S, S) in 0 to 1 to (B, 3, size, size) normalised, and P_c (B, n)."""
    B = len(images)
    boxes = random_boxes(B, images.shape[-1], scale, generator)
    flip = uniform((B,), 0, 1, generator) < FLIP
    x = random_jitter(resample(images, boxes, flip, size), generator)
    sigma, chance = uniform((B,), *BLUR_SIGMA, generator), uniform((B,), 0, 1, generator)
    blurred = (chance < kind["blur"]).nonzero().squeeze(1)
    if len(blurred):
        x[blurred] = blur(x[blurred], sigma[blurred])
    turned = (uniform((B,), 0, 1, generator) < kind["solarize"]).nonzero().squeeze(1)
    if len(turned):
        x[turned] = solarize(x[turned])
    return normalize(x), view_prior(cells, boxes, flip, size)


def normalize(images):
    """0 to 1 RGB to ImageNet's mean 0 and standard deviation 1, which the encoder takes."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return images.sub(mean).div_(std)


def make_views(crops, cells, generator, local_crops=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4),
               global_size=224, local_size=96):
    """Views of uint8 crops (B, 3, S, S) with cells (B, K, 2): 2 global ones of 224 px, then local ones of 96 px.

    Gives views [(2, B, 3, 224, 224), (local, B, 3, 96, 96)] and priors [(2, B, 196), (local, B, 36)], on the
    device of the generator, from which every random number comes. scale: share of the crop's area; size: px.
    """
    images, cells = crops.to(generator.device).float() / 255, cells.to(generator.device)
    groups = [[(kind, global_size, global_scale) for kind in (GLOBAL_1, GLOBAL_2)],
              [(LOCAL, local_size, local_scale)] * local_crops]
    views, priors = [], []
    for group in groups:
        made = [make_view(images, cells, *kind, generator) for kind in group]
        if made:
            views.append(torch.stack([x for x, _ in made]))
            priors.append(torch.stack([p for _, p in made]))
    return views, priors

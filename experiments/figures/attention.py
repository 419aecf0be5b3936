"""Where encoders look (1, 4.2, A.6): Fig. 4, 7 to 9 and 11, Fig. 5 and 12, Fig. 13, Fig. 1.

    python -m experiments.figures.attention distribution --checkpoint Baseline=RUN DiRL=RUN [--data demo]
    python -m experiments.figures.attention picture FILE --checkpoint DINO=FILE DiRL=RUN --arch vit_s

overlay and query are called like distribution; --help says what each draws.
Each writes a picture and its numbers as CSV next to it. Whole slides: experiments/figures/heatmap.py.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import dirl
from common.encoders import ClassTokenViT, attention_of, in_batches, inputs_of
from common.errors import InputError, run_script
from common.figures import BINS, add_scale, draw_crop, draw_fig_4, draw_heat, draw_overlays, draw_prior
from common.flags import SEED, whole
from common.report import note_on_middle
from data import Augmentation, spread
from experiments.figures import shared
from experiments.figures.outlines import outlines_of
from experiments.figures.views import views_of
from prior import bin_centroids
from wsi.pixels import read_image
from wsi.slides import CROP

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
QUERY = "#e00000"  # frame of the token that asks
SQUARE = 336  # px of a picture's square: views of 40 to 100 % of it are resampled by 0.9 to 1.5 times


def arguments(argv):
    parser, _ = shared.parser_of("figures.attention", "Aggregated attention of encoders, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = {"distribution": "Fig. 4, 7 to 9, 11: the distribution over all tokens, and its three bins",
             "overlay": "Fig. 5, 12: crops with the attention over them, and bars of the three bins",
             "query": "Fig. 13: the row of the attention of single tokens",
             "picture": "Fig. 1: two augmented views of any picture; of encoders with a class token also its "
                        "row, which DINO shows"}
    for command, help in about.items():
        add = commands.add_parser(command, help=help, description=help).add_argument
        add("--out", type=shared.png, default=f"runs/attention_{command}.png", help="the picture")
        if command == "picture":
            shared.add_checkpoints(add)
            add("image", type=Path, metavar="FILE", help="a PNG or JPEG, whose middle square is taken")
            add("--arch", choices=list(dirl.ARCHS),
                help="architecture of other programs' checkpoints (with timm's or DINO's names)")
            add("--seed", type=SEED, default=0, help="seed of the two views")
            continue
        shared.add_networks(add)
        if command == "distribution":
            add("--crops", type=whole(), default=1000, help="largest number of crops; more is steadier")
            continue
        add("--crops", type=whole(), default=4 if command == "overlay" else 1,
            help="how many crops without --show")
        add("--show", nargs="+", metavar="CROP",
            help="crops to show: <slide>/<x>_<y> as in datasets/<data>/crops, or the end of a file's name; "
                 "default: some with cells, background and little glass")
        if command == "overlay":
            add("--outlines", type=Path, metavar="FOLDER",
                help="with QuPath's annotations as <slide>.geojson; draws tumour in white, lymphocytes in "
                     "green, necrosis in yellow")
        else:
            add("--query", nargs="+", default=["3"], metavar="X,Y",
                help="query tokens, by a point of each in px of the crop (0 to 224); one number k: a grid of "
                     "k x k points")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- numbers

def tokens_at(queries, grid, size=CROP):
    """Returns the indices of the tokens of a grid x grid crop at points "x,y" in px; ["k"]: k x k points.

    InputError for a text that is neither, or a point outside 0 to size.
    """
    try:
        if len(queries) == 1 and queries[0].isdigit() and int(queries[0]):
            k = int(queries[0])
            middles = (np.arange(k) + 0.5) * size / k
            points = [(x, y) for y in middles for x in middles]
        else:
            points = [tuple(map(float, query.split(","))) for query in queries]
        if not all(0 <= x < size and 0 <= y < size for x, y in points):
            raise ValueError
    except ValueError:
        raise InputError(f"--query {' '.join(queries)}: x,y within 0 to {size} px is expected, such as "
                         "100,60, or one number for a grid") from None
    return [int(y * grid // size) * grid + int(x * grid // size) for x, y in points]


def choose(crops, args):
    """Returns the indices of the crops of --show, else of --crops of them with both regions, little glass."""
    if not args.show:
        return shared.choose_crops(crops, crops.priors(), args.crops)
    chosen = []
    for name in args.show:
        indices = [i for i, file in enumerate(crops.files) if file.removesuffix(".jpg").endswith(name)
                   or file.endswith(name)]
        if len(indices) != 1:
            raise InputError(f"--show {name}: {len(indices)} crops of --part {args.part} match; "
                             "one is needed")
        chosen += indices
    return chosen


def name_of(crops, i):
    """Returns a crop's name as --show takes it."""
    return f"{crops.owner[i]}/{Path(crops.files[i]).stem}"


# ---------------------------------------------------------------- pictures

def distribution(networks, found, crops, args):
    """Fig. 4: the distribution of aggregated attention of each network; shares of the bins as CSV."""
    images = shared.images_of(crops, spread(len(crops), args.crops))
    aggregated = {name: in_batches(lambda x: attention_of(encoder, x), images, 64, name)
                  for name, (encoder, _, _) in networks.items()}
    figure = draw_fig_4(aggregated, f"{found.name}, {len(images)} {args.part} crops")
    rows = [("network", "crops", "tokens", *BINS, *(f"quantile {q:g}" for q in QUANTILES))]
    for name, values in aggregated.items():
        numbers = (*dirl.attention_bins(values), *np.quantile(values.numpy(), QUANTILES))
        rows.append((name, len(images), values.numel(), *numbers))
        print(f"{name}: " + ", ".join(f"{v:.1%} of the tokens {b}" for v, b in zip(numbers, BINS)))
    if note := note_on_middle([row[4] for row in rows[1:]]):
        print(note)
    shared.save_both(figure, rows, args.out)


def overlay(networks, found, crops, args):
    """Fig. 5 and 12: each crop, P_c, the aggregated attention of each network, bars of its bins."""
    chosen = choose(crops, args)
    images = shared.images_of(crops, chosen)
    aggregated = {name: in_batches(lambda x: attention_of(encoder, x), images, 64)
                  for name, (encoder, _, _) in networks.items()}
    outlines = outlines_of(args.outlines, found, crops, chosen) if args.outlines else None
    figure = draw_overlays(images, aggregated, crops.priors()[chosen], outlines)
    rows = bins_of("crop", [name_of(crops, i) for i in chosen], aggregated)
    shared.save_both(figure, rows, args.out, dpi=110)


def bins_of(kind, names, aggregated):
    """Returns the rows of a CSV: for each image and network the shares of the bins; {network: (B, n)}."""
    rows = [(kind, "network", *BINS)]
    for i, name in enumerate(names):
        for network, values in aggregated.items():
            rows.append((name, network, *dirl.attention_bins(values[i])))
    return rows


def two_views(path, seed):
    """Returns two of DINO's global views of a picture's middle square, uint8 (2, 3, 224, 224)."""
    image = read_image(path)
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.resize((SQUARE, SQUARE), Image.BICUBIC, (left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    (_, views), = views_of([(pixels, torch.zeros(0, 2))], Augmentation(local_crops=0), seed)
    return torch.stack([(view * 255).round().byte() for view, _ in views])


@torch.no_grad()
def picture(args):
    """Fig. 1: two views of a picture, the attention of each network, bars of its bins.

    A network with a class token has two columns: that token's row, and the aggregated attention, which is the
    paper's.
    """
    networks = shared.load_networks(args, args.arch)
    views = two_views(args.image, args.seed)
    attention = {}
    for name, (encoder, _, _) in networks.items():
        if isinstance(encoder, ClassTokenViT):
            row = encoder.class_attention(inputs_of(encoder, views)).mean(1).cpu()  # (2, n)
            attention[f"{name}: class token"] = row * row.shape[-1]
            name = f"{name}: aggregated"
        attention[name] = attention_of(encoder, views).cpu()
    figure = draw_overlays(views, attention, title="view")
    shared.save_both(figure, bins_of("view", ["1", "2"], attention), args.out, dpi=110)


def query(networks, found, crops, args):
    """Fig. 13: the crop, then the rows of query tokens (framed) in the last block, a line per network."""
    chosen = choose(crops, args)
    grid = CROP // 16
    tokens = tokens_at(args.query, grid)
    corners = [(t % grid * 16, t // grid * 16) for t in range(grid * grid)]  # of each token, px
    columns = 1 + len(tokens)
    lines = [(i, name) for i in chosen for name in networks]
    figure = Figure(figsize=(1.6 * columns + 1.4, 1.8 * len(lines) + 0.2), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    rows = [("crop", "network", "query x", "query y", "token x", "token y", "attention times n")]
    for (i, name), line in zip(lines, axes):
        images = shared.images_of(crops, [i])
        encoder, _, _ = networks[name]
        with torch.no_grad():
            attention = encoder.last_attention(inputs_of(encoder, images))[0].cpu()
        drawn = attention[:, tokens].mean(0) * attention.shape[-1]  # (Q, n), mean over heads; even share: 1
        for axis in line:
            draw_crop(axis, images[0])
        draw_prior(line[0], bin_centroids(crops.cells(i), CROP), CROP)
        line[0].set_title("crop and P_c", fontsize=8)
        line[0].set_ylabel(name if len(chosen) == 1 else f"{name}\n{name_of(crops, i)}", fontsize=8)
        for axis, token, values in zip(line[1:], tokens, drawn):
            shown = draw_heat(axis, values, CROP)
            x, y = corners[token]
            axis.add_patch(Rectangle((x, y), 16, 16, fill=False, edgecolor=QUERY, lw=1.8))
            axis.set_title(f"token at {x},{y} px", fontsize=8)
            rows += [(name_of(crops, i), name, x, y, *corners[t], v) for t, v in enumerate(values.tolist())]
    add_scale(figure, shown, "attention to a token (even share: 1)", "max", ax=axes[:, -1],
              shrink=min(1, 2.5 / len(lines)))
    shared.save_both(figure, rows, args.out, dpi=110)


def run(args):
    if args.command == "picture":
        picture(args)
        return 0
    with_cells = args.command != "distribution"
    networks, found, names = shared.open_all(args, with_cells)
    crops = shared.crops_of(found, names, args, with_cells)
    {"distribution": distribution, "overlay": overlay, "query": query}[args.command](
        networks, found, crops, args)
    return 0


def main(argv=None):
    return run_script("attention", lambda: run(arguments(argv)), "--crops")


if __name__ == "__main__":
    sys.exit(main())

"""Do tokens tell cells from background (A.4)? Fig. 10 and Table 10.

    python -m experiments.figures.tokens --checkpoint Baseline=RUN DiRL=RUN [--data demo] [--tokens N]

Draws N tokens of T_L with a cell and N without from crops of the test part, maps them to 2-D by t-SNE, fits a
Gaussian to each kind, and compares the two: Jensen-Shannon divergence, Bhattacharyya distance.
"""
import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from scipy.stats import multivariate_normal
from sklearn.manifold import TSNE

from common.encoders import in_batches, inputs_of
from common.errors import InputError, run_script
from common.figures import OTHER_COLORS, network_colors
from common.flags import SEED, between, whole
from experiments.figures import shared

KINDS = dict(zip(("cell", "background"), OTHER_COLORS))


def arguments(argv):
    parser, add = shared.parser_of("figures.tokens", "How far apart cell and background tokens are in t-SNE.")
    shared.add_networks(add)
    add("--tokens", type=whole(10), default=30_000,
        help="tokens of each kind; t-SNE takes half an hour per network for 30,000, minutes for 3,000")
    add("--crops", type=whole(), default=2000, help="largest number of crops to draw tokens from")
    add("--perplexity", type=between(1, 10 ** 6), default=30,
        help="perplexity of t-SNE; below a third of all tokens")
    add("--seed", type=SEED, default=0, help="seed of the draw and of t-SNE; vary it to see what is luck")
    add("--out", type=shared.png, default="runs/tokens.png", help="the picture")
    args = parser.parse_args(argv)
    if 3 * args.perplexity > 2 * args.tokens - 1:
        raise InputError(f"--perplexity {args.perplexity:g}: has to be below a third of all "
                         f"{2 * args.tokens} tokens")
    return args


# ---------------------------------------------------------------- two Gaussians

def jensen_shannon(p, q, steps=601, reach=8):
    """Jensen-Shannon divergence of two Gaussians (mean, cov) to base 2, from 0 (equal) to 1 (disjoint).

    (E_p log2(p / m) + E_q log2(q / m)) / 2 with m = (p + q) / 2 (Lin 1991). Each mean is a sum over a grid
    of steps x steps points within reach standard deviations of its Gaussian, along that Gaussian's axes.
    """
    z = np.linspace(-reach, reach, steps)
    weight = np.exp(-0.5 * z ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), -1)

    def mean_log(own, other):
        x = own[0] + grid @ np.linalg.cholesky(own[1]).T
        a, b = (multivariate_normal(*gaussian).logpdf(x) for gaussian in (own, other))
        return (weight * (np.log(2) + a - np.logaddexp(a, b))).sum() / np.log(2)
    return float((mean_log(p, q) + mean_log(q, p)) / 2)


def bhattacharyya(p, q):
    """Bhattacharyya distance of two Gaussians (mean, cov), from 0 up; with C the mean of the covariances,

    d^T C^-1 d / 8 + ln(det C / sqrt(det C_p det C_q)) / 2, d the difference of the means.
    """
    d = p[0] - q[0]
    cov = (p[1] + q[1]) / 2
    logdet = [np.linalg.slogdet(c)[1] for c in (cov, p[1], q[1])]
    return float(d @ np.linalg.solve(cov, d) / 8 + (logdet[0] - (logdet[1] + logdet[2]) / 2) / 2)


# ---------------------------------------------------------------- tokens

def draw_places(priors, count, seed):
    """Returns {kind: flat indices (count,) into P_c (N, n)}, drawn without replacement.

    InputError if P_c has fewer of a kind.
    """
    rng = np.random.default_rng(seed)
    flat = priors.flatten().numpy()
    places = {}
    for kind, value in zip(KINDS, (1, 0)):
        indices = np.flatnonzero(flat == value)
        if len(indices) < count:
            raise InputError(f"--tokens {count}: these crops have {len(indices)} {kind} tokens; lower it, or "
                             "raise --crops")
        places[kind] = np.sort(rng.choice(indices, count, replace=False))
    return places


def embed(encoder, images, places, args):
    """Returns {kind: points (M, 2)} of the tokens of T_L at each kind's places (M,), in one t-SNE.

    images uint8 (N, 3, H, H); places: of draw_places.
    """
    tokens = in_batches(lambda x: encoder(inputs_of(encoder, x)), images, 64, "tokens")  # (B, n, d)
    chosen = tokens.flatten(0, 1)[np.concatenate(list(places.values()))]
    tsne = TSNE(2, perplexity=args.perplexity, init="pca", random_state=args.seed)
    points = tsne.fit_transform(chosen.numpy()).astype(np.float64)
    return dict(zip(KINDS, np.split(points, 2)))


def draw(axis, points, fitted, title, color):
    """Fig. 10: the points of both kinds with their Gaussians' ellipses of one and two standard deviations."""
    for kind, xy in points.items():
        axis.plot(*xy.T, ".", ms=max(1.2, 120 / len(xy) ** 0.5), alpha=0.4, mew=0, color=KINDS[kind])
    for kind, (mean, cov) in fitted.items():
        values, vectors = np.linalg.eigh(cov)
        angle = np.degrees(np.arctan2(*vectors[::-1, 1]))
        for sd, style in ((1, "-"), (2, "--")):
            axis.add_patch(Ellipse(mean, *(2 * sd * np.sqrt(values[::-1])), angle=angle, fill=False, ls=style,
                                   lw=1.8, edgecolor=KINDS[kind], label=f"{kind}, {sd} sd"))
    axis.set_title(title, fontsize=9, color=color)
    axis.set_aspect("equal", "datalim")
    axis.set(xticks=[], yticks=[])


def run(args):
    networks, found, names = shared.open_all(args)
    crops = shared.crops_of(found, names, args)
    colors = network_colors(networks)
    order = np.random.default_rng(args.seed).permutation(len(crops))[: args.crops]
    places = draw_places(crops.priors()[order], args.tokens, args.seed)
    images = shared.images_of(crops, order)
    figure = Figure(figsize=(3.6 * len(networks), 4.2), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    rows = [("network", "tokens of each kind", "Jensen-Shannon", "Bhattacharyya")]
    for axis, (name, (encoder, _, _)) in zip(axes, networks.items()):
        print(f"{name}: t-SNE of {2 * args.tokens} tokens", flush=True)
        points = embed(encoder, images, places, args)
        fitted = {kind: (xy.mean(0), np.cov(xy.T)) for kind, xy in points.items()}
        js = jensen_shannon(*fitted.values())
        bd = bhattacharyya(*fitted.values())
        rows.append((name, args.tokens, js, bd))
        draw(axis, points, fitted, f"{name}\nJS {js:.3f}, BD {bd:.3f}", colors[name])
        print(f"{name}: Jensen-Shannon {js:.4f}, Bhattacharyya {bd:.4f}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * min(2, len(networks)), fontsize=8)
    shared.save_both(figure, rows, args.out)
    return 0


def main(argv=None):
    return run_script("tokens", lambda: run(arguments(argv)), "--tokens or --crops")


if __name__ == "__main__":
    sys.exit(main())

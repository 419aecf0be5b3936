"""LC25000's lung images in the layout of our results: python -m experiments.lc25000 lung_image_sets.

LC25000 (Borkowski et al. 2019, arXiv:1912.12142; github.com/tampapath/lung_colon_image_set links to the
download) holds 15,000 lung images of 768 x 768 px, in lung_aca/, lung_n/ and lung_scc/: some 750 source
tiles, each flipped and rotated into about 20 images. The results in docs/results.md use 3,031 of them, split
by source tile. LC25000 does not name the tiles: lc25000_lung.csv next to this file lists each one's images.
"""
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.errors import InputError, Parser, run_script
from common.files import atomic_write, read_csv, write_csv
from wsi.pixels import read_image
from wsi.slides import CROP

TABLE = Path(__file__).with_name("lc25000_lung.csv")


def labels():
    """Returns [(image, label, split, source tile), ...], sorted by image; image is <class>/<file>."""
    rows = []
    for _, row in read_csv(TABLE)[1]:
        label = row["class"]
        rows += [(f"{label}/{label.replace('_', '')}{number}.jpeg", label, row["split"],
                  f"{label}_{row['source_tile']}") for number in row["images"].split()]
    return sorted(rows)


def make(source, out):
    """Writes labels.csv and the images, resized to CROP px, to out; returns 0."""
    rows = labels()
    missing = [image for image, *_ in rows if not (source / image).is_file()]
    if missing:
        raise InputError(f"{source}: {len(missing)} of {len(rows)} images are missing, such as {missing[0]}; "
                         "give LC25000's folder lung_image_sets")
    for image, *_ in tqdm(rows, "images"):
        with atomic_write(out / image) as temp:
            picture = read_image(source / image)
            picture.resize((CROP, CROP), Image.LANCZOS).save(temp, format="JPEG", quality=90)
    write_csv(out / "labels.csv", [("image", "label", "split", "source_tile"), *rows])
    print(f"Wrote {len(rows)} images and labels.csv to {out}. "
          f"Next: python train.py --data {out} --mpp 0.5, or the commands of docs/results.md")
    return 0


def main(argv=None):
    parser = Parser(prog="python -m experiments.lc25000", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="LC25000's folder lung_image_sets")
    parser.add_argument("--out", type=Path, default=Path("lung_patches"), help="the folder to write")
    return run_script("experiments.lc25000", lambda: make(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

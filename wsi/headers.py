"""Header fields of TIFF, DICOM and Hamamatsu files that openslide does not report."""
import logging
import os
import re
from xml.etree import ElementTree

from tifffile import TiffFile

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its messages on broken tags do not name the file

UM = {"inch": 25400, "centimeter": 10_000, "cm": 10_000, "mm": 1000, "nm": 0.001, "micron": 1, "um": 1,
      "\u00b5m": 1, "\u03bcm": 1, "\\u00B5m": 1}  # um in each unit, as TIFF, OME and ImageJ spell it
RESOLUTION_UNITS = {1: "none", 2: "inch", 3: "centimeter"}

# (0020,000D), the study's UID, and (0020,000E), the series', in explicit or implicit VR. They are adjacent at
# the top level of a DICOM file only: sequences that refer to a series hold its UID alone.
SERIES = re.compile(rb"\x20\0\x0d\0(?:UI..|.\0\0\0)[0-9.]*\0?"
                    rb"\x20\0\x0e\0(?:UI..|.\0\0\0)([0-9.]+)", re.DOTALL)


def tiff_properties(path, width):
    """Returns the um/px that a TIFF records, as properties named like openslide's; {} for any other file.

    These are OME.PhysicalSizeX and -Y (um) of the image with that width, and the resolution tags, whose unit
    may be given by ImageJ.
    """
    try:
        with TiffFile(path) as file:
            tags = file.pages[0].tags
            imagej = file.imagej_metadata or {}
            resolutions = {name: tags.valueof(name, (0, 0)) for name in ("XResolution", "YResolution")}
            unit = imagej.get("unit") or RESOLUTION_UNITS.get(tags.valueof("ResolutionUnit", 2), "none")
            out = ome_properties(file.ome_metadata, width)
    except Exception:  # tifffile raises many types for a broken file
        return {}
    for name, (pixels, units) in resolutions.items():
        if units:
            out |= {f"tiff.{name}": f"{pixels / units:g}", "tiff.ResolutionUnit": unit}
    return out


def ome_properties(xml, width):
    """Returns the px size in um of OME-XML's image with that width, or unchanged if its unit is no length."""
    out = {}
    for image in ElementTree.fromstring(xml or "<none/>").iter():
        if not image.tag.endswith("Pixels") or image.get("SizeX") != str(width):
            continue
        for name in ("PhysicalSizeX", "PhysicalSizeY"):
            size = image.get(name)
            unit = image.get(f"{name}Unit", "um")
            if size:
                out[f"OME.{name}"] = f"{float(size) * UM[unit]:g}" if unit in UM else f"{size} {unit}"
    return out


def dicom_series(path):
    """Returns the SeriesInstanceUID of a DICOM file as bytes; b"" if it has none."""
    match = SERIES.search(first_bytes(path))
    return match[1] if match else b""


def hamamatsu_images(path):
    """Returns the files next to a Hamamatsu .vms or .vmu that it names as its images."""
    lines = os.fsdecode(first_bytes(path)).splitlines()
    return {path.parent / line.partition("=")[2].strip() for line in lines if "=" in line}


def first_bytes(path):
    """Returns the first 64 KB of a file; b"" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16)
    except OSError:
        return b""

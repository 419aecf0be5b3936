"""From a slide on a disk to crops and cells: folders, slides, tiles, cell formats, segmenters, the GDC."""

"""Suffixes of image files, in lower case."""

# Images for training; other files in the folder are ignored.
TRAINED = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff"})

# Images for resizing and image-to-image. Pillow alone cannot read the last three suffixes; they are listed so that
# such files are reported as unreadable images.
READ = TRAINED | {".jfif", ".gif"} | {".heic", ".heif", ".jxl"}

# Images that can be written.
WRITTEN = (".png", ".jpg", ".jpeg", ".webp")

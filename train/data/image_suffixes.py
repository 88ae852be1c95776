"""Which files are images, by their suffixes in lower case."""

# Images that are trained on: others in the folder are left alone.
TRAINED = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff"})

# Images that can be resized or drawn from. Pillow alone cannot read the last three: better reported by name than taken
# for something that is not an image.
READ = TRAINED | {".jfif", ".gif"} | {".heic", ".heif", ".jxl"}

# Images that can be written.
WRITTEN = (".png", ".jpg", ".jpeg", ".webp")

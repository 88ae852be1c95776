"""The words that options choose from, where the parsers can have them without importing torch."""

FORMATS = ("kohya", "peft", "diffusers", "cloneofsimo", "lycoris")  # modules of formats/, in the order they are tried
FAMILIES = (
    "flux",
    "chroma",
    "sd3",
    "flux2",
    "lumina2",
    "zimage",
    "qwen_image",
)  # of transformers, see registry.py
OTHER = "other"  # a model of which nothing is known: families/unlisted.py
EMA = ("keep", "drop", "merge")  # averaged weights of a checkpoint: storage/ema.py
EXTRACTED = ("lokr", "full")  # kinds of adapters to extract, besides low-rank pairs: models/extraction.py
METHODS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # of merging, besides the sum: deltas/combined.py
MAJORITIES = ("total", "frequency")  # whose sign ties and dare_ties elect: deltas/combined.py
DYNAMIC_METHODS = ("sv_ratio", "sv_cumulative", "sv_fro")  # kohya's rules for the rank: deltas/rank_choice.py
ZERO_ALPHA = ("rank", "none")  # what an alpha of 0 means: tools/inputs.py

"""The choices of options, in a module that the parsers can import without torch."""

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
OTHER = "other"  # an unknown model: families/unlisted.py
EMA = ("keep", "drop", "merge")  # averaged weights of a checkpoint: storage/ema.py
EXTRACTED = ("lokr", "full")  # kinds of adapters to extract, besides low-rank pairs: models/extraction.py
METHODS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # merging methods besides sums: deltas/combined.py
MAJORITIES = ("total", "frequency")  # how ties and dare_ties elect signs: deltas/combined.py
DYNAMIC_METHODS = ("sv_ratio", "sv_cumulative", "sv_fro")  # kohya's rules for the rank: deltas/rank_choice.py
ZERO_ALPHA = ("rank", "none")  # the meaning of an alpha of 0: tools/inputs.py

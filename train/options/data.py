"""Command-line options: pictures, captions, buckets, caches. They are the defaults under --dataset_config."""

import argparse

from lora_adapters.convert.parsing import number
from lora_adapters.train.interpolation import TRAINING
from lora_adapters.train.options.parser import adders


def add_dataset(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--dataset_config", help="toml or json file that describes the data")
    option("--train_data_dir", help="folder of `<repeats>_<class>` folders with pictures")
    option("--reg_data_dir", help="the same for regularisation pictures")
    option("--in_json", help="metadata file of pictures and captions")
    option("--dataset_repeats", type=int, default=1, help="how often an epoch shows each picture of --in_json")
    option("--dataset_class", help="dotted name of another dataset class")
    flag("--debug_dataset", help="show the dataset instead of training")
    option("--resolution", help="size of the pictures: 512, or width,height")
    option("--train_batch_size", type=int, default=1, help="pictures a batch, in each process")
    flag("--enable_bucket", help="sort pictures into buckets by aspect ratio")
    option("--min_bucket_reso", type=int, default=256, help="shortest side of a bucket")
    option("--max_bucket_reso", type=int, default=1024, help="longest side of a bucket")
    option("--bucket_reso_steps", type=int, default=64, help="sides are multiples of this")
    flag("--bucket_no_upscale", help="never enlarge a picture")
    option("--resize_interpolation", choices=list(TRAINING), help="how pictures are resized")
    option("--validation_split", type=number, default=0.0, help="share of the pictures that is held out")
    option("--validation_seed", type=int, help="seed that chooses them (default: --seed)")
    option("--validate_every_n_steps", type=int, help="measure the held-out loss every n steps")
    option("--validate_every_n_epochs", type=int, help="measure the held-out loss every n epochs (default: 1)")
    option("--max_validation_steps", type=int, help="held-out batches to measure (default: all)")


def add_captions(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--caption_extension", default=".caption", help="caption files beside the pictures end so")
    option("--caption_extention", help="the same, in an older spelling")
    option("--caption_separator", default=",", help="separator of tags")
    flag("--shuffle_caption", help="shuffle the tags")
    option("--keep_tokens", type=int, default=0, help="leave the first n tags in place")
    option("--keep_tokens_separator", default="", help="leave in place what stands before this separator")
    option("--secondary_separator", help="separator within a tag: becomes --caption_separator after shuffling")
    flag("--enable_wildcard", help="choose among {a|b}, and among the lines of a caption")
    option("--caption_prefix", help="text before each caption")
    option("--caption_suffix", help="text after each caption")
    option("--caption_dropout_rate", type=number, default=0.0, help="share of captions that is left empty")
    option("--caption_dropout_every_n_epochs", type=int, default=0, help="leave all captions empty every n epochs")
    option("--caption_tag_dropout_rate", type=number, default=0.0, help="share of tags that is left out")
    option("--token_warmup_min", type=int, default=1, help="tags at the start of the token warm-up")
    option("--token_warmup_step", type=number, default=0, help="steps (or share) until all tags are used")


def add_pictures(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    flag("--flip_aug", help="flip half of the pictures")
    flag("--color_aug", help="vary the colours")
    flag("--random_crop", help="crop at random places")
    option("--face_crop_aug_range", help="crop around faces, enlarged between two factors: 1.0,2.0")
    flag("--alpha_mask", help="take the pictures' alpha channels as masks")
    option("--conditioning_data_dir", help="folder of masks, named like the pictures")
    flag("--cache_info", help="keep the list of pictures and captions on disk")
    flag("--cache_latents", help="encode the pictures once, before training")
    flag("--cache_latents_to_disk", help="keep the latents beside the pictures")
    option("--vae_batch_size", type=int, default=1, help="pictures encoded at once")
    flag("--skip_cache_check", help="take caches on disk as they are")
    flag("--cache_text_encoder_outputs", help="encode the captions once (needs an untrained text encoder)")
    flag("--cache_text_encoder_outputs_to_disk", help="keep them beside the pictures")

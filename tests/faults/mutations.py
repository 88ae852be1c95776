"""Damages files. Every change depends only on a seed, so that failures can be reproduced."""

import json
import random
import re

NUMBERS = ("0", "-1", "1e999", "NaN", "-Infinity", "0.5", "2147483648", "1e400", "true")
NUMBERS += ("9" * 20, "9" * 400, "9" * 5000, "0x" + "f" * 5000)  # too long for a float, for Python's int(), for str()
TOKENS = (
    "null",
    "[]",
    "{}",
    '""',
    '"x"',
    "[" * 3000,
    '{"a":' * 3000,
    "\0",
    "\ufeff",
    "\n",
    '"',
    "'''",
    "[[",
    "]]",
    "=",
)
SHAPES = ([], [0], [-1], [1], [2**40], [2**62, 4], [2, 2, 2], [1] * 70, "x", None, [1.5], [True])
DTYPES = ("F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "U16", "X", 7, None)


def mutated(content: bytes, seed: int) -> bytes:
    """The content with one to six changes, or entirely random bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, 5000)))
    if content[8:9] == b"{" and rng.random() < 0.6:
        content = _safetensors_header(content, rng)
    for _ in range(rng.randint(0 if content[8:9] == b"{" else 1, 6)):
        content = rng.choice((_flip, _set, _cut, _insert, _repeat, _truncate, _number, _token, _flip_early))(
            content, rng
        )
    return content


def _at(content: bytes, rng: random.Random) -> int:
    return rng.randrange(len(content) + 1)


def _flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_early(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit of the first bytes, where formats store lengths and versions."""
    return _flip(content[:16], rng) + content[16:]


def _set(content: bytes, rng: random.Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, 10, 34))]) + content[at + 1 :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at + rng.choice((1, 2, 8, 64, 1000)) :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + rng.randbytes(rng.choice((1, 4, 8, 100))) + content[at:]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at, length = _at(content, rng), rng.choice((1, 16, 200))
    return content[: at + length] + content[at : at + length] * rng.choice((1, 2, 30)) + content[at + length :]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: _at(content, rng)]


def _number(content: bytes, rng: random.Random) -> bytes:
    """Replace a number in a text by one that is hard to parse."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content[:20000]))
    if not found:
        return content
    chosen = rng.choice(found)
    return content[: chosen.start()] + rng.choice(NUMBERS).encode() + content[chosen.end() :]


def _token(content: bytes, rng: random.Random) -> bytes:
    """Replace a value in a text (or a piece anywhere) by a value of another kind."""
    found = list(re.finditer(rb'"[^"\n]{0,80}"|\btrue\b|\bfalse\b|\[[^\[\]\n]{0,80}\]', content[:20000]))
    token = rng.choice(TOKENS).encode()
    if not found or rng.random() < 0.2:
        at = _at(content, rng)
        return content[:at] + token + content[at:]
    chosen = rng.choice(found)
    return content[: chosen.start()] + token + content[chosen.end() :]


def _safetensors_header(content: bytes, rng: random.Random) -> bytes:
    """A .safetensors file whose header is well-formed but wrong, or valid but unusual."""
    length = int.from_bytes(content[:8], "little")
    try:
        table = json.loads(content[8 : 8 + length])
    except ValueError:
        return content
    names = [name for name in table if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.randrange(7)
    if kind == 0:
        table[name]["shape"] = rng.choice(SHAPES)
    elif kind == 1:
        table[name]["dtype"] = rng.choice(DTYPES)
    elif kind == 2:
        table[name]["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [4, 0], [-4, 0], [0, 4], "x", [0]))
    elif kind == 3:  # two tensors with swapped entries
        other = rng.choice(names)
        table[name], table[other] = table[other], table[name]
    elif kind == 4:
        table[rng.choice(("", "x", "lora_unet_", f"{name}.weight", "\ud800" if rng.random() < 0.1 else "é"))] = (
            table.pop(name)
        )
    elif kind == 5:
        metadata = table.setdefault("__metadata__", {})
        key = rng.choice([*metadata, "ss_network_args", "ss_network_module", "lora_adapter_metadata", "unet"])
        values = (
            *NUMBERS,
            *TOKENS,
            "networks.dylora",
            '{"unit": "0"}',
            '{"unit": "' + "9" * 5000 + '"}',
            '{"rank_scaling": "x"}',
        )
        metadata[key] = rng.choice(values)
        metadata["ss_network_module"] = rng.choice(("networks.dylora", metadata.get("ss_network_module", "x")))
    else:
        table[name] = rng.choice((None, [], {}, 3, "x"))
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]

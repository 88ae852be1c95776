import math

import pytest

from lora_adapters.convert.parsing import json_value, number, toml_table


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999", "one", ""])
def test_only_finite_numbers_are_numbers(text):
    with pytest.raises(ValueError, match=r"no finite number|could not convert"):
        number(text)
    assert number("-1.5e-3") == -0.0015


@pytest.mark.parametrize("digits", ["1" + 400 * "0", str(2**64), str(-(2**63) - 1), 5000 * "9"])
def test_no_whole_number_is_longer_than_64_bits(digits):
    with pytest.raises(ValueError, match=r"64 bits|limit") as caught:
        json_value(f'{{"a": [{digits}]}}')
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"64 bits|limit"):
        toml_table(f"a = [{{ b = {digits} }}]")


def test_hexadecimal_numbers_of_any_length_are_counted():
    with pytest.raises(ValueError, match="64 bits"):
        toml_table("a = 0x" + 5000 * "f")
    assert toml_table("a = 0xffffffffffffffff")["a"] == 2**64 - 1
    assert json_value(str(-(2**63))) == -(2**63)
    assert math.isinf(toml_table("a = inf")["a"])

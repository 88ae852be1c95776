import logging
import os

from lora_adapters.train.quiet import quiet


def test_notices_are_not_shown_and_the_environment_is_left(monkeypatch) -> None:
    backends = logging.getLogger("bitsandbytes.backends")
    monkeypatch.setattr(backends, "level", logging.NOTSET)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    cpu = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not cpu.isEnabledFor(logging.WARNING)
    assert cpu.isEnabledFor(logging.ERROR)

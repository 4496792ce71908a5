"""Whether a config can run, told without importing transformers: its own tables decide."""

from __future__ import annotations

import subprocess
import sys

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from moei_core.forecast.shape import bundled_configs
from moei_core.hub.runnable import why_not


def test_every_architecture_of_transformers_is_known() -> None:
    assert [kind for kind in CONFIG_MAPPING_NAMES if why_not({"model_type": kind}) is not None] == []
    assert [name for name, config in bundled_configs().items() if why_not(config) is not None] == []
    assert why_not({"model_type": "no_such_architecture"}) is not None


def test_transformers_is_not_imported() -> None:
    program = (
        "import sys; from moei_core.hub.runnable import why_not; assert why_not({'model_type': 'x'}); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_speaks_against_a_model() -> None:
    assert why_not({"model_type": "mixtral", "quantization_config": {"quant_method": "mxfp4"}}) is None
    for config in ({"quantization_config": {"quant_method": "gptq"}}, {"quantization_config": {"bits": 4}}):
        assert why_not({"model_type": "mixtral", **config}) is not None
        assert why_not({"model_type": "mixtral", "text_config": config}) is not None

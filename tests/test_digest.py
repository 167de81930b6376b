"""The hash of settings is the same on every machine and in every release."""

from __future__ import annotations

import hashlib
import json

from maml.digest import digest


def test_digest_is_the_same_everywhere() -> None:
    settings = {"b": [1, 0.001, None, True], "a": "x"}
    text = '{"a":"x","b":[1,0.001,null,true]}'
    assert json.loads(text) == settings
    assert digest(settings) == hashlib.sha256(text.encode()).hexdigest()[:12] == "f43b2440c316"

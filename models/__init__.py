"""Networks and weights."""

from typing import Any

# Imported when asked for: most of this package's modules do not need each other.
_WHERE = {
    "ClipImageEncoder": "models.image_encoder",
    "PatchCodec": "models.autoencoder",
    "MultiViewPipeline": "models.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)

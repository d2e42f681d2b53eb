"""The model that a profile was made on, as it is loaded again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcal.arch.embedded import EMBEDDED_MODEL

if TYPE_CHECKING:
    from skipcal.profiles.data import ProfileData


def of_embedded_model(profile: ProfileData) -> bool:
    """Whether the model was the one that skipcal brings along: other weights than the hub's of that name."""
    return profile.model.name == EMBEDDED_MODEL and profile.config.get("model", "") is None


def own_model(profile: ProfileData) -> dict[str, str]:
    """Arguments of `load_model` for the model of the profile; none for the embedded one.

    Of a model from a folder a profile knows the folder's name alone. Whether code of the model's own may run
    is for the user to say, and not for a profile.
    """
    if of_embedded_model(profile):
        return {}
    made_on = profile.model
    plain = made_on.dtype in ("bfloat16", "float16", "float32") and made_on.quantization is None
    quantization = profile.config.get("quantization")  # if it was asked for; else the checkpoint has it
    own = {
        "model": made_on.name,
        "revision": made_on.revision,
        "adapter": made_on.adapter,
        "dtype": made_on.dtype if plain else None,
        "quantization": quantization if isinstance(quantization, str) else None,
    }
    return {name: value for name, value in own.items() if value is not None}

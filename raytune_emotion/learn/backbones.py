"""Parse and check names of backbones without the slow import of timm.

A backbone is a model of timm (`resnet18`, `resnet18.a1_in1k`), a repository of the Hugging Face hub
(`hf-hub:OWNER/NAME`, optionally with `@REVISION`), or a folder with the files of such a repository (`local-dir:/path`).
"""

import re
from pathlib import Path

from raytune_emotion.errors import UserError, suggest
from raytune_emotion.learn.timm_patches import architectures

#: Prefixes, as in timm, of the sources of backbones other than timm's own models.
HUB, FOLDER = "hf-hub", "local-dir"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def split_source(backbone: str) -> tuple[str, str]:
    """Split a name into its source (HUB, FOLDER, or "" for timm's own models) and the rest."""
    source, colon, rest = backbone.partition(":")
    return (source, rest) if colon and source in (HUB, FOLDER) else ("", backbone)


def short_name(backbone: str) -> str:
    """Return the last part of a name, without its source and revision. It can be part of a file name."""
    source, name = split_source(backbone)
    if source == HUB:
        name = name.partition("@")[0]
    return name.rstrip("/").rpartition("/")[2]


def check_architecture(backbone: str) -> None:
    """Check the name of a backbone: timm has the architecture, or the source is well-formed.

    The existence of weights, folders and repositories is not checked.

    Raises:
        UserError: the name is wrong; the error names the closest names.
    """
    source, rest = split_source(backbone)
    if source == HUB and not _REPOSITORY.fullmatch(rest):
        raise UserError(f"model.backbone: {backbone}: expected {HUB}:OWNER/NAME, a repository of the Hugging Face hub")
    if source == FOLDER and not rest.startswith("/"):
        raise UserError(
            f"model.backbone: {backbone}: expected an absolute path, because trials run in other folders; "
            f"name {FOLDER}:{Path(rest).absolute()}"
        )
    if source or backbone.partition(".")[0] in architectures():
        return
    if ":" in backbone:
        raise UserError(
            f"model.backbone: {backbone}: unknown source; name a timm model, {HUB}:OWNER/NAME or {FOLDER}:/PATH"
        )
    near = suggest(backbone, sorted(architectures()), 3)
    raise UserError(f"model.backbone: {backbone}: no such timm model{near}")

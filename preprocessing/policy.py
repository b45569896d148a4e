"""What is done with unusual pictures, in words that the manifest's column `policy` shows. docs/pixels.md explains them.

No such picture is dropped in silence, and none is changed: it is converted as any other and marked, so that whoever
trains or predicts can leave marked ones out by `manifest.policy`.
"""

from __future__ import annotations

FOR_PROCESSING = "for-processing"  # raw detector values: no vendor's contrast, often no window
TOMOSYNTHESIS_FRAME = "tomosynthesis-frame"  # one frame of a stack, chosen by ConvertSettings.frame
FRAME = "frame"  # one frame of another multi-frame file
SYNTHESISED = "synthesised-2d"  # computed from tomosynthesis (PS3.3 C.8.11.7.1.4: GENERATED_2D)
IMPLANT = "implant"
IMPLANT_DISPLACED = "implant-displaced"
MAGNIFIED = "magnified"  # magnification or spot compression: not the whole breast
SECONDARY = "secondary-capture"  # a copy of a screen or a film, by its SOP class
TRANSFER_SYNTAX = "transfer-syntax-contradicted"  # decoded as what the codestream is
USUAL_VIEWS = ("CC", "MLO")


def describe(marks: str, view: str, implant: float) -> str:
    """The column `policy`: marks joined by ';', empty for a usual picture.

    Args:
        marks: what the file itself tells, of this module's words, joined by ';'.
        view: of the manifest; anything but CC, MLO and unknown is marked `view-<VIEW>`.
        implant: 1 where there is one.
    """
    unusual = [f"view-{view.upper()}"] if view and view.upper() not in USUAL_VIEWS else []
    return ";".join(dict.fromkeys([*filter(None, marks.split(";")), *unusual, *([IMPLANT] if implant == 1 else [])]))

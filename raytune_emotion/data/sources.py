"""List a source of annotated faces: a folder in the layout of AffectNetFused, or a table."""

from raytune_emotion.data.affectnet import list_faces
from raytune_emotion.data.faces import Faces
from raytune_emotion.data.table import is_table, list_table
from raytune_emotion.storage.locations import Location


def list_source(place: Location) -> Faces:
    """List a source of faces.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    return list_table(place) if is_table(place) else list_faces(place)

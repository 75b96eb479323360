"""Looking: by how much a layer reads which position, as numbers and as pictures.

`mixing_matrix` says it of all positions of any layer, `looks` of one position of a `Mixer`, `look` draws both on a
photograph.
"""

from nearfold.look.mixing import mixing_matrix
from nearfold.look.picture import DEFAULT, load_image, look
from nearfold.look.row import looks

__all__ = ["DEFAULT", "load_image", "look", "looks", "mixing_matrix"]

"""What a packed file holds, from shapes alone: names, schemes, header, exact size.

`export.save` fills this in and writes it; it lies below the search, which predicts sizes of files.
"""

from jaxcompress.core.storage.file_contents import (
    Contents as Contents,
)
from jaxcompress.core.storage.file_contents import (
    contents as contents,
)
from jaxcompress.core.storage.file_contents import (
    file_bytes as file_bytes,
)

"""Arrays and networks on meshes."""

"""Files and folders: the hub's cache, pipeline folders, safetensors, atomic writes, locks."""

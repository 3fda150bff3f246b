"""From a folder of annotated faces to batches on a device."""

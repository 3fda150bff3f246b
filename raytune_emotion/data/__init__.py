"""Turn a folder of annotated faces into batches on a device."""

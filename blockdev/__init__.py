"""blockdev: the vbd device, blkfront and blkback."""

"""The merge engine against mergekit: whole processes on checkpoints on disk, and one step of a search in memory."""
